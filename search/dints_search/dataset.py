"""Training cases in memory, and patches drawn from them as a pure function of (seed, index).

A patch depends on nothing but its seed and its index, so a run that resumes at step n sees exactly the patches that an
uninterrupted run sees, whatever the number of worker processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from dints_deploy.catalog.dataset import Case, Dataset, read_case
from dints_deploy.catalog.preparation import Preparation
from dints_deploy.errors import DatasetError, DintsError, ScanRefused
from dints_deploy.files import make_folder, replacing, sha256_file
from dints_deploy.imaging.nifti import read_grid
from dints_deploy.runtime.accepts import check_grid
from dints_deploy.runtime.preprocess import prepare
from dints_search.augment import Augmenter
from dints_search.recipe import Recipe

MOST_VOXELS: Final = 10_000
"""Voxels per class and case that a foreground patch may be centred on; nnU-Net's number."""


@dataclass(frozen=True, eq=False)
class TrainingCase:
    """One prepared case: image (C, I, J, K) float32 and label (I, J, K) on the network's grid."""

    id: str
    image: NDArray[np.float32]
    label: NDArray[np.uint8]


def load_cases(
    cases: Sequence[Case], preparation: Preparation, labels: dict[int, str], *, cache: Path | None = None
) -> list[TrainingCase]:
    """Read cases, prepare them with the appliance's own `prepare`, and cut away what is empty around the body.

    Args:
        cases: to read.
        preparation: of the recipe.
        labels: value -> name of the labels that may occur.
        cache: keep the prepared cases in this folder and map them from there instead of holding them in memory.

    Raises:
        DatasetError: `case-invalid`, naming the case. OutputError: the cache cannot be written.
    """
    if cache is None:
        return [_load(case, preparation, labels) for case in cases]
    return [_load_cached(case, preparation, labels, make_folder(cache)) for case in cases]


def check_dataset(dataset: Dataset, recipe: Recipe) -> None:
    """Refuse a dataset whose channels or labels are not those of the recipe's task, or stand in another order.

    Raises:
        DatasetError: `dataset-invalid`.
    """
    if len(dataset.channels) != len(recipe.channels):
        names = [channel.name for channel in recipe.channels]
        _refuse("channels", names, dataset.channels)
    if set(dataset.labels) != set(recipe.label_names):
        _refuse("labels", recipe.label_names, dataset.labels)
    if recipe.dataset is not None:
        for kind, expected, found in (
            ("channels", recipe.dataset.modality, dataset.channels),
            ("labels", recipe.dataset.labels, tuple(dataset.labels.values())),
        ):
            if [name.casefold() for name in expected] != [name.casefold() for name in found]:
                setting = "modality" if kind == "channels" else "labels"
                advice = f": if they mean the same, give --set 'dataset.{setting}={json.dumps(found)}'"
                _refuse(f"{kind} in this order", list(expected), list(found), advice)


def _refuse(what: str, expected: object, found: object, advice: str = "") -> NoReturn:
    message = f"expected the recipe's {what}, {expected}, found {found} in dataset.json{advice}"
    raise DatasetError("dataset-invalid", message)


def check_accepted(cases: Sequence[Case], recipe: Recipe) -> None:
    """Refuse cases that a network of the recipe would refuse: they could be trained on, but neither measured nor used.

    Only their headers are read, so that this is known before anything is computed.

    Raises:
        DatasetError: `case-invalid`, naming the first.
    """
    for case in cases:
        try:
            check_grid(read_grid(case.image), recipe.task, recipe.accepts, recipe.geometry)
        except ScanRefused as refusal:
            bounds = refusal.code in ("scan-shape", "scan-spacing", "scan-extent")
            more = ", or --set what [accepts] of the recipe says" if bounds else ""
            raise DatasetError("case-invalid", f"case {case.id}: {refusal.message}{more}") from refusal


def check_classes(cases: Sequence[TrainingCase], labels: dict[int, str]) -> None:
    """Refuse training cases of which none holds one of the labels: the network could never learn it.

    Raises:
        DatasetError: `dataset-invalid`.
    """
    found = {int(value) for case in cases for value in np.unique(case.label)}
    if absent := [f"{value} ({name})" for value, name in labels.items() if value not in found]:
        raise DatasetError(
            "dataset-invalid",
            f"expected label {absent[0]} in some of the {len(cases)} training cases ({cases[0].id} ... {cases[-1].id}),"
            " found it in none: leave it out of the recipe, or add cases that show it",
        )


def _load(case: Case, preparation: Preparation, labels: dict[int, str]) -> TrainingCase:
    image, reference = read_case(case, labels)
    try:
        prepared = prepare(image, preparation)
    except DintsError as fault:
        raise DatasetError("case-invalid", f"case {case.id}: {fault.message}") from fault
    data, label = prepared.data, prepared.labels(reference).astype(np.uint8)
    box = body_box(data, label, preparation)
    return TrainingCase(case.id, np.ascontiguousarray(data[(slice(None), *box)]), np.ascontiguousarray(label[box]))


def _load_cached(case: Case, preparation: Preparation, labels: dict[int, str], cache: Path) -> TrainingCase:
    key = [preparation.model_dump_json(), str(sorted(labels)), sha256_file(case.image), sha256_file(case.label)]
    stem = cache / hashlib.sha256("\n".join(key).encode()).hexdigest()[:32]
    files = [stem.with_suffix(".image.npy"), stem.with_suffix(".label.npy")]
    if not all(file.exists() for file in files):
        loaded = _load(case, preparation, labels)
        arrays: list[NDArray[Any]] = [loaded.image, loaded.label]
        for file, array in zip(files, arrays, strict=True):
            with replacing(file) as partial:
                np.save(partial, array)
    try:
        image, label = (np.load(file, mmap_mode="r", allow_pickle=False) for file in files)
    except (OSError, ValueError) as error:
        raise DatasetError(
            "case-invalid", f"case {case.id}: {files[0].name} in the cache is damaged: remove {cache}"
        ) from error
    return TrainingCase(case.id, image, label)


def body_box(data: NDArray[np.float32], label: NDArray[np.uint8], preparation: Preparation) -> tuple[slice, ...]:
    """Return the box of the voxels that differ from what lies around a scan, or are labelled, and some margin.

    The margin of a quarter of a window keeps the air that windows at the body's border see. The box is never smaller
    than a window.
    """
    filled = label > 0
    for voxels, channel in zip(data, preparation.channels, strict=True):
        filled |= voxels != (0 if channel.fill == "zero" else voxels.min())
    box = []
    for axis, window in enumerate(preparation.window):
        size = filled.shape[axis]
        inside = np.flatnonzero(filled.any(axis=tuple(other for other in range(3) if other != axis)))
        first, last = (int(inside[0]), int(inside[-1])) if len(inside) else (0, size - 1)
        low, high = max(0, first - window // 4), min(size, last + 1 + window // 4)
        if high - low < window:
            low = min(max(0, (low + high - window) // 2), size - window)
            high = low + window
        box.append(slice(low, high))
    return tuple(box)


def _foreground(label: NDArray[np.uint8]) -> list[NDArray[np.int32]]:
    """Return for each class of a label map up to MOST_VOXELS indices (n, 3) of its voxels, evenly spread."""
    found = [np.flatnonzero(label == value) for value in np.unique(label) if value]
    spread = [flat[:: len(flat) // MOST_VOXELS + 1] for flat in found]
    return [np.stack(np.unravel_index(flat, label.shape), axis=1).astype(np.int32) for flat in spread]


class Patches(TorchDataset[tuple[Tensor, Tensor, int]]):
    """An endless list of patches; item n is the same whenever it is asked for.

    Args:
        cases: prepared cases; each epoch visits every case once, in an order of its own.
        window: voxels of a patch.
        foreground: share of patches centred on a labelled voxel.
        augmenter: what `dints_search.retrain.batches` applies to the patches, on the training's device.
        seed: of everything random.
        length: number of items.
    """

    def __init__(
        self,
        cases: Sequence[TrainingCase],
        *,
        window: Sequence[int],
        foreground: float,
        augmenter: Augmenter,
        seed: int,
        length: int,
    ) -> None:
        self.cases = cases
        self.window = tuple(window)
        self.foreground = foreground
        self.augmenter = augmenter
        self.seed = seed
        self.length = length
        self._foreground = [_foreground(case.label) if foreground else [] for case in cases]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """Return patch `index`: image (C, I, J, K) float32, label (1, I, J, K) int64, seed of its augmentation."""
        epoch, place = divmod(index, len(self.cases))
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.cases))
        case = self.cases[order[place]]
        rng = np.random.default_rng((self.seed, 1, index))
        start = self._corner(int(order[place]), rng)
        box = tuple(slice(a, a + w) for a, w in zip(start, self.window, strict=True))
        image = torch.from_numpy(np.array(case.image[(slice(None), *box)]))
        label = torch.from_numpy(np.array(case.label[box][np.newaxis]))
        return image, label.long(), int(rng.integers(2**63))

    def _corner(self, number: int, rng: np.random.Generator) -> list[int]:
        """Draw the first voxel of a patch: uniformly, or around a voxel of a class, each class as often."""
        free = np.array(self.cases[number].label.shape) - np.array(self.window)
        corner: NDArray[Any] = rng.integers(0, free + 1)
        if free.any() and rng.random() < self.foreground and (classes := self._foreground[number]):
            voxels = classes[rng.integers(len(classes))]
            corner = np.clip(voxels[rng.integers(len(voxels))] - np.array(self.window) // 2, 0, free)
        return [int(n) for n in corner]
