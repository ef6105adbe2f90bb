"""Retraining ends at a rate of zero, averages as told, survives SIGKILL bit by bit, and never sees the validation."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from dints_deploy.catalog.dataset import read_dataset
from dints_deploy.errors import DatasetError, UsageError
from dints_deploy.files import sha256_file
from dints_search.checkpoint import load_checkpoint
from dints_search.crossval import crossval
from dints_search.genotype import parse_genotype
from dints_search.metrics import read_metrics
from dints_search.recipe import Retraining, override
from dints_search.retrain import LOG_EVERY, learning_rate, retrain, start, train_step
from dints_search.run import check_run, read_config, trained_network
from tests.tiny_task import tiny_genotype, tiny_recipe, train, train_and_die, train_apart, write_task


def saved(run: Path) -> dict[str, Any]:
    """Return the state in a run's checkpoint."""
    return load_checkpoint(run / "checkpoint.pt", read_config(run).digest())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny task and, for each precision, a run on it that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    for precision in ("fp32", "bf16"):
        write_task(folder / precision / "task")
        train_apart(folder / precision, precision=precision)
    return folder


def fresh(whole: Path, folder: Path, precision: str = "fp32") -> Path:
    """Return a folder with the same task and no run."""
    shutil.copytree(whole / precision / "task", folder / "task")
    return folder


@pytest.mark.parametrize(("steps", "warmup"), [(1000, 100), (1000, 0), (50, 100), (3, 100), (2, 1), (1, 0)])
def test_the_learning_rate_rises_then_falls_to_zero_after_the_last_step(steps: int, warmup: int) -> None:
    settings = Retraining(steps=steps, warmup_steps=warmup, learning_rate=0.01)
    rates = [learning_rate(step, settings) for step in range(steps)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.01)
    assert top <= warmup
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert learning_rate(steps, settings) == pytest.approx(0, abs=1e-12)
    if steps > 10:
        assert 0 < rates[-1] < 0.01 * 0.02


def test_the_learning_rate_is_a_half_cosine_after_the_warm_up() -> None:
    settings = Retraining(steps=1100, warmup_steps=100, learning_rate=2.0)
    assert learning_rate(9, settings) == pytest.approx(0.2)
    for share in (0.0, 0.25, 0.5, 0.75):
        expected = 1 + math.cos(math.pi * share)
        assert learning_rate(100 + int(1000 * share), settings) == pytest.approx(expected)


def steps_of(settings: Retraining, count: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """Return the weight and its average after each of `count` steps on one batch, and the losses."""
    torch.manual_seed(0)
    state = start(nn.Conv3d(1, 3, 1), settings)
    image = torch.randn(2, 1, 4, 4, 4)
    label = (image > 0).long()
    weights, averages, losses = [], [], []
    for _ in range(count):
        loss, rate = train_step(state, image, label, settings)
        assert rate == state.optimiser.param_groups[0]["lr"] == learning_rate(state.step - 1, settings)
        weights.append(next(state.network.parameters()).detach().clone())
        averages.append(next(state.average.parameters()).clone())
        losses.append(loss)
    return weights, averages, losses


def test_the_published_average_is_the_one_by_hand() -> None:
    settings = Retraining(steps=40, warmup_steps=0, learning_rate=0.05, ema=0.7, precision="fp32")
    torch.manual_seed(0)
    average = next(nn.Conv3d(1, 3, 1).parameters()).detach()
    weights, averages, losses = steps_of(settings, 40)
    for step, (weight, found) in enumerate(zip(weights, averages, strict=True), start=1):
        decay = min(0.7, step / (step + 10))
        average = decay * average + (1 - decay) * weight
        torch.testing.assert_close(found, average, rtol=1e-5, atol=1e-6)
    assert losses[-1] < losses[0]
    assert not torch.equal(averages[-1], weights[-1])


def test_a_tiny_separable_task_is_learnt(whole: Path, tmp_path: Path) -> None:
    losses: list[float] = []
    recipe = tiny_recipe(
        tmp_path, steps=60, learning_rate=0.01, precision="fp32", augmentation={"rotation": 0.0, "scaling": 0.0}
    )
    task = read_dataset(whole / "fp32" / "task")
    retrain(
        recipe, tiny_genotype(), task, tmp_path / "run", fold=0, report=lambda step, loss, rate: losses.append(loss)
    )
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [25, 50]
    assert lines[0]["loss"] == pytest.approx(sum(losses[:25]) / 25, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_was_killed_and_resumed_has_the_bits_of_one_that_was_not(
    whole: Path, tmp_path: Path, precision: str
) -> None:
    folder = fresh(whole, tmp_path, precision)
    train_and_die(folder, 2, precision=precision)  # before the first checkpoint, of step 3
    assert not (folder / "run" / "checkpoint.pt").exists()
    train_and_die(folder, 5, precision=precision, resume=True)  # between two
    assert saved(folder / "run")["step"] == 3
    resumed = train_apart(folder, precision=precision, resume=True)
    expected = whole / precision / "run"
    assert (resumed / "weights.safetensors").read_bytes() == (expected / "weights.safetensors").read_bytes()
    states = [saved(run) for run in (resumed, expected)]
    assert states[0]["step"] == states[1]["step"] == 8
    for part in ("network", "average", "losses"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)
    moments = [state["optimiser"]["state"] for state in states]
    torch.testing.assert_close(moments[0], moments[1], rtol=0, atol=0)
    assert not list(resumed.glob(".partial*"))


def test_a_run_that_was_killed_and_resumed_has_the_figures_of_one_that_was_not(tmp_path: Path) -> None:
    """The kill comes after a line that the last checkpoint does not know, and tears another."""
    options: dict[str, Any] = {"steps": 60, "checkpoint_every": 20, "precision": "fp32"}
    for name in ("whole", "killed"):
        write_task(tmp_path / name / "task")
    train_and_die(tmp_path / "killed", 52, **options)
    with (tmp_path / "killed" / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7')
    runs = [train_apart(tmp_path / "killed", resume=True, **options), train_apart(tmp_path / "whole", **options)]
    killed, whole = ([{**line, "time": 0} for line in read_metrics(run)] for run in runs)
    assert killed == whole
    assert [line["step"] for line in killed] == [LOG_EVERY, 2 * LOG_EVERY]
    for run in runs:
        curve = EventAccumulator(str(run / "events")).Reload().Scalars("loss")
        assert [(event.step, event.value) for event in curve] == [
            (line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in whole
        ]
        assert (run / "curves.png").stat().st_size > 1000


def test_the_average_is_what_is_published(whole: Path) -> None:
    weights = load_file(whole / "fp32" / "run" / "weights.safetensors")
    state = saved(whole / "fp32" / "run")
    assert set(weights) == set(state["average"])
    assert all(torch.equal(tensor, state["average"][name]) for name, tensor in weights.items())
    assert not all(torch.equal(tensor, state["network"][name]) for name, tensor in weights.items())


def test_bfloat16_is_not_single_precision_under_another_name(whole: Path) -> None:
    single, brain = (load_file(whole / precision / "run" / "weights.safetensors") for precision in ("fp32", "bf16"))
    assert all(tensor.dtype == torch.float32 for tensor in brain.values())
    assert not all(torch.equal(single[name], brain[name]) for name in single)
    assert all(torch.allclose(single[name], brain[name], atol=0.05) for name in single)


def test_resuming_a_finished_run_changes_nothing(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole / "fp32", folder)
    before = sha256_file(folder / "run" / "weights.safetensors")
    (folder / "run" / "weights.safetensors").unlink()
    train(folder, resume=True, precision="fp32")
    assert sha256_file(folder / "run" / "weights.safetensors") == before


def test_the_validation_part_of_the_fold_is_never_read(whole: Path, tmp_path: Path) -> None:
    folder = fresh(whole, tmp_path)
    _, validation = read_dataset(folder / "task").fold(0)
    for case in validation:
        case.image.write_bytes(b"nothing that could be read")
        case.label.write_bytes(b"")
    run = train_apart(folder, precision="fp32")
    expected = whole / "fp32" / "run" / "weights.safetensors"
    assert (run / "weights.safetensors").read_bytes() == expected.read_bytes()
    assert set(read_config(run).cases).isdisjoint(case.id for case in validation)


def test_a_run_records_the_ids_and_digests_of_what_it_was_trained_on(whole: Path) -> None:
    task = read_dataset(whole / "fp32" / "task")
    training, _ = task.fold(0)
    config = read_config(whole / "fp32" / "run")
    assert config.cases == {case.id: sha256_file(case.image) for case in training}
    assert (config.fold, config.seed, config.genotype) == (0, 3, tiny_genotype().digest())


def refused(folder: Path, code: str, **changes: Any) -> None:
    """Assert that resuming the run in `folder` is refused with a code and touches no file of it."""
    before = digests(folder / "run")
    with pytest.raises(DatasetError) as caught:
        train(folder, **{"resume": True, "precision": "fp32", **changes})
    assert caught.value.code == code
    assert digests(folder / "run") == before


def digests(run: Path) -> dict[Path, str]:
    """Return the digest of every file of a run."""
    return {path: sha256_file(path) for path in run.rglob("*") if path.is_file()}


def test_another_configuration_does_not_continue_a_run(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole / "fp32", folder)
    refused(folder, "run-mismatch", steps=9)
    refused(folder, "run-mismatch", precision="bf16")
    refused(folder, "run-mismatch", augmentation={"noise": 0.5})
    refused(folder, "run-mismatch", resume=False)
    shutil.copyfile(whole / "bf16" / "run" / "checkpoint.pt", folder / "run" / "checkpoint.pt")
    refused(folder, "run-mismatch")
    shutil.copyfile(whole / "fp32" / "run" / "checkpoint.pt", folder / "run" / "checkpoint.pt")
    training, _ = read_dataset(folder / "task").fold(0)
    for kind in ("image", "label"):
        path = getattr(training[0], kind)
        kept = path.read_bytes()
        shutil.copyfile(getattr(training[1], kind), path)
        refused(folder, "run-mismatch")
        path.write_bytes(kept)
    train(folder, resume=True, precision="fp32")


def test_a_run_of_before_labels_were_kept_goes_on_without_them(whole: Path, tmp_path: Path) -> None:
    config = read_config(whole / "fp32" / "run")
    old = config.model_copy(update={"labels": {}})
    (tmp_path / "config.toml").write_text(tomli_w.dumps(old.model_dump(mode="json", exclude_none=True)))
    found = check_run(tmp_path, config, resume=True)
    assert found.digest() == old.digest() != config.digest()
    with pytest.raises(DatasetError, match=r"another \(seed\)"):
        check_run(tmp_path, config.model_copy(update={"seed": 4}), resume=True)


def test_a_window_that_the_genotype_cannot_halve_is_refused_before_a_run_is_opened(whole: Path, tmp_path: Path) -> None:
    task, recipe = read_dataset(whole / "fp32" / "task"), tiny_recipe(tmp_path)
    for window, precision in (("12,12,10", "fp32"), ("4,4,4", "fp32"), ("8,12,12", "bf16")):
        changed = override(recipe, [f"window=[{window}]", f'retraining.precision="{precision}"'])
        with pytest.raises(DatasetError) as caught:
            retrain(changed, tiny_genotype(), task, tmp_path / "run", fold=0)
        assert caught.value.code == "recipe-invalid"
        with pytest.raises(DatasetError):
            crossval(changed, tiny_genotype(), task, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta"])
def test_a_device_that_is_not_there_is_refused_before_a_run_is_opened(whole: Path, tmp_path: Path, device: str) -> None:
    task, recipe = read_dataset(whole / "fp32" / "task"), tiny_recipe(tmp_path)
    with pytest.raises(UsageError, match=device):
        retrain(recipe, tiny_genotype(), task, tmp_path / "run", fold=0, device=device)
    assert not (tmp_path / "run").exists()


def test_a_training_that_diverges_ends_with_one_error_and_a_sound_checkpoint(whole: Path, tmp_path: Path) -> None:
    folder = fresh(whole, tmp_path)
    with pytest.raises(DatasetError) as caught:
        train(folder, precision="fp32", learning_rate=1e30, warmup_steps=0, checkpoint_every=1)
    assert caught.value.code == "training-diverged"
    state = saved(folder / "run")
    assert state["step"] > 0
    for part in ("network", "average"):
        assert all(tensor.isfinite().all() for tensor in state[part].values())


def test_a_run_of_another_seed_fold_or_genotype_is_not_continued(whole: Path, tmp_path: Path) -> None:
    task, recipe = read_dataset(whole / "fp32" / "task"), tiny_recipe(tmp_path, precision="fp32")
    other = parse_genotype(tiny_genotype().to_json().replace("conv_first", "reference"))
    run = whole / "fp32" / "run"
    calls: list[dict[str, Any]] = [{"seed": 4}, {"fold": 1}, {"genotype": other}]
    for call in calls:
        options: dict[str, Any] = {"fold": 0, "seed": 3, "genotype": tiny_genotype()} | call
        with pytest.raises(DatasetError) as caught:
            retrain(recipe, options.pop("genotype"), task, run, resume=True, **options)
        assert caught.value.code == "run-mismatch"


def test_a_trained_network_is_that_of_its_own_weights_and_genotype_or_refused(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole / "fp32" / "run", tmp_path / "run"))
    _, network = trained_network(run)
    weights = load_file(run / "weights.safetensors")
    assert not network.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())

    def code() -> str:
        with pytest.raises(DatasetError) as caught:
            trained_network(run)
        return caught.value.code

    whole_file = (run / "weights.safetensors").read_bytes()
    (run / "weights.safetensors").write_bytes(whole_file[:-1])
    assert code() == "checkpoint-invalid"
    save_file({"other": torch.zeros(1)}, run / "weights.safetensors")
    assert code() == "checkpoint-invalid"
    (run / "weights.safetensors").write_bytes(whole_file)
    (run / "genotype.json").write_text(tiny_genotype().to_json().replace("conv_first", "reference"))
    assert code() == "run-mismatch"
    (run / "weights.safetensors").unlink()
    assert code() == "checkpoint-invalid"
