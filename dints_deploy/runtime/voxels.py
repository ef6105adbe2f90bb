"""Refuse voxels that no network can say anything about: no numbers, one value, a label map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dints_deploy.errors import ScanRefused
from dints_deploy.imaging.volume import Volume

LABEL_LIKE_VALUES: Final = 12
"""Whole numbers with at most this many distinct values are a label map: scans have more (tests hold the margin)."""

MOST_LABELS: Final = 512
"""Whole numbers with more distinct values than this are never taken for a label map."""

FLAT_SHARE: Final = 0.5
"""Share of equal neighbours inside structures above which few whole numbers are labels; in scans noise keeps it low."""

SAMPLE_VOXELS: Final = 4096

PIECE_VOXELS: Final = 8 << 20
"""Voxels looked at a time, so that a large scan is not copied."""


def check_voxels(scan: Volume) -> None:
    """Refuse voxels that no network can say anything about.

    Raises:
        ScanRefused: `scan-nonfinite`, `scan-constant`, `scan-looks-like-labels`.
    """
    for channel, voxels in enumerate(scan.data):
        low, high = voxels.min(), voxels.max()  # NaN and infinity show in one of them
        if not (np.isfinite(low) and np.isfinite(high)):
            count = sum(int(piece.size - np.isfinite(piece).sum()) for piece in _pieces(voxels))
            raise ScanRefused(
                "scan-nonfinite", f"expected finite voxels, found {count} NaN or infinite: convert it again"
            )
        if low == high:
            raise ScanRefused(
                "scan-constant", f"expected an image, found one value in every voxel of channel {channel}"
            )
        if _looks_like_labels(voxels):
            found = len(np.unique(voxels))
            raise ScanRefused(
                "scan-looks-like-labels", f"expected a scan, found {found} distinct whole numbers: is this a label map?"
            )


def _looks_like_labels(voxels: NDArray[Any]) -> bool:
    """Say whether these are whole numbers that are few, or that stand in flat pieces."""
    if voxels.size <= LABEL_LIKE_VALUES:
        return False
    # A sample settles nearly every real scan without looking at all of it.
    step = max(1, round((voxels.size / SAMPLE_VOXELS) ** (1 / 3)))
    sample = np.unique(voxels[::step, ::step, ::step])
    if len(sample) > MOST_LABELS or (sample != np.round(sample)).any():
        return False
    counts: dict[float, int] = {}
    for piece in _pieces(voxels):
        values, found = np.unique(piece, return_counts=True)
        if (values != np.round(values)).any():
            return False
        for value, count in zip(values.tolist(), found.tolist(), strict=True):
            counts[value] = counts.get(value, 0) + count
        if len(counts) > MOST_LABELS:
            return False
    background = max(counts, key=lambda value: (counts[value], -value))
    return len(counts) <= LABEL_LIKE_VALUES or _flat_share(voxels, background) > FLAT_SHARE


def _flat_share(voxels: NDArray[Any], background: float) -> float:
    """Return how often a voxel along k equals the one before it, where neither is background."""
    equal = both = 0
    for piece in voxels:
        before, after = piece[..., :-1], piece[..., 1:]
        inside = (before != background) & (after != background)
        both += int(np.count_nonzero(inside))
        equal += int(np.count_nonzero((before == after) & inside))
    return equal / both if both else 0.0


def _pieces(voxels: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield the voxels in pieces, cut across their slowest axis."""
    axis = int(np.argmax(np.abs(voxels.strides)))
    planes = max(1, PIECE_VOXELS * voxels.shape[axis] // voxels.size)
    for start in range(0, voxels.shape[axis], planes):
        yield voxels[(slice(None),) * axis + (slice(start, start + planes),)]
