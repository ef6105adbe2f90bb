"""The fingerprint of a dataset: what a plan needs to know of its scans, measured on the training cases.

Axes are those of RAS+, as everywhere in the appliance; spacings are in mm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dints_deploy.catalog.dataset import Case, Dataset, read_case
from dints_deploy.catalog.preparation import Triple
from dints_deploy.catalog.strict import Strict
from dints_deploy.errors import DatasetError
from dints_deploy.imaging.geometry import orient

SAMPLES: Final = 10_000
"""Foreground voxels per case that the intensity statistics use."""

SAMPLE_SEED: Final = 0

Share = Annotated[float, Field(ge=0, le=1)]


class ChannelFacts(Strict):
    """Intensities of one channel over the labelled voxels of all cases.

    Attributes:
        lower: percentile 0.5. upper: percentile 99.5.
        zeros: mean share of a scan's voxels that are exactly zero, as skull-stripping leaves them.
    """

    name: str
    lower: float
    median: float
    upper: float
    mean: float
    std: float
    zeros: Share


class Fingerprint(Strict):
    """What the scans of a dataset have in common.

    Attributes:
        shape: median voxels along i, j, k. shape_min and shape_max: smallest and largest of each axis.
        spacing: median, per axis. spacing_fine: percentile 10. spacing_min and spacing_max: as for the shape.
        extent_min: smallest physical size of each axis, in mm. extent_max: largest.
        labels: label value -> share of the labelled voxels. absent: label value -> cases that do not show it.
    """

    cases: int
    shape: Triple
    shape_min: Triple
    shape_max: Triple
    spacing: Triple
    spacing_fine: Triple
    spacing_min: Triple
    spacing_max: Triple
    extent_min: Triple
    extent_max: Triple
    channels: tuple[ChannelFacts, ...]
    labels: dict[int, Share]
    absent: dict[int, int]

    @property
    def anisotropy(self) -> float:
        """Return the largest median spacing over the smallest."""
        return max(self.spacing) / min(self.spacing)


@dataclass(frozen=True, eq=False)
class _CaseFacts:
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    counts: dict[int, int]
    samples: NDArray[np.float32]  # (C, n)
    zeros: tuple[float, ...]


def fingerprint(dataset: Dataset, *, progress: Callable[[int, int], None] = lambda done, total: None) -> Fingerprint:
    """Measure all labelled cases of a dataset.

    Raises:
        DatasetError: `case-invalid`, naming the case; `dataset-invalid` when nothing is labelled.
    """
    facts = []
    for number, case in enumerate(dataset.cases, start=1):
        facts.append(_measure(case, dataset))
        progress(number, len(dataset.cases))
    samples = np.concatenate([f.samples for f in facts], axis=1)
    if not samples.size:
        raise DatasetError("dataset-invalid", f"expected labelled voxels in {dataset.root}, found none in any case")
    shapes, spacings = np.array([f.shape for f in facts]), np.array([f.spacing for f in facts])
    extents = shapes * spacings
    counts = {value: sum(f.counts[value] for f in facts) for value in dataset.labels}
    return Fingerprint(
        cases=len(facts),
        shape=_triple(np.median(shapes, axis=0)),
        shape_min=_triple(shapes.min(axis=0)),
        shape_max=_triple(shapes.max(axis=0)),
        spacing=_triple(np.median(spacings, axis=0)),
        spacing_fine=_triple(np.percentile(spacings, 10, axis=0)),
        spacing_min=_triple(spacings.min(axis=0)),
        spacing_max=_triple(spacings.max(axis=0)),
        extent_min=_triple(extents.min(axis=0)),
        extent_max=_triple(extents.max(axis=0)),
        channels=tuple(_channel(n, name, samples, facts) for n, name in enumerate(dataset.channels)),
        labels={value: count / max(1, sum(counts.values())) for value, count in counts.items()},
        absent={value: sum(f.counts[value] == 0 for f in facts) for value in dataset.labels},
    )


def _measure(case: Case, dataset: Dataset) -> _CaseFacts:
    read, reference = read_case(case, dataset.labels)
    if read.channels != len(dataset.channels):
        raise DatasetError(
            "case-invalid", f"case {case.id}: expected {len(dataset.channels)} channels, found {read.channels}"
        )
    if not np.isfinite(read.data).all():
        raise DatasetError("case-invalid", f"case {case.id}: expected finite voxels, found NaN or infinite ones")
    (image, _), (label, _) = orient(read), orient(reference)
    inside = np.flatnonzero(label.data[0])
    if len(inside) > SAMPLES:
        inside = np.random.default_rng(SAMPLE_SEED).choice(inside, SAMPLES, replace=False)
    return _CaseFacts(
        shape=image.shape,
        spacing=image.grid.spacing,
        counts={value: int(np.count_nonzero(label.data == value)) for value in dataset.labels},
        samples=np.stack([voxels.reshape(-1)[inside] for voxels in image.data]).astype(np.float32),
        zeros=tuple(float(np.mean(voxels == 0)) for voxels in image.data),
    )


def _channel(number: int, name: str, samples: NDArray[np.float32], facts: Sequence[_CaseFacts]) -> ChannelFacts:
    values = samples[number].astype(np.float64)
    lower, median, upper = np.percentile(values, (0.5, 50, 99.5))
    zeros = float(np.mean([f.zeros[number] for f in facts]))
    return ChannelFacts(
        name=name,
        lower=float(lower),
        median=float(median),
        upper=float(upper),
        mean=float(values.mean()),
        std=float(values.std()),
        zeros=zeros,
    )


def _triple(values: NDArray[Any]) -> Triple:
    i, j, k = (round(float(v), 4) for v in values)
    return i, j, k
