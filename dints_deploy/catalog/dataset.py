"""A labelled dataset in the layout of the Medical Segmentation Decathlon (MSD), and its five folds.

The hospital that validates an entry on its own labels and the workshop that trains one read the same layout:
`dataset.json`, `imagesTr/<case>.nii.gz`, `labelsTr/<case>.nii.gz`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from dints_deploy.catalog.strict import read_json
from dints_deploy.errors import DatasetError, DintsError
from dints_deploy.imaging.nifti import read_nifti
from dints_deploy.imaging.volume import Volume

FOLDS: Final = 5
FOLD_SEED: Final = 12345
"""The field's usual five folds: scikit-learn's KFold(5, shuffle=True, random_state=12345) over the sorted ids."""

MOST_TOLD: Final = 5
"""Missing files that one error names."""


@dataclass(frozen=True)
class Case:
    """One labelled case: its id and its two files."""

    id: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Dataset:
    """A labelled dataset.

    Attributes:
        name: of the task.
        root: the folder of `dataset.json`.
        channels: names of the input channels, in order.
        labels: label value -> name, background (0) left out.
        cases: sorted by id.
    """

    name: str
    root: Path
    channels: tuple[str, ...]
    labels: dict[int, str]
    cases: tuple[Case, ...]

    def fold(self, number: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
        """Return the training part and the validation part of a fold (0..4).

        Raises:
            DatasetError: `fold-unknown`.
        """
        if not 0 <= number < FOLDS:
            raise DatasetError("fold-unknown", f"expected a fold from 0 to {FOLDS - 1}, found {number}")
        if len(self.cases) < FOLDS:
            raise DatasetError("fold-unknown", f"expected at least {FOLDS} cases for folds, found {len(self.cases)}")
        order = np.arange(len(self.cases))
        np.random.RandomState(FOLD_SEED).shuffle(order)
        held_out = set(np.array_split(order, FOLDS)[number].tolist())
        training = tuple(c for n, c in enumerate(self.cases) if n not in held_out)
        validation = tuple(c for n, c in enumerate(self.cases) if n in held_out)
        return training, validation


class _Pair(BaseModel):
    model_config = ConfigDict(extra="ignore")
    image: str
    label: str


class _DatasetFile(BaseModel):
    """`dataset.json` as MSD writes it; other people add keys, so unknown ones are not an error."""

    model_config = ConfigDict(extra="ignore")
    name: str
    modality: dict[str, str]
    labels: dict[str, str]
    training: list[_Pair] = Field(min_length=1)


class _Image(BaseModel):
    model_config = ConfigDict(extra="ignore")
    image: str


class _TestFile(BaseModel):
    """The part of `dataset.json` about cases without labels; MSD lists names, others lists of pairs."""

    model_config = ConfigDict(extra="ignore")
    test: list[str | _Image] = []


def read_dataset(root: Path) -> Dataset:
    """Read `dataset.json` under `root` and check that every file it names is there.

    Raises:
        DatasetError: `dataset-invalid` or `case-invalid`.
    """
    if not (root / "dataset.json").is_file():
        raise DatasetError("dataset-invalid", f"expected an MSD task folder, found no dataset.json in {root}")
    parsed = read_json(root / "dataset.json", _DatasetFile, DatasetError, "dataset-invalid")
    cases = sorted(_cases(root, parsed.training), key=lambda case: case.id)
    if twice := [a.id for a, b in pairwise(cases) if a.id == b.id]:
        raise DatasetError(
            "dataset-invalid", f"expected distinct case ids in {root / 'dataset.json'}, found two {twice[0]}"
        )
    try:
        labels = {int(value): name for value, name in sorted(parsed.labels.items()) if int(value) != 0}
        channels = tuple(parsed.modality[str(n)] for n in range(len(parsed.modality)))
    except (ValueError, KeyError) as fault:
        raise DatasetError(
            "dataset-invalid", f"expected whole numbers as keys in dataset.json, found {fault}"
        ) from fault
    return Dataset(parsed.name, root, channels, labels, tuple(cases))


def read_unlabelled(root: Path) -> dict[str, Path]:
    """Return case id -> image of the cases that `dataset.json` lists as `test`: scans whose labels are kept elsewhere.

    Raises:
        DatasetError: `dataset-invalid` or `case-invalid`.
    """
    if not (root / "dataset.json").is_file():
        raise DatasetError("dataset-invalid", f"expected an MSD task folder, found no dataset.json in {root}")
    parsed = read_json(root / "dataset.json", _TestFile, DatasetError, "dataset-invalid")
    images = [entry if isinstance(entry, str) else entry.image for entry in parsed.test]
    if not images:
        raise DatasetError("dataset-invalid", f"expected cases under `test` in {root / 'dataset.json'}, found none")
    return {_stem(image): _file(root, _stem(image), "image", image) for image in sorted(images)}


def _cases(root: Path, pairs: Sequence[_Pair]) -> list[Case]:
    """Return the cases; raise one error for all files that are missing, or lie elsewhere."""
    cases, faults = [], []
    for pair in pairs:
        try:
            cases.append(_case(root, pair))
        except DatasetError as fault:
            faults.append(fault)
    if faults:
        more = f"; and {len(faults) - MOST_TOLD} more" if len(faults) > MOST_TOLD else ""
        raise DatasetError(faults[0].code, "; ".join(fault.message for fault in faults[:MOST_TOLD]) + more)
    return cases


def _case(root: Path, pair: _Pair) -> Case:
    name = _stem(pair.image)
    return Case(name, _file(root, name, "image", pair.image), _file(root, name, "label", pair.label))


def _stem(image: str) -> str:
    return PurePosixPath(image).name.removesuffix(".gz").removesuffix(".nii")


def _file(root: Path, case: str, kind: str, relative: str) -> Path:
    path, pure = root / relative, PurePosixPath(relative)
    if pure.is_absolute() or ".." in pure.parts:
        raise DatasetError("case-invalid", f"expected the {kind} of case {case} inside {root}, found {relative}")
    if not path.is_file():
        raise DatasetError("case-invalid", f"expected the {kind} of case {case} at {path}, found no file")
    return path


def read_case(case: Case, labels: dict[int, str]) -> tuple[Volume, Volume]:
    """Read a case's image and label and check that they belong together.

    Raises:
        DatasetError: `case-invalid`, naming the case.
    """
    try:
        image, label = read_nifti(case.image), read_nifti(case.label)
    except DintsError as fault:
        raise DatasetError("case-invalid", f"case {case.id}: {fault.message}") from fault
    if label.channels != 1:
        raise DatasetError("case-invalid", f"case {case.id}: expected a label of one channel, found {label.channels}")
    if not image.grid.same_as(label.grid, tolerance_mm=0.01):
        raise DatasetError(
            "case-invalid",
            f"case {case.id}: expected image and label on one grid, found {image.shape} and {label.shape}",
        )
    found: set[Any] = set(np.unique(label.data).tolist()) - {0}
    if not found <= set(labels):
        raise DatasetError(
            "case-invalid", f"case {case.id}: expected label values {sorted(labels)}, found {sorted(found)}"
        )
    return image, Volume(label.data.astype(np.uint8 if max(labels, default=0) < 256 else np.uint16), label.affine)
