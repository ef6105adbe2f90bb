"""Whatever is wrong with the data of a task, a command says it in one line that names the case, and trains nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dints_deploy.imaging.nifti import read_nifti, write_nifti
from dints_deploy.imaging.volume import Volume
from tests.tiny_entry import Said, run_cli
from tests.tiny_task import write_description, write_genotype, write_recipe, write_task

IDS = [f"ball_{n:03}" for n in range(10)]
BAD = "ball_004"
"""In the training part of fold 0."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny task, its recipe and a genotype, that no test changes."""
    folder = tmp_path_factory.mktemp("whole")
    write_task(folder / "task")
    write_genotype(folder / "genotype.json")
    write_recipe(folder / "recipe.toml", precision="fp32", steps=2)
    return folder


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "place"))


def label_is_missing(task: Path) -> None:
    (task / "labelsTr" / f"{BAD}.nii.gz").unlink()


def label_has_another_value(task: Path) -> None:
    change(task / "labelsTr", lambda data: np.where(data == 2, 7, data))


def label_has_another_shape(task: Path) -> None:
    change(task / "labelsTr", lambda data: data[:, 1:])


def image_is_cut_short(task: Path) -> None:
    path = task / "imagesTr" / f"{BAD}.nii.gz"
    path.write_bytes(path.read_bytes()[:500])


def image_holds_nan(task: Path) -> None:
    change(task / "imagesTr", lambda data: np.where(data > data.max() - 0.1, np.nan, data))


def label_has_two_channels(task: Path) -> None:
    path = task / "labelsTr" / f"{BAD}.nii.gz"
    label = read_nifti(path)
    write_nifti(path, Volume(np.concatenate([label.data] * 2), label.affine))


def image_is_a_label_map(task: Path) -> None:
    change(task / "imagesTr", lambda data: np.round(np.clip(data, 0, 3)))


def image_has_two_channels(task: Path) -> None:
    path = task / "imagesTr" / f"{BAD}.nii.gz"
    image = read_nifti(path)
    write_nifti(path, Volume(np.concatenate([image.data] * 2), image.affine))


def change(folder: Path, to: Callable[[np.ndarray], np.ndarray]) -> None:
    path = folder / f"{BAD}.nii.gz"
    volume = read_nifti(path)
    write_nifti(path, Volume(to(volume.data[0]).astype(volume.data.dtype)[np.newaxis], volume.affine))


DAMAGES = [
    (label_is_missing, "case-invalid", BAD, "label"),
    (label_has_another_value, "case-invalid", BAD, "7"),
    (label_has_another_shape, "case-invalid", BAD, "one grid"),
    (image_is_cut_short, "case-invalid", BAD, "gzip"),
    (image_holds_nan, "case-invalid", BAD, "NaN"),
    (image_has_two_channels, "case-invalid", BAD, "channel"),
    (label_has_two_channels, "case-invalid", BAD, "one channel"),
    (image_is_a_label_map, "case-invalid", BAD, "label map"),
]


def retrain(place: Path, *words: object) -> Said:
    task = ["--genotype", place / "genotype.json", "--task", place / "recipe.toml", "--data", place / "task"]
    return run_cli("retrain", *task, "--out", place / "run", *words)


def search(place: Path, *words: object) -> Said:
    task = ["--task", place / "recipe.toml", "--data", place / "task", "--out", place / "found"]
    small = ["--steps", 2, "--blocks", 2, "--depths", 2, "--width", 0.125, "--precision", "fp32"]
    return run_cli("search", *task, *small, "--memory", "reference", *words)


def in_one_line(said: Said, code: str, *words: str) -> None:
    """Assert that a command failed with one line that has the code and the words."""
    assert said.code == 1, said.err
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert all(word in said.err for word in (f"[{code}]", *words)), said.err


@pytest.mark.parametrize(("damage", "code", "case", "word"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bad_case_is_named_by_training_search_and_check(
    damage: Callable[[Path], None], code: str, case: str, word: str, place: Path
) -> None:
    damage(place / "task")
    in_one_line(retrain(place), code, case, word)
    in_one_line(search(place), code, case, word)
    assert not (place / "run" / "weights.safetensors").exists()
    assert not (place / "found" / "genotype.json").exists()
    said = run_cli("data", "check", place / "task", "--json")
    assert said.code == 1
    report = json.loads(said.out)
    if "error" in report:
        assert case in report["error"]["message"]
    else:
        assert [found["id"] for found in report["cases"] if found["fault"]] == [case]


def test_the_same_commands_run_once_the_bad_case_is_mended(place: Path) -> None:
    """Nothing lies in the run folder that would refuse the mended case."""
    path = place / "task" / "imagesTr" / f"{BAD}.nii.gz"
    kept = path.read_bytes()
    image_holds_nan(place / "task")
    in_one_line(retrain(place), "case-invalid", BAD)
    in_one_line(search(place), "case-invalid", BAD)
    path.write_bytes(kept)
    for said in (retrain(place), search(place)):
        assert said.code == 0, said.err


def test_a_class_that_no_training_case_shows_is_named(place: Path) -> None:
    for case in IDS:
        path = place / "task" / "labelsTr" / f"{case}.nii.gz"
        label = read_nifti(path)
        write_nifti(path, Volume(np.minimum(label.data, 1), label.affine))
    in_one_line(retrain(place), "dataset-invalid", "label 2 (Part 2)", "ball_")
    in_one_line(search(place), "dataset-invalid", "label 2 (Part 2)", "ball_")
    said = run_cli("data", "check", place / "task")
    assert (said.code, "label 2 (core) is in no case" in said.out) == (1, True)


def test_a_folder_that_is_no_task_a_fold_that_is_none_and_other_channels_are_named(place: Path) -> None:
    in_one_line(retrain(place, "--fold", 5), "fold-unknown", "0 to 4")
    in_one_line(search(place, "--fold", 5), "fold-unknown", "0 to 4")
    write_description(place / "task", IDS, modality={"0": "T1", "1": "T2"})
    in_one_line(retrain(place), "dataset-invalid", "channels", "T2")
    in_one_line(search(place), "dataset-invalid", "channels", "T2")
    write_description(place / "task", IDS, labels={"0": "background", "1": "shell"})
    in_one_line(retrain(place), "dataset-invalid", "labels", "shell")
    write_description(place / "task", IDS[:4])
    in_one_line(retrain(place), "fold-unknown", "at least 5")
    (place / "task" / "dataset.json").write_text("{")
    in_one_line(retrain(place), "dataset-invalid", "dataset.json")
    (place / "task" / "dataset.json").unlink()
    in_one_line(retrain(place), "dataset-invalid", "no dataset.json")
    in_one_line(search(place), "dataset-invalid", "no dataset.json")
    assert run_cli("data", "check", place / "task").code == 1


def test_channels_or_labels_in_another_order_are_noticed(place: Path) -> None:
    recipe = place / "recipe.toml"
    recipe.write_text(recipe.read_text() + '\n[dataset]\nmodality = ["MRI"]\nlabels = ["core", "shell"]\n')
    in_one_line(retrain(place), "dataset-invalid", "labels in this order", "core")


def test_the_data_of_another_task_are_refused_until_a_person_says_that_the_names_mean_the_same(place: Path) -> None:
    recipe = place / "recipe.toml"
    recipe.write_text(recipe.read_text() + '\n[dataset]\nmodality = ["CT"]\nlabels = ["Shell", "core"]\n')
    for said in (retrain(place), search(place)):
        in_one_line(said, "dataset-invalid", "CT", "MRI", "--set 'dataset.modality=[\"MRI\"]'")
    said = run_cli("data", "plan", place / "task", "--task", recipe, "-o", place / "plan.toml")
    in_one_line(said, "dataset-invalid", "CT", "MRI")
    assert not (place / "plan.toml").exists()
    mended = ("--set", 'dataset.modality=["MRI"]')
    assert run_cli("data", "plan", place / "task", "--task", recipe, "-o", place / "plan.toml", *mended).code == 0
    assert retrain(place, *mended).code == 0


def test_a_case_that_the_network_will_refuse_is_named_before_anything_is_computed(place: Path) -> None:
    path = place / "task" / "imagesTr" / f"{BAD}.nii.gz"
    image = read_nifti(path)
    write_nifti(path, Volume(image.data, np.diag([90.0, 90.0, 90.0, 1.0])))
    for said in (retrain(place), search(place)):
        in_one_line(said, "case-invalid", BAD, "found 90", "[accepts]")
    assert not (place / "run").exists()
    assert not (place / "found").exists()


def test_a_check_tells_every_fault_with_its_case_on_a_narrow_terminal(place: Path) -> None:
    image_is_cut_short(place / "task")
    long = place / "task" / "imagesTr" / "ball_007.nii.gz"
    long.write_bytes(b"")
    said = run_cli("data", "check", place / "task")
    assert (said.code, "10 cases, 2 with a fault" in said.out) == (1, True)
    told = " ".join(said.out.split())
    assert f"case {BAD}: expected a whole gzip stream" in told
    assert "case ball_007: expected a NIfTI image, found 0 bytes" in told
    long.unlink()
    (place / "task" / "labelsTr" / "ball_001.nii.gz").unlink()
    in_one_line(run_cli("data", "check", place / "task"), "case-invalid", "ball_007", "ball_001")


def test_a_plan_that_cannot_be_made_is_refused_in_one_line(place: Path) -> None:
    words = ["data", "plan", place / "task", "-o", place / "plan.toml"]
    in_one_line(run_cli(*words, "--task", "brain"), "dataset-invalid", "T2w")
    for option, value in (("--channels", "-1"), ("--max-memory", "0")):
        said = run_cli(*words, option, value)
        assert said.code == 2, said.err
        assert option in said.err
    assert not (place / "plan.toml").exists()
