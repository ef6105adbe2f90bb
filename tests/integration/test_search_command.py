"""`dints-deploy search` in processes of its own: alone, two under `torchrun`, and with arguments that make no sense."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
import torch

from dints_deploy.cli.search import search_command
from dints_search.checkpoint import load_checkpoint
from dints_search.genotype import read_genotype
from dints_search.metrics import read_metrics
from dints_search.run import read_config
from dints_search.search_run import read_architecture, read_search_config
from tests.command import Machine
from tests.tiny_task import tiny_search_recipe, write_genotype, write_task

SETTINGS = ("--steps", 4, "--memory", "reference", "--threads", 1)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """Return a folder with the tiny task and its recipe."""
    folder = tmp_path_factory.mktemp("search")
    write_task(folder / "task")
    recipe = tiny_search_recipe(folder).model_dump(mode="json", exclude_none=True)
    (folder / "tiny.toml").write_text(tomli_w.dumps(recipe), encoding="utf-8")
    return Machine(folder)


@pytest.fixture(scope="module")
def alone(machine: Machine) -> Path:
    """Search in one process on batches of two."""
    done = machine.run("search", "--task", "tiny.toml", "--data", "task", "--out", "alone", "--json", *SETTINGS)
    assert done.code == 0, done.err
    assert done.json["edges"] == sum(map(sum, read_genotype(machine.folder / "alone/genotype.json").edge_active))
    return machine.folder / "alone"


def test_a_search_leaves_what_a_person_wants_to_see(alone: Path) -> None:
    found = read_genotype(alone / "genotype.json")
    assert found.searched_fold == 0
    assert found.about == "searched on the training part of fold 0 of Balls, sigma 0.5"
    wanted = {"config.toml", "metrics.jsonl", "genotype.json", "architecture.svg", "architecture.png", "relaxation.png"}
    assert wanted <= {path.name for path in alone.iterdir()}
    assert any((alone / "events").iterdir())
    assert {"L_seg", "L_alpha", "L_eta", "L_tp", "L_m", "usage"} <= set(read_metrics(alone)[-1])


def test_cases_that_are_kept_in_a_folder_are_searched_on_as_those_in_memory(machine: Machine, alone: Path) -> None:
    words = ["search", "--task", "tiny.toml", "--data", "task", "--out", "cached", "--cache", "cache", *SETTINGS]
    assert machine.run(*words).code == 0
    assert any((machine.folder / "cache").iterdir())
    assert (machine.folder / "cached" / "genotype.json").read_bytes() == (alone / "genotype.json").read_bytes()
    for one, other in zip(read_metrics(alone), read_metrics(machine.folder / "cached"), strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


@pytest.mark.parametrize(
    ("words", "code", "advice"),
    [
        (("--precision", "fp16"), "recipe-invalid", "--precision bf16"),
        (("--device", "cuda:99"), "usage", "--device cpu"),
    ],
)
def test_what_this_machine_cannot_search_with_is_told_and_leaves_no_folder(
    machine: Machine, words: tuple[str, ...], code: str, advice: str
) -> None:
    said = machine.run("search", "--task", "tiny.toml", "--data", "task", "--out", "no", "--json", *SETTINGS, *words)
    assert said.code in (1, 2)
    error = json.loads(said.out)["error"]
    assert (error["code"], advice in error["message"]) == (code, True)
    assert not (machine.folder / "no").exists()


def test_a_run_is_taught_by_another_and_measured_on_the_device_that_is_named(machine: Machine) -> None:
    write_genotype(machine.folder / "genotype.json")
    words: list[object] = ["retrain", "--genotype", "genotype.json", "--task", "tiny.toml", "--data", "task", "--json"]
    words += ["--steps", 4, "--threads", 1]
    assert machine.run(*words, "--out", "first").code == 0
    done = machine.run(*words, "--out", "second", "--from", "first", "--teacher", "first", "--seed", 1)
    assert done.code == 0, done.err
    first, second = (read_config(machine.folder / run) for run in ("first", "second"))
    assert (first.origin, first.teachers) == (None, ())
    assert second.teachers == (second.origin,)
    measure = ["evaluate", "--run", "second", "--data", "task", "--json"]
    measured = machine.run(*measure, "--device", "cpu").json
    assert (measured["summary"]["cases"] > 0, measured["device"]) == (True, "cpu")
    entry = ["evaluate", "--model", "hippocampus", "--data", "task", "--json", "--device", "cpu"]
    for call in ([*measure, "--device", "cuda:99"], entry):
        refused = machine.run(*call)
        assert (refused.code, json.loads(refused.out)["error"]["code"]) == (2, "usage")
    for options in (["--precision", "bf16"], ["--engine", "onnx"], ["--submission", "a.zip", "--plot", "a.png"]):
        assert machine.run(*measure, *options).code == 2, options
    lost = machine.run("evaluate", "--run", "nowhere", "--data", "task")
    assert (lost.code, "no config.toml in nowhere" in lost.err) == (1, True)


def in_two_processes(machine: Machine, *words: object) -> str:
    """Run a command of dints-deploy in two processes and return what they printed."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = machine.environment()
    del environment["PYTHONWARNINGS"]  # torchrun itself warns
    done = subprocess.run(
        [*start, "dints_deploy", *map(str, words)],
        cwd=machine.folder,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.stdout


@pytest.mark.parametrize("order", [(), ("--unrolled", "--precision", "fp32")], ids=["first order", "unrolled"])
def test_two_processes_search_as_one_with_the_doubled_batch(
    machine: Machine, alone: Path, order: tuple[str, ...]
) -> None:
    words = ["search", "--task", "tiny.toml", "--data", "task", *SETTINGS, *order]
    if order:
        alone = machine.folder / "alone-unrolled"
        assert machine.run(*words, "--out", alone.name).code == 0
    two = machine.folder / f"two-{alone.name}"
    in_two_processes(machine, *words, "--out", two.name, "--batch", 1)
    for one, other in zip(read_metrics(alone), read_metrics(two), strict=True):
        assert one.pop("phase") == other.pop("phase")
        one["seconds"] = other["seconds"] = 0
        assert one == pytest.approx(other, rel=1e-5)
    for a, b in zip(read_architecture(alone).parameters(), read_architecture(two).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_retraining_a_searchs_network_leaves_out_what_the_search_held_out_and_renews_its_report(
    machine: Machine, alone: Path
) -> None:
    words = ["retrain", "--search", "alone", "--task", "tiny.toml", "--data", "task", "--out", "again", "--json"]
    done = machine.run(*words, "--steps", "8", "--threads", "1")
    assert done.code == 0, done.err
    held_out = read_search_config(alone).held_out
    assert held_out
    assert not set(held_out) & set(read_config(alone.parent / "again").cases)
    assert "| retrained, dints |" in (alone / "report.md").read_text(encoding="utf-8")
    resumed = machine.run("search", "--task", "tiny.toml", "--data", "task", "--out", "alone", "--resume", *SETTINGS)
    assert resumed.code == 0, resumed.err  # nothing is left to search, but the gap is measured again
    assert "| retrained, dints |" in (alone / "report.md").read_text(encoding="utf-8")
    assert "flatter" not in done.err
    other = machine.run(*words, "--out", "elsewhere-folded", "--fold", "1", "--steps", "1", "--threads", "1")
    assert "searched on the training part of fold 0, which holds the cases that fold 1 measures" in other.err
    both = machine.run(*words, "--genotype", str(alone / "genotype.json"))
    assert both.code == 2
    assert "either --genotype FILE or --search RUN" in both.out + both.err


def test_a_search_on_another_dataset_is_told_before_the_training(machine: Machine, alone: Path) -> None:
    held_out = next(iter(read_search_config(alone).held_out))
    description = json.loads((machine.folder / "task" / "dataset.json").read_text())
    description["training"] = [pair for pair in description["training"] if held_out not in pair["image"]]
    shutil.copytree(machine.folder / "task", machine.folder / "other")
    (machine.folder / "other" / "dataset.json").write_text(json.dumps(description))
    words = ["retrain", "--search", "alone", "--task", "tiny.toml", "--data", "other", "--out", "elsewhere"]
    done = machine.run(*words, "--threads", "1")
    assert done.code == 2
    assert "--genotype" in done.err
    assert not (machine.folder / "elsewhere").exists()


def test_two_processes_retrain_as_one_with_the_doubled_batch(machine: Machine) -> None:
    write_genotype(machine.folder / "genotype.json")
    words: list[object] = ["retrain", "--genotype", "genotype.json", "--task", "tiny.toml", "--data", "task", "--json"]
    words += ["--set", 'retraining.precision="fp32"', "--steps", 8, "--threads", 1]
    assert machine.run(*words, "--out", "teacher").code == 0
    done = machine.run(*words, "--from", "teacher", "--teacher", "teacher", "--out", "one")
    assert done.code == 0, done.err
    words += ["--from", "teacher", "--teacher", "teacher"]
    both = [*words, "--out", "both", "--set", "retraining.batch=1"]
    assert json.loads(in_two_processes(machine, *both))["run"] == "both"
    losses = [
        load_checkpoint(run / "checkpoint.pt", read_config(run).digest())["losses"]
        for run in (machine.folder / "one", machine.folder / "both")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    weights = machine.folder / "both" / "weights.safetensors"
    finished = weights.read_bytes()
    assert machine.run(*both, "--resume").code == 0  # nothing is left to share
    assert weights.read_bytes() == finished
    weights.unlink()
    refused = machine.run(*both, "--resume")
    assert (refused.code, json.loads(refused.out)["error"]["code"]) == (1, "run-mismatch")
    assert "processes" in json.loads(refused.out)["error"]["message"]


def test_a_search_needs_its_three_arguments(machine: Machine) -> None:
    done = machine.run("search", "--task", "4", "--json")
    assert (done.code, json.loads(done.out)["error"]["code"]) == (2, "usage")
    assert "Example" in (search_command.__doc__ or "")
