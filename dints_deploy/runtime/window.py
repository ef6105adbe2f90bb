"""The plan of a sliding window: where windows start."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Final

Start = tuple[int, int, int]

STEP_SLACK: Final = 1e-6
"""Voxels added to a step before it is rounded down: 10 * (1 - 0.8) is a little below 2 in binary."""


def axis_starts(length: int, window: int, overlap: float) -> list[int]:
    """Return the first voxels of the windows along one axis, ascending; together they cover every voxel.

    Windows are a fixed step apart, the share of a window that is not overlap; the last is moved inside, as the field's
    sliding windows do.

    Raises:
        ValueError: the axis is shorter than the window (pad the volume).
    """
    if length < window:
        raise ValueError(f"window {window} is larger than axis {length}: pad the volume")
    step = max(1, int(window * (1 - overlap) + STEP_SLACK))
    starts = list(range(0, length - window, step))
    return [*starts, length - window]


def window_starts(shape: Sequence[int], window: Sequence[int], overlap: float) -> list[Start]:
    """Return the first voxels (i, j, k) of all windows, ordered by i, then j, then k."""
    axes = [axis_starts(n, w, overlap) for n, w in zip(shape, window, strict=True)]
    return [(i, j, k) for i, j, k in product(*axes)]
