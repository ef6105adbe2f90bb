"""Folds are trained once, summed up by hand, published together, and a leaderboard gets what it asks for."""

from __future__ import annotations

import gzip
import json
import shutil
import statistics
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from dints_deploy.catalog.catalog import load_entry
from dints_deploy.files import sha256_file
from dints_deploy.imaging.nifti import read_nifti, write_nifti
from dints_deploy.imaging.volume import Volume
from tests.tiny_entry import Said, run_cli
from tests.tiny_task import write_description, write_genotype, write_recipe, write_task

# torch 2.13 calls its own deprecated isinstance check while it exports
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a task, two unlabelled cases among it, and a cross-validation on its five folds."""
    folder = tmp_path_factory.mktemp("folds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DINTS_ZOO", str(folder / "zoo"))
        patch.setenv("DINTS_STATE", str(folder / "state"))
        torch.set_num_threads(1)
        task = write_task(folder / "task")
        (task / "imagesTs").mkdir()
        for number in range(2):  # stored from right to left and from front to back, as much of MSD is
            image = read_nifti(task / "imagesTr" / f"ball_00{number}.nii.gz")
            affine = np.array([[-1.0, 0, 0, 90], [0, -1.0, 0, 80], [0, 0, 1.0, -7], [0, 0, 0, 1]])
            write_nifti(task / "imagesTs" / f"ball_1{number}.nii.gz", Volume(image.data, affine))
        unlabelled = [f"./imagesTs/ball_1{number}.nii.gz" for number in (1, 0)]
        write_description(task, [f"ball_{number:03}" for number in range(10)], test=unlabelled)
        write_genotype(folder / "genotype.json")
        write_recipe(folder / "recipe.toml", steps=30, learning_rate=0.01, precision="fp32")
        said = crossval(folder)
        assert said.code == 0, said.err
        yield folder


def crossval(folder: Path, *words: object) -> Said:
    task = ["--genotype", folder / "genotype.json", "--task", folder / "recipe.toml", "--data", folder / "task"]
    return run_cli("crossval", *task, "--out", folder / "cv", *words)


def document(path: Path) -> Any:
    return json.loads(path.read_text())


def test_every_case_is_measured_once_by_a_network_that_never_saw_it(place: Path) -> None:
    measured = [document(place / "cv" / f"fold{fold}" / "evaluation.json")["cases"] for fold in range(5)]
    assert sorted(case for cases in measured for case in cases) == [f"ball_{n:03}" for n in range(10)]


def test_the_summary_is_mean_and_spread_of_the_folds(place: Path) -> None:
    folds = [document(place / "cv" / f"fold{fold}" / "evaluation.json") for fold in range(5)]
    summary = document(place / "cv" / "crossval.json")
    for label in ("1", "2"):
        means = [fold["summary"]["labels"][label]["dice"] for fold in folds]
        cases = [case[label]["dice"] for fold in folds for case in fold["cases"].values()]
        found = summary["labels"][label]["dice"]
        assert found["mean"] == pytest.approx(statistics.fmean(means))
        assert found["deviation"] == pytest.approx(statistics.stdev(means))
        assert found["over_cases"] == pytest.approx(statistics.fmean(cases))
    assert summary["folds"] == {str(n): fold["summary"]["mean"]["dice"] for n, fold in enumerate(folds)}


def test_folds_that_are_done_are_kept_and_others_made_up_for(place: Path) -> None:
    kept = sha256_file(place / "cv" / "fold1" / "checkpoint.pt")
    evaluation = place / "cv" / "fold3" / "evaluation.json"
    before = document(evaluation)
    changed = before | {"note": "kept"}
    (place / "cv" / "fold1" / "evaluation.json").write_text(
        json.dumps(document(place / "cv" / "fold1" / "evaluation.json") | {"note": "kept"})
    )
    evaluation.unlink()
    (place / "cv" / "fold4" / "weights.safetensors").unlink()
    said = crossval(place, "--json")
    assert said.code == 0, said.err
    assert document(evaluation) == before != changed
    assert document(place / "cv" / "fold1" / "evaluation.json")["note"] == "kept"
    assert (place / "cv" / "fold4" / "weights.safetensors").exists()
    assert sha256_file(place / "cv" / "fold1" / "checkpoint.pt") == kept
    assert json.loads(said.out)["folds"] == document(place / "cv" / "crossval.json")["folds"]


def test_one_fold_more_is_summed_up_with_those_that_are_done_and_a_lost_checkpoint_costs_nothing(place: Path) -> None:
    before = document(place / "cv" / "crossval.json")
    for fold in (1, 3):
        (place / "cv" / f"fold{fold}" / "checkpoint.pt").unlink()
    history = (place / "cv" / "fold1" / "metrics.jsonl").read_bytes()
    weights = sha256_file(place / "cv" / "fold1" / "weights.safetensors")
    assert crossval(place, "--fold", 1).code == 0
    assert document(place / "cv" / "crossval.json") == before
    assert (place / "cv" / "fold1" / "metrics.jsonl").read_bytes() == history
    assert sha256_file(place / "cv" / "fold1" / "weights.safetensors") == weights


def test_what_a_later_fold_would_refuse_is_refused_before_another_is_trained(place: Path) -> None:
    task = ["--genotype", place / "genotype.json", "--task", place / "recipe.toml", "--data", place / "task"]
    words = ["crossval", *task, "--out", place / "other"]
    said = run_cli(*words, "--fold", 0, "--fold", 7)
    assert (said.code, "[fold-unknown]" in said.err) == (1, True)
    said = run_cli(*words, "--set", "accepts.extent_max=[13.5,20,20]")
    assert (said.code, "[case-invalid]" in said.err, "ball_000" in said.err) == (1, True, True)
    assert not (place / "other").exists()


def test_a_finished_fold_of_another_seed_is_refused_before_a_new_one_is_trained(place: Path) -> None:
    shutil.copytree(place / "cv" / "fold3", place / "mixed" / "fold3")
    task = ["--genotype", place / "genotype.json", "--task", place / "recipe.toml", "--data", place / "task"]
    said = run_cli("crossval", *task, "--out", place / "mixed", "--fold", 0, "--seed", 1)
    assert (said.code, "[run-mismatch]" in said.err) == (1, True)
    assert not (place / "mixed" / "fold0").exists()
    (place / "bare").mkdir()
    shutil.copyfile(place / "cv" / "fold3" / "weights.safetensors", place / "bare" / "weights.safetensors")
    said = run_cli("retrain", *task, "--out", place / "bare", "--resume")
    assert (said.code, "[run-mismatch]" in said.err) == (1, True)


def test_another_configuration_does_not_continue_the_folds(place: Path) -> None:
    said = crossval(place, "--set", "retraining.ema = 0.9")
    assert (said.code, "run-mismatch" in said.err) == (1, True)


def test_several_processes_are_told_to_take_a_fold_each(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = crossval(place)
    assert (said.code, "retrain --fold N" in said.err) == (2, True)


def test_the_folds_are_one_entry_that_nobody_can_measure_on_what_it_saw(place: Path) -> None:
    runs = [word for fold in range(2) for word in ("--run", place / "cv" / f"fold{fold}")]
    said = run_cli("publish", *runs, "--name", "folds", "--data", place / "task", "--out", place / "zoo")
    assert said.code == 0, said.err
    entry = load_entry("folds")
    assert [member.fold for member in entry.spec.members] == [0, 1]
    assert entry.spec.training is not None
    assert len(entry.spec.training.cases) == 10
    assert document(place / "zoo" / "folds" / "metrics.json")["summary"] is None
    refused = run_cli("evaluate", "--model", "folds", "--data", place / "task", "--fold", 0)
    assert (refused.code, "cases-seen" in refused.err) == (1, True)
    scan = place / "task" / "imagesTs" / "ball_10.nii.gz"
    assert run_cli("segment", scan, "--model", "folds", "-o", place / "seg.nii.gz").code == 0
    submitted(place, place / "folds.zip", "--model", "folds")
    with zipfile.ZipFile(place / "folds.zip") as archive:
        assert archive.read("Balls/ball_10.nii.gz") == (place / "seg.nii.gz").read_bytes()


def submitted(place: Path, out: Path, *words: object) -> None:
    said = run_cli("evaluate", *words, "--data", place / "task", "--submission", out, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out) == {"submission": str(out), "task": "Balls", "cases": 2}


def test_a_submission_holds_whole_numbers_on_every_scans_own_grid(place: Path) -> None:
    run = ["--run", place / "cv" / "fold0"]
    submitted(place, place / "out.zip", *run)
    submitted(place, place / "out.tar.gz", *run)
    names = ["Balls/ball_10.nii.gz", "Balls/ball_11.nii.gz"]
    with zipfile.ZipFile(place / "out.zip") as archive, tarfile.open(place / "out.tar.gz") as tar:
        assert archive.namelist() == tar.getnames() == names
        for name in names:
            data = archive.read(name)
            assert tar.extractfile(name).read() == data  # type: ignore[union-attr]
            labels = nibabel.Nifti1Image.from_bytes(gzip.decompress(data))
            scan = nibabel.load(place / "task" / "imagesTs" / Path(name).name)
            assert labels.shape == scan.shape
            assert np.allclose(labels.affine, scan.affine)
            assert np.asarray(labels.dataobj).dtype == np.uint8
            assert set(np.unique(labels.dataobj)) == {0, 1, 2}


def test_equal_predictions_give_equal_archives(place: Path) -> None:
    for name in ("one.zip", "two.zip", "one.tar.gz", "two.tar.gz"):
        submitted(place, place / name, "--run", place / "cv" / "fold0")
    for ending in ("zip", "tar.gz"):
        assert (place / f"one.{ending}").read_bytes() == (place / f"two.{ending}").read_bytes()


def test_a_bad_unlabelled_case_is_named_and_leaves_no_archive(place: Path, tmp_path: Path) -> None:
    task = tmp_path / "task"
    (task / "imagesTs").mkdir(parents=True)
    (task / "imagesTs" / "ball_10.nii.gz").write_bytes(b"no scan")
    write_description(task, [], test=["./imagesTs/ball_10.nii.gz"])
    words = ["evaluate", "--run", place / "cv" / "fold0", "--data", task, "--submission"]
    said = run_cli(*words, tmp_path / "out.zip")
    assert (said.code, "case ball_10" in said.err) == (3, True)
    assert [path.name for path in tmp_path.iterdir()] == ["task"]
    assert run_cli(*words, tmp_path / "out.rar").code == 2
    write_description(task, [], test=[])
    assert "found none" in run_cli(*words, tmp_path / "out.zip").err
    write_description(task, [], test=["../../etc/passwd"])
    assert "inside" in run_cli(*words, tmp_path / "out.zip").err
