"""Datasets in MSD layout: the field's five folds, refusals that name the case, and no score on what was trained on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import KFold  # type: ignore[import-untyped]

from dints_deploy.catalog.dataset import Case, Dataset, read_case, read_dataset
from dints_deploy.catalog.entry import Entry, Training
from dints_deploy.errors import DatasetError, DintsError, ScanRefused
from dints_deploy.files import sha256_file
from dints_deploy.imaging.nifti import read_nifti, write_nifti
from dints_deploy.imaging.volume import Volume
from dints_deploy.runtime.engine import Session
from dints_deploy.runtime.evaluate import evaluate, unseen_cases
from dints_search.dataset import load_cases
from tests.tiny_entry import NumpyEngine, entry_fields, random_network, threshold_network
from tests.tiny_task import tiny_recipe, write_description, write_task

LABELS = {1: "shell", 2: "core"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny task of ten cases that no test changes."""
    return write_task(tmp_path_factory.mktemp("whole") / "task")


@pytest.fixture
def task(whole: Path, tmp_path: Path) -> Path:
    """A tiny task of ten cases to damage."""
    return Path(shutil.copytree(whole, tmp_path / "task"))


def of_size(count: int) -> Dataset:
    """Return a dataset without files."""
    cases = tuple(Case(f"case_{n:03}", Path(f"{n}.nii.gz"), Path(f"{n}.nii.gz")) for n in range(count))
    return Dataset("T", Path(), ("MR",), LABELS, cases)


@pytest.mark.parametrize("count", [5, 6, 7, 9, 10, 11, 23, 64, 260])
def test_the_folds_are_those_of_scikit_learn(count: int) -> None:
    dataset = of_size(count)
    splits = KFold(5, shuffle=True, random_state=12345).split(np.arange(count))
    for fold, (training, validation) in enumerate(splits):
        ours = dataset.fold(fold)
        assert [case.id for case in ours[0]] == [f"case_{n:03}" for n in training]
        assert [case.id for case in ours[1]] == [f"case_{n:03}" for n in sorted(validation)]


@pytest.mark.parametrize(("count", "fold"), [(10, 5), (10, -1), (4, 0)])
def test_a_fold_that_does_not_exist_is_refused(count: int, fold: int) -> None:
    with pytest.raises(DatasetError) as caught:
        of_size(count).fold(fold)
    assert caught.value.code == "fold-unknown"


def test_cases_are_ordered_by_id_whatever_the_order_of_the_file(task: Path) -> None:
    cases = read_dataset(task).cases
    ids = [case.id for case in cases]
    assert ids == [f"ball_{n:03}" for n in range(10)]
    write_description(task, ids[::-1])
    assert read_dataset(task).cases == cases


def test_a_dataset_says_its_channels_and_labels_without_the_background(task: Path) -> None:
    ids = [case.id for case in read_dataset(task).cases]
    write_description(task, ids, modality={"1": "T2", "0": "T1"}, surplus="other people add keys")
    dataset = read_dataset(task)
    assert (dataset.channels, dataset.labels) == (("T1", "T2"), LABELS)


def refused(action: Callable[[], object], code: str, *said: str) -> None:
    """Assert that an action is refused with a code and words."""
    with pytest.raises(DatasetError) as caught:
        action()
    assert caught.value.code == code
    for word in said:
        assert word in caught.value.message


BAD_DESCRIPTIONS = ["", "{", "[]", "[" * 100_000, '{"name": "T"}', '{"name": 1, "training": 2}']


@pytest.mark.parametrize("text", BAD_DESCRIPTIONS, ids=lambda text: text[:20])
def test_a_description_that_is_no_msd_file_is_refused(task: Path, text: str) -> None:
    (task / "dataset.json").write_text(text)
    refused(lambda: read_dataset(task), "dataset-invalid", "dataset.json")


def test_a_folder_without_description_is_refused(tmp_path: Path) -> None:
    refused(lambda: read_dataset(tmp_path), "dataset-invalid", "dataset.json", str(tmp_path))


@pytest.mark.parametrize("changes", [{"labels": {"one": "a"}}, {"modality": {"MR": "MR"}}, {"training": []}])
def test_a_description_with_impossible_content_is_refused(task: Path, changes: dict[str, object]) -> None:
    write_description(task, ["ball_000"], **changes)
    refused(lambda: read_dataset(task), "dataset-invalid", "dataset.json")


def test_two_cases_of_one_id_are_refused_by_the_id(task: Path) -> None:
    write_description(task, ["ball_000", "ball_003", "ball_003"])
    refused(lambda: read_dataset(task), "dataset-invalid", "ball_003")


@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_missing_file_is_refused_by_its_case(task: Path, kind: str) -> None:
    (task / f"{kind}sTr" / "ball_004.nii.gz").unlink()
    refused(lambda: read_dataset(task), "case-invalid", "ball_004", kind)


@pytest.mark.parametrize("form", ["../secret/{}.nii.gz", "imagesTr/../../secret/{}.nii.gz", "{root}/secret/{}.nii.gz"])
@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_path_outside_the_dataset_is_refused_by_its_case(task: Path, kind: str, form: str) -> None:
    shutil.copytree(task / "imagesTr", task.parent / "secret")
    path = form.format("ball_002", root=task.parent)
    pair = {"image": "imagesTr/ball_002.nii.gz", "label": "labelsTr/ball_002.nii.gz"} | {kind: path}
    write_description(task, [], training=[pair])
    refused(lambda: read_dataset(task), "case-invalid", "ball_002")


def damage_labels(task: Path, change: Callable[[Volume], Volume]) -> Case:
    """Change the label file of one case."""
    case = read_dataset(task).cases[6]
    write_nifti(case.label, change(read_nifti(case.label)))
    return case


DAMAGES: dict[str, tuple[Callable[[Volume], Volume], str]] = {
    "an unknown value": (lambda v: Volume(v.data * 3, v.affine), "expected label values [1, 2], found [3, 6]"),
    "a negative value": (lambda v: Volume(-v.data.astype(np.int16), v.affine), "[-2, -1]"),
    "half a value": (lambda v: Volume(v.data.astype(np.float32) / 2, v.affine), "0.5"),
    "another shape": (lambda v: Volume(v.data[:, :-1], v.affine), "one grid"),
    "another place": (lambda v: Volume(v.data, v.affine + np.diag([0, 0, 0.5, 0])), "one grid"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_label_map_that_does_not_fit_is_refused_by_its_case(task: Path, damage: str) -> None:
    change, said = DAMAGES[damage]
    case = damage_labels(task, change)
    refused(lambda: read_case(case, LABELS), "case-invalid", "ball_006", said)


@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_file_that_cannot_be_read_is_refused_by_its_case(task: Path, kind: str) -> None:
    case = read_dataset(task).cases[6]
    path = case.image if kind == "image" else case.label
    path.write_bytes(path.read_bytes()[:-20])
    refused(lambda: read_case(case, LABELS), "case-invalid", "ball_006")


def test_a_scan_that_cannot_be_prepared_is_refused_by_its_case(task: Path, tmp_path: Path) -> None:
    case = read_dataset(task).cases[6]
    scan = read_nifti(case.image)
    write_nifti(case.image, Volume(np.full_like(scan.data, 7), scan.affine))
    preparation = tiny_recipe(tmp_path).preparation
    refused(lambda: load_cases([case], preparation, LABELS), "case-invalid", "ball_006", "one value")


def entry(trained_on: dict[str, str], fold: int | None = None) -> Entry:
    """Return an entry that was trained on these ids and digests."""
    spec = Entry.model_validate(entry_fields())
    return spec.model_copy(update={"training": Training(task="T", fold=fold, cases=trained_on)})


def test_cases_that_an_entry_was_trained_on_are_left_out_by_id_and_by_content(task: Path) -> None:
    dataset = read_dataset(task)
    known = entry({"ball_001": "0" * 64, "renamed": sha256_file(dataset.cases[2].image)})
    left = [case.id for case in unseen_cases(dataset, known, None)]
    assert left == [f"ball_{n:03}" for n in (0, *range(3, 10))]


@pytest.mark.parametrize("by", ["id", "content"])
def test_a_fold_that_holds_a_trained_case_is_refused_by_its_id(task: Path, by: str) -> None:
    dataset = read_dataset(task)
    training, validation = dataset.fold(1)
    digests = {case.id: sha256_file(case.image) for case in training}
    assert unseen_cases(dataset, entry(digests), 1) == validation
    known = validation[-1]
    digests |= {known.id: "0" * 64} if by == "id" else {"renamed": sha256_file(known.image)}
    refused(lambda: unseen_cases(dataset, entry(digests), 1), "cases-seen", known.id)


def test_an_entry_trained_on_everything_can_be_measured_on_nothing(task: Path) -> None:
    dataset = read_dataset(task)
    refused(lambda: unseen_cases(dataset, entry({c.id: "" for c in dataset.cases}), None), "cases-seen", "none")


def session(threshold: float) -> Session:
    network = threshold_network(threshold).onnx()
    return NumpyEngine().open(network, window=(12, 12, 12), batch=1, precision="fp32")


def two_labels() -> Entry:
    return Entry.model_validate(entry_fields(classes=2, window=[12, 12, 12], overlap=0.25))


def test_a_network_that_is_right_scores_one_and_a_worse_one_its_dice_by_hand(task: Path) -> None:
    cases = read_dataset(task).cases[:2]
    for case in cases:
        scan = read_nifti(case.image)
        write_nifti(case.label, Volume((scan.data > 1.0).astype(np.uint8), scan.affine))
    right = evaluate(cases, two_labels(), [session(1.0)])
    assert right.summary.dice == {1: 1.0}
    assert right.summary.nsd == {1: 1.0}
    worse = evaluate(cases, two_labels(), [session(1.5)])
    expected = []
    for case in cases:
        voxels = read_nifti(case.image).data
        overlap = 2 * (voxels > 1.5).sum() / ((voxels > 1.5).sum() + (voxels > 1.0).sum())
        assert worse.cases[case.id].dice[1] == pytest.approx(overlap)
        expected.append(overlap)
    assert worse.summary.mean_dice == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("fault", ["extent", "constant"])
def test_a_case_that_the_entry_does_not_accept_is_named(task: Path, fault: str) -> None:
    case = read_dataset(task).cases[6]
    scan, label = read_nifti(case.image), read_nifti(case.label)
    if fault == "extent":
        affine = np.diag([9.0, 9.0, 9.0, 1.0])
        write_nifti(case.label, Volume((label.data > 0).astype(np.uint8), affine))
        write_nifti(case.image, Volume(scan.data, affine))
    else:
        write_nifti(case.label, Volume((label.data > 0).astype(np.uint8), label.affine))
        write_nifti(case.image, Volume(np.zeros_like(scan.data), scan.affine))
    accepts = entry_fields()["accepts"] | {"extent_max": [50, 50, 50]}
    spec = Entry.model_validate(entry_fields(classes=2, window=[12, 12, 12], accepts=accepts))
    with pytest.raises(DintsError) as caught:
        evaluate([case], spec, [session(1.0)])
    assert isinstance(caught.value, ScanRefused)
    assert caught.value.code == f"scan-{fault}"
    assert "ball_006" in caught.value.message


def test_a_random_network_scores_badly(task: Path) -> None:
    random = NumpyEngine().open(random_network(0).onnx(), window=(12, 12, 12), batch=1, precision="fp32")
    spec = Entry.model_validate(entry_fields(window=[12, 12, 12]))
    scores = evaluate(read_dataset(task).cases[:2], spec, [random]).summary
    assert scores.mean_dice is not None
    assert scores.mean_dice < 0.5
