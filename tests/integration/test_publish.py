"""A tiny task from data to a segmented scan through the command line: what ships is what was measured."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from dints_deploy.catalog.catalog import load_entry
from dints_deploy.catalog.dataset import Case, read_dataset
from dints_deploy.catalog.entry import ParityLimits
from dints_deploy.catalog.weights import SUMS_FILE, check_onnx
from dints_deploy.errors import DatasetError
from dints_deploy.files import sha256_file
from dints_deploy.imaging.nifti import read_nifti
from dints_deploy.imaging.volume import Volume
from dints_deploy.runtime.parity import Certificate, parity_status
from dints_deploy.runtime.sessions import open_sessions
from dints_search.card import Described, write_card
from dints_search.evaluate import entry_of
from dints_search.export import Exported, export_network, real_windows
from dints_search.plan import UNSAID
from dints_search.recipe import read_recipe
from dints_search.run import RunConfig, trained_network
from tests.tiny_entry import Said, run_cli, scan_file
from tests.tiny_task import write_description, write_genotype, write_recipe, write_task

# torch 2.13 calls its own deprecated isinstance check while it exports
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")

FILES = {
    "entry.toml",
    "genotype.json",
    "model.onnx",
    "parity.json",
    "parity_inputs.npz",
    "metrics.json",
    "card.md",
    "recipe.toml",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a task, runs on its folds 0 and 1, and the entry that fold 0 was published and added as."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DINTS_ZOO", str(folder / "no-zoo"))
        patch.setenv("DINTS_STATE", str(folder / "state"))
        torch.set_num_threads(1)
        write_task(folder / "task")
        write_genotype(folder / "genotype.json")
        write_recipe(
            folder / "recipe.toml",
            steps=110,
            learning_rate=0.01,
            precision="fp32",
            augmentation={"rotation": 0, "scaling": 0},
        )
        for fold in (0, 1):
            assert retrain(folder, f"run{fold}", fold).code == 0
        said = publish(folder, "balls", "run0")
        assert said.code == 0, said.err
        assert run_cli("zoo", "add", folder / "out" / "balls").code == 0
        yield folder


def retrain(folder: Path, run: str, fold: int) -> Said:
    words = ["--genotype", folder / "genotype.json", "--task", folder / "recipe.toml", "--data", folder / "task"]
    return run_cli("retrain", *words, "--out", folder / run, "--fold", fold)


def publish(folder: Path, name: str, *runs: str, data: str = "task") -> Said:
    words = [word for run in runs for word in ("--run", folder / run)]
    return run_cli("publish", *words, "--name", name, "--data", folder / data, "--out", folder / "out")


def metrics(place: Path) -> Any:
    return json.loads((place / "out" / "balls" / "metrics.json").read_text())


def evaluated(place: Path, *words: object) -> Any:
    said = run_cli("evaluate", *words, "--data", place / "task", "--json")
    assert said.code == 0, said.err
    return json.loads(said.out)


def test_a_published_entry_is_complete_and_verified_wherever_it_lies(place: Path) -> None:
    entry = place / "out" / "balls"
    assert {path.name for path in entry.iterdir()} == FILES | {SUMS_FILE}
    assert [path.name for path in (place / "out").iterdir() if path.name.startswith(".")] == []
    for name in ("balls", f"{entry}"):
        assert run_cli("zoo", "verify", name).out == f"{name}: verified, {len(FILES)} files\n"
    listed = json.loads(run_cli("zoo", "list", "--json").out)
    assert [(row["name"], row["origin"], row["members"]) for row in listed] == [("balls", "added", 1)]


def test_the_weights_that_ship_are_the_weights_that_were_measured(place: Path) -> None:
    digest = sha256_file(place / "state" / "zoo" / "balls" / "model.onnx")
    assert metrics(place)["onnx_sha256"] == {"model.onnx": digest}
    parity = json.loads((place / "out" / "balls" / "parity.json").read_text())
    assert {c["onnx_sha256"] for c in parity["comparisons"]} == {digest}
    assert {c["engine"] for c in parity["comparisons"]} == {"onnx", "openvino"}
    again = evaluated(place, "--model", "balls", "--fold", 0)
    assert again["onnx_sha256"] == {"model.onnx": digest}


def test_the_entry_scores_again_what_its_metrics_say(place: Path) -> None:
    again = evaluated(place, "--model", "balls", "--fold", 0)
    written = metrics(place)
    assert again["engine"] == written["engine"]
    assert again["summary"] == written["summary"]
    assert again["cases"] == written["cases"]
    assert written["summary"]["mean"]["dice"] > 0.8
    assert f"{written['summary']['mean']['dice']:.4f}" in (place / "out" / "balls" / "card.md").read_text()
    other = evaluated(place, "--model", "balls", "--engine", "onnx")
    assert other["engine"] == "onnx"
    assert set(other["cases"]) == set(written["cases"])  # without --fold: all unseen cases, which are the same here


def test_torch_scores_what_the_exported_network_scores(place: Path) -> None:
    run = evaluated(place, "--run", place / "run0")
    assert (run["engine"], run["fold"]) == ("torch", 0)
    for case, scores in metrics(place)["cases"].items():
        for label in ("1", "2"):
            assert run["cases"][case][label]["dice"] == pytest.approx(scores[label]["dice"], abs=0.01)


def test_segmenting_a_case_gives_the_dice_of_the_metrics(place: Path, tmp_path: Path) -> None:
    for case, scores in metrics(place)["cases"].items():
        out = tmp_path / f"{case}.nii.gz"
        scan, label = (place / "task" / part / f"{case}.nii.gz" for part in ("imagesTr", "labelsTr"))
        said = run_cli("segment", scan, "--model", "balls", "-o", out, "--engine", "openvino", "--json")
        assert said.code == 0, said.err
        found, truth = (np.asanyarray(nibabel.load(path).dataobj) for path in (out, label))
        for value in (1, 2):
            ours, theirs = found == value, truth == value
            dice = 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())
            assert scores[str(value)]["dice"] == pytest.approx(dice, abs=1e-9)
        assert json.loads(said.out)["cases"][0]["parity"] == "certified by the entry"


def test_an_entry_is_not_measured_on_what_it_was_trained_on(place: Path, tmp_path: Path) -> None:
    for words in (("--model", "balls"), ("--run", place / "run0")):
        said = run_cli("evaluate", *words, "--data", place / "task", "--fold", 1)
        assert said.code == 1
        assert "[cases-seen]" in said.err
    renamed = tmp_path / "renamed"
    shutil.copytree(place / "task", renamed)
    for part in ("imagesTr", "labelsTr"):
        for path in list((renamed / part).iterdir()):
            path.rename(path.with_name(path.name.replace("ball", "other")))
    write_description(renamed, [f"other_{n:03}" for n in range(10)])
    for words in (("--model", "balls"), ("--run", place / "run0")):
        said = run_cli("evaluate", *words, "--data", renamed, "--fold", 1)
        assert "[cases-seen]" in said.err


def test_the_parity_windows_are_real_and_every_engine_gives_their_logits(place: Path) -> None:
    entry = load_entry("balls")
    stored = np.load(entry.folder / "parity_inputs.npz", allow_pickle=False)
    assert stored["windows"].std() > 0.5
    for engine in ("onnx", "openvino"):
        [session] = open_sessions(entry, windows=1, engine=engine, threads=1)
        for window, logits in zip(stored["windows"], stored["logits0"], strict=True):
            found = session.result(session.submit(window[np.newaxis]))[0]
            np.testing.assert_allclose(found, logits, atol=1e-3)
        assert parity_status(entry, session.info) == "certified by the entry"


def test_a_network_is_exported_from_its_entry_unchanged_and_from_its_run_anew(place: Path, tmp_path: Path) -> None:
    said = run_cli("export", "balls", "--onnx", "-o", tmp_path, "--json")
    assert json.loads(said.out)["files"] == [str(tmp_path / "balls-model.onnx")]
    shipped = (tmp_path / "balls-model.onnx").read_bytes()
    assert shipped == (place / "out" / "balls" / "model.onnx").read_bytes()
    run, data = place / "run0", place / "task"
    assert run_cli("export", "--run", run, "--data", data, "--onnx", "-o", tmp_path).code == 0
    written = (tmp_path / "model.onnx").read_bytes()
    check_onnx(written, "model.onnx")
    assert {c["engine"] for c in json.loads((tmp_path / "parity.json").read_text())["comparisons"]} == {
        "onnx",
        "openvino",
    }
    _, network = trained_network(run)
    batch = torch.randn(2, 1, 12, 12, 12)
    with torch.inference_mode():
        expected = network(batch).numpy()
    for data_bytes in (shipped, written):
        session = onnxruntime.InferenceSession(data_bytes, providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, {"scan": batch.numpy()})[0], expected, atol=1e-3)


def test_a_run_is_exported_in_half_precision_with_its_proof(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINTS_STATE", str(tmp_path / "state"))
    run, data = place / "run0", place / "task"
    words = ["--run", run, "--data", data, "--onnx", "--precision", "fp16", "-o", tmp_path, "--json"]
    said = run_cli("export", *words)
    assert said.code == 0, said.err
    document = json.loads(said.out)
    assert document["files"] == [str(tmp_path / "run0-model-onnx-fp16.onnx")]
    [measured] = document["measured"]
    assert measured["comparison"]["label_agreement"] >= 0.999
    assert measured["cases"] == 2  # of its fold, not trained on
    assert all(abs(change) <= 0.005 for change in measured["dice_change"].values())
    assert len(document["certificates"]) == 1


def test_an_exported_network_carries_no_path_of_the_machine_that_made_it(place: Path) -> None:
    data = (place / "out" / "balls" / "model.onnx").read_bytes()
    home = Path(torch.__file__).parents[1]
    for secret in (str(home), str(Path(__file__).parents[2]), str(place), "site-packages", ".py"):
        assert secret.encode() not in data
    names = {tensor.name for tensor in onnx.load_from_string(data).graph.initializer}
    assert "head.classify.weight" in names


def spoilt(place: Path, folder: Path) -> Path:
    """Return a copy of the run whose logits are so large that no engine is within the limit of torch."""
    run = Path(shutil.copytree(place / "run0", folder))
    weights = load_file(run / "weights.safetensors")
    weights["head.classify.weight"] *= 1e6
    save_file(weights, run / "weights.safetensors")
    return run


def test_when_parity_fails_nothing_is_written(place: Path, tmp_path: Path) -> None:
    run = spoilt(place, place / "spoilt")
    before = sorted(path.name for path in (place / "out").rglob("*"))
    said = publish(place, "wrong", "spoilt")
    assert said.code == 1
    assert "[parity-failed]" in said.err
    assert sorted(path.name for path in (place / "out").rglob("*")) == before
    said = run_cli("export", "--run", run, "--data", place / "task", "--onnx", "-o", tmp_path / "exported")
    assert "[parity-failed]" in said.err
    assert list((tmp_path / "exported").iterdir()) == []


def training_cases(place: Path) -> tuple[Case, ...]:
    return read_dataset(place / "task").fold(0)[0]


@pytest.mark.parametrize("limits", [{"max_abs_logit": 1e-12}, {"min_label_agreement": 1.5}])
def test_an_absurdly_small_limit_is_not_kept_by_anybody(place: Path, limits: dict[str, float]) -> None:
    config, network = trained_network(place / "run0")
    spec = entry_of([config], "x").model_copy(update={"parity": ParityLimits.model_validate(limits)})
    with pytest.raises(DatasetError) as caught:
        export_network(network, spec, training_cases(place))
    assert caught.value.code == "parity-failed"


def test_two_runs_make_an_ensemble_that_was_measured_on_nothing_it_saw(place: Path, tmp_path: Path) -> None:
    assert publish(place, "pair", "run0", "run1").code == 0
    entry = load_entry(place / "out" / "pair")
    assert [member.fold for member in entry.spec.members] == [0, 1]
    assert entry.digests["model0.onnx"] != entry.digests["model1.onnx"]
    assert entry.spec.training is not None
    assert set(entry.spec.training.cases) == {case.id for case in read_dataset(place / "task").cases}
    written = json.loads((entry.folder / "metrics.json").read_text())
    assert written["summary"] is None
    card = (entry.folder / "card.md").read_text()
    assert "no unbiased score" in card
    assert "--fold 0 --seed 0 --out runs/pair-0" in card
    assert "--fold 1 --seed 0 --out runs/pair-1" in card
    assert "--run runs/pair-0 --run runs/pair-1 --name pair" in card
    scan = place / "task" / "imagesTr" / "ball_000.nii.gz"
    said = run_cli("segment", scan, "--model", str(entry.folder), "-o", tmp_path / "o.nii.gz", "--json")
    assert len(json.loads(said.out)["cases"][0]["model"]["weights_sha256"]) == 2


def test_an_entry_brings_the_recipe_it_was_trained_with_and_the_card_names_it(place: Path) -> None:
    entry = place / "out" / "balls"
    assert read_recipe(entry / "recipe.toml") == trained_network(place / "run0")[0].recipe
    assert "--task zoo/balls/recipe.toml" in (entry / "card.md").read_text()


def test_a_planned_recipe_is_not_published_before_a_person_has_completed_its_words(place: Path) -> None:
    shutil.copytree(place / "run0", place / "unsaid")
    path = place / "unsaid" / "config.toml"
    path.write_text(re.sub('licence = ".*"', f'licence = "{UNSAID["licence"]}"', path.read_text()))
    said = publish(place, "unsaid", "unsaid")
    assert said.code == 1
    assert "words for licence" in said.err
    assert "[recipe-invalid]" in said.err
    assert not (place / "out" / "unsaid").exists()


def test_an_ensemble_of_one_fold_keeps_its_fold(place: Path) -> None:
    config, _ = trained_network(place / "run0")
    other, _ = trained_network(place / "run1")
    again = config.model_copy(update={"seed": 7})
    folds = [entry_of(list(configs), "x").training for configs in ((config, again), (config, other))]
    assert [training.fold for training in folds if training] == [0, None]


def test_what_cannot_be_published_is_refused_and_leaves_nothing(place: Path) -> None:
    before = sorted(path.name for path in (place / "out").rglob("*"))
    shutil.copytree(place / "run0", place / "unfinished")
    (place / "unfinished" / "weights.safetensors").unlink()
    shutil.copytree(place / "run1", place / "other")
    config = (place / "other" / "config.toml").read_text()
    (place / "other" / "config.toml").write_text(config.replace('licence = "CC0-1.0"', 'licence = "other"'))
    write_task(place / "strangers", 5, seed=9)
    for part in ("imagesTr", "labelsTr"):
        for path in list((place / "strangers" / part).iterdir()):
            path.rename(path.with_name(path.name.replace("ball", "other")))
    write_description(place / "strangers", [f"other_{n:03}" for n in range(5)])
    calls = [
        (("balls", "run0"), "task", "entry-exists"),
        (("Bad Name", "run0"), "task", "usage"),
        (("../up", "run0"), "task", "usage"),
        (("x", "unfinished"), "task", "checkpoint-invalid"),
        (("x", "run0", "other"), "task", "run-mismatch"),
        (("x", "run0"), "strangers", "run-mismatch"),
        (("x", "missing"), "task", "checkpoint-invalid"),
    ]
    for words, data, code in calls:
        said = publish(place, *words, data=data)
        assert said.code == (2 if code in ("usage", "entry-exists") else 1)
        assert f"[{code}]" in said.err
    assert sorted(path.name for path in (place / "out").rglob("*")) == before


def card_of(place: Path, config: RunConfig, written: dict[str, Any], *others: RunConfig) -> str:
    """Return the card that a run of these figures would get, alone or with others."""
    parity = Certificate.model_validate_json((place / "out" / "balls" / "parity.json").read_text())
    nothing = np.zeros((0, 1, 12, 12, 12), np.float32)
    exported = Exported(b"", nothing, nothing, parity.comparisons)
    configs = [config, *others]
    return write_card(entry_of(configs, "balls"), configs, written, [exported], Described(1, 1.0, "found in a drawer"))


def test_a_structure_that_is_in_no_case_has_a_dash_on_the_card(place: Path) -> None:
    config, _ = trained_network(place / "run0")
    written = metrics(place)
    written["summary"]["labels"]["2"] = {"dice": None, "nsd": None, "left_out": 2}
    assert "| Part 2 | - | - | 1 mm |" in card_of(place, config, written)


def test_the_card_of_a_run_of_two_processes_counts_the_patches_of_both_and_repeats_it_in_two(place: Path) -> None:
    config, _ = trained_network(place / "run0")
    config = config.model_copy(update={"processes": 2})
    each = config.recipe.retraining.batch
    card = card_of(place, config, metrics(place))
    assert f"steps of {2 * each} patches ({each} in each of 2 processes), AdamW" in card
    assert "torchrun --nproc-per-node 2 -m dints_deploy retrain --genotype" in card


def test_the_card_of_a_taught_run_names_its_teachers_and_where_it_began(place: Path) -> None:
    config, _ = trained_network(place / "run0")
    plain = card_of(place, config, metrics(place))
    assert "earlier run" not in plain
    assert "`genotype.json`: found in a drawer." in plain
    config = config.model_copy(update={"origin": "ab12", "teachers": ("cd34", "ef56")})
    card = card_of(place, config, metrics(place))
    assert "those of an earlier run (SHA-256 ab12)" in card
    assert "0.5 of the target was the mean opinion of earlier runs (SHA-256 of their weights: cd34, ef56)" in card
    assert "--from RUN --teacher RUN --teacher RUN --out runs/balls" in card
    other = config.model_copy(update={"fold": 1, "teachers": ("0123",), "origin": None, "known": {"case": "45"}})
    both = card_of(place, config, metrics(place), other)
    assert "- Fold 0, seed 0: 0.5 of the target was the mean opinion of earlier runs" in both
    assert (
        "- Fold 1, seed 0: 0.5 of the target was the mean opinion of earlier runs (SHA-256 of their weights: 0123)"
        in both
    )
    assert "- Fold 1, seed 0: Those runs knew 1 further cases" in both


def test_a_case_without_any_label_still_gives_a_parity_window(place: Path, tmp_path: Path) -> None:
    config, _ = trained_network(place / "run0")
    case = training_cases(place)[0]
    label = read_nifti(case.label)
    empty = scan_file(tmp_path, Volume(np.zeros_like(label.data), label.affine))
    [window] = real_windows((replace(case, label=empty),), entry_of([config], "x"), 2)
    assert window.shape == (1, 12, 12, 12)
    assert window.std() > 0.5
