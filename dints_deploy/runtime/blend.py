"""Blend overlapping windows into slabs of logits, finished from the front while later windows still run.

The weight of a window is a product of one Gaussian per axis, divided per axis by the sum over all windows. Since
windows start on a lattice (the product of the axes' starts), the weights sum to one at every voxel: a network that
returns its input is reassembled exactly. Memory is one slab, as deep as a window, never the volume; it can be kept to
some columns of the plane, whose voxels then come out as they do in the whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dints_deploy.runtime.window import Start, axis_starts

Logits = NDArray[np.float32]

SIGMA_SHARE = 0.125
"""Standard deviation of the Gaussian as a share of the window, as in nnU-Net and MONAI."""


@dataclass(frozen=True, eq=False)
class Slab:
    """Finished planes: logits (C, n, J, K) of the planes first <= i < first + n, in the columns that are blended."""

    first: int
    logits: Logits


def axis_weights(length: int, window: int, overlap: float) -> dict[int, NDArray[np.float32]]:
    """Return start -> (window,) weights along one axis that sum to one at every voxel of the axis."""
    centre = (window - 1) / 2
    bell = np.exp(-0.5 * ((np.arange(window) - centre) / (SIGMA_SHARE * window)) ** 2)
    starts = axis_starts(length, window, overlap)
    total = np.zeros(length)
    for start in starts:
        total[start : start + window] += bell
    return {start: (bell / total[start : start + window]).astype(np.float32) for start in starts}


def blend(
    outputs: Iterable[tuple[Start, Logits]],
    shape: Sequence[int],
    window: Sequence[int],
    overlap: float,
    columns: tuple[slice, slice] | None = None,
) -> Iterator[Slab]:
    """Yield finished slabs, in order, from windows' logits given in the order of `window_starts`.

    Args:
        outputs: (start, logits (C, *window)) of every window that reaches the columns.
        shape: (I, J, K) of the whole.
        window: (i, j, k) of one window.
        overlap: share of a window, as given to `window_starts`.
        columns: the voxels along j and k that are blended; None for all.
    """
    along_i, along_j, along_k = (axis_weights(n, w, overlap) for n, w in zip(shape, window, strict=True))
    j_range, k_range = columns or (slice(0, shape[1]), slice(0, shape[2]))
    # Between two cuts the same windows meet: such planes are finished at the same time.
    coming = deque(pairwise(sorted({cut for start in along_i for cut in (start, start + window[0])})))
    held: deque[Slab] = deque()
    for (i, j, k), logits in outputs:
        while held and held[0].first < i:
            yield held.popleft()
        while coming and coming[0][0] < i + window[0]:
            first, end = coming.popleft()
            sizes = (len(logits), end - first, j_range.stop - j_range.start, k_range.stop - k_range.start)
            held.append(Slab(first, _laid_out_like(logits, sizes)))
        (to_j, of_j), (to_k, of_k) = _shared(j_range, j, window[1]), _shared(k_range, k, window[2])
        weights = _laid_out_like(logits, (1, window[0], of_j.stop - of_j.start, of_k.stop - of_k.start))[0]
        np.multiply(along_i[i][:, np.newaxis, np.newaxis], along_j[j][of_j, np.newaxis] * along_k[k][of_k], out=weights)
        _add(held, logits[:, :, of_j, of_k], weights, i, (to_j, to_k))
        del logits
    while held:
        yield held.popleft()


def _add(held: Iterable[Slab], logits: Logits, weights: Logits, i: int, columns: tuple[slice, slice]) -> None:
    """Add a window's weighted logits to the slabs it reaches, class by class: the products stay in the cache."""
    weighted = np.empty_like(weights)
    for number, one in enumerate(logits):
        np.multiply(one, weights, out=weighted)
        for slab in held:
            first, planes = slab.first - i, slab.logits.shape[1]
            slab.logits[number][:, *columns] += weighted[first : first + planes]


def _shared(columns: slice, start: int, window: int) -> tuple[slice, slice]:
    """Return where a window meets the columns along one axis: in the columns, and in the window."""
    low, high = max(columns.start, start), min(columns.stop, start + window)
    return slice(low - columns.start, high - columns.start), slice(low - start, high - start)


def _laid_out_like(logits: Logits, sizes: Sequence[int]) -> Logits:
    """Return zeros (C, i, j, k) whose axes lie in memory in the order of the logits': sums then run along it."""
    order = sorted((1, 2, 3), key=lambda axis: -abs(logits.strides[axis]))
    memory = np.zeros([sizes[0], *(sizes[axis] for axis in order)], np.float32)
    return memory.transpose(0, *(1 + order.index(axis) for axis in (1, 2, 3)))
