"""Look at every case of a dataset in MSD layout before anybody trains on it or measures with it, and report all faults.

Reading stops at the first fault of a case, never at the first bad case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dints_deploy.catalog.dataset import Case, Dataset, read_case, read_dataset
from dints_deploy.errors import DatasetError, ScanRefused
from dints_deploy.runtime.voxels import check_voxels


@dataclass(frozen=True)
class CaseReport:
    """What one case is, or what is wrong with it.

    Attributes:
        shape: voxels along the file's own axes. spacing: mm.
        labels: label value -> voxels, background left out.
        fault: a sentence, empty for a sound case.
        remarks: what is allowed but worth a look.
    """

    id: str
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    labels: dict[int, int] = field(default_factory=dict)
    fault: str = ""
    remarks: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return everything ready for JSON."""
        return vars(self) | {"labels": {str(value): count for value, count in self.labels.items()}}


@dataclass(frozen=True)
class DatasetReport:
    """What a dataset is, case by case, and what is wrong with it as a whole."""

    dataset: Dataset
    cases: tuple[CaseReport, ...]
    faults: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Return whether nothing is wrong."""
        return not self.faults and not any(case.fault for case in self.cases)

    def as_dict(self) -> dict[str, Any]:
        """Return everything ready for JSON."""
        about = {"name": self.dataset.name, "channels": self.dataset.channels}
        labels = {str(value): name for value, name in self.dataset.labels.items()}
        cases = [case.as_dict() for case in self.cases]
        return {**about, "labels": labels, "sound": self.sound, "faults": list(self.faults), "cases": cases}


def check_dataset(root: Path, *, progress: Callable[[int, int], None] = lambda done, total: None) -> DatasetReport:
    """Read every case of the dataset at `root`.

    Raises:
        DatasetError: `dataset-invalid` or `case-invalid` where `dataset.json` itself, or files it names, are missing.
    """
    dataset = read_dataset(root)
    cases = []
    for number, case in enumerate(dataset.cases, start=1):
        cases.append(_check_case(case, dataset))
        progress(number, len(dataset.cases))
    seen = {value for case in cases for value in case.labels}
    absent = [f"label {value} ({name}) is in no case" for value, name in dataset.labels.items() if value not in seen]
    return DatasetReport(dataset, tuple(cases), tuple(absent))


def _check_case(case: Case, dataset: Dataset) -> CaseReport:
    try:
        image, label = read_case(case, dataset.labels)
    except DatasetError as error:
        return CaseReport(case.id, fault=error.message.removeprefix(f"case {case.id}: "))
    values, counts = np.unique(label.data, return_counts=True)
    labels = {int(v): int(n) for v, n in zip(values, counts, strict=True) if v}
    fault = ""
    if image.channels != len(dataset.channels):
        fault = f"expected {len(dataset.channels)} channels ({', '.join(dataset.channels)}), found {image.channels}"
    else:
        try:
            check_voxels(image)
        except ScanRefused as refusal:
            fault = refusal.message
    remarks = tuple(f"no voxel of {name}" for value, name in dataset.labels.items() if value not in labels)
    spacing = tuple(round(float(mm), 4) for mm in image.grid.spacing)
    return CaseReport(case.id, image.shape, spacing, labels, fault, remarks)
