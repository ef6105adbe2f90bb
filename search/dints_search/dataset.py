"""Training cases in memory, and patches drawn from them as a pure function of (seed, index).

A patch depends on nothing but its seed and its index, so a run that resumes at step n sees exactly the patches that an
uninterrupted run sees, whatever the number of worker processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from dints_deploy.catalog.dataset import Case, read_case
from dints_deploy.catalog.preparation import Preparation
from dints_deploy.errors import DatasetError, DintsError
from dints_deploy.runtime.preprocess import prepare
from dints_search.augment import Augmenter

MOST_VOXELS: Final = 10_000
"""Voxels per class and case that a foreground patch may be centred on; nnU-Net's number."""


@dataclass(frozen=True, eq=False)
class TrainingCase:
    """One prepared case: image (C, I, J, K) float32 and label (I, J, K) on the network's grid."""

    id: str
    image: NDArray[np.float32]
    label: NDArray[np.uint8]


def load_cases(cases: Sequence[Case], preparation: Preparation, labels: dict[int, str]) -> list[TrainingCase]:
    """Read and prepare cases with the appliance's own `prepare`.

    Raises:
        DatasetError: `case-invalid`, naming the case.
    """
    return [_load(case, preparation, labels) for case in cases]


def _load(case: Case, preparation: Preparation, labels: dict[int, str]) -> TrainingCase:
    image, reference = read_case(case, labels)
    try:
        prepared = prepare(image, preparation)
    except DintsError as fault:
        raise DatasetError("case-invalid", f"case {case.id}: {fault.message}") from fault
    return TrainingCase(case.id, prepared.data, prepared.labels(reference).astype(np.uint8))


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
        image = torch.from_numpy(np.ascontiguousarray(case.image[(slice(None), *box)]))
        label = torch.from_numpy(np.ascontiguousarray(case.label[box][np.newaxis]))
        return image, label.long(), int(rng.integers(2**63))

    def _corner(self, number: int, rng: np.random.Generator) -> list[int]:
        """Draw the first voxel of a patch: uniformly, or around a voxel of a class, each class as often."""
        free = np.array(self.cases[number].label.shape) - np.array(self.window)
        corner: NDArray[Any] = rng.integers(0, free + 1)
        if free.any() and rng.random() < self.foreground and (classes := self._foreground[number]):
            voxels = classes[rng.integers(len(classes))]
            corner = np.clip(voxels[rng.integers(len(voxels))] - np.array(self.window) // 2, 0, free)
        return [int(n) for n in corner]
