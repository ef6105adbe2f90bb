"""Blend overlapping windows into slabs of logits, finished from the front while later windows still run.

The weight of a window is a product of one Gaussian per axis, divided per axis by the sum over all windows. Since
windows start on a lattice (the product of the axes' starts), the weights sum to one at every voxel: a network that
returns its input is reassembled exactly. Memory is one slab, as deep as a window, never the volume.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dints_deploy.runtime.window import Start, axis_starts

Logits = NDArray[np.float32]

SIGMA_SHARE = 0.125
"""Standard deviation of the Gaussian as a share of the window, as in nnU-Net and MONAI."""


@dataclass(frozen=True, eq=False)
class Slab:
    """Finished planes: logits (C, n, J, K) of the planes first <= i < first + n."""

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
    outputs: Iterable[tuple[Start, Logits]], shape: Sequence[int], window: Sequence[int], overlap: float
) -> Iterator[Slab]:
    """Yield finished slabs, in order, from windows' logits given in the order of `window_starts`.

    Args:
        outputs: (start, logits (C, *window)) of every window.
        shape: (I, J, K) of the whole.
        window: (i, j, k) of one window.
        overlap: share of a window, as given to `window_starts`.
    """
    along_i, along_j, along_k = (axis_weights(n, w, overlap) for n, w in zip(shape, window, strict=True))
    held: Logits | None = None  # (C, window i, J, K), planes base .. base + window i
    base = 0
    for (i, j, k), logits in outputs:
        if held is None:
            held = np.zeros((logits.shape[0], window[0], *shape[1:]), np.float32)
        if i > base:
            yield Slab(base, held[:, : i - base].copy())
            held = _advance(held, i - base)
            base = i
        plane = along_j[j][:, np.newaxis] * along_k[k]  # (j, k)
        weighted = logits * along_i[i][:, np.newaxis, np.newaxis]
        weighted *= plane
        held[:, :, j : j + window[1], k : k + window[2]] += weighted
    if held is not None:
        yield Slab(base, held)


def _advance(held: Logits, planes: int) -> Logits:
    """Drop the first planes and append as many empty ones."""
    held[:, :-planes] = held[:, planes:] if planes < held.shape[1] else 0
    held[:, -planes:] = 0
    return held
