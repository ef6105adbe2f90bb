"""Bring logits back to the scan's grid, slab by slab, and decide the label there: never the labels, always the logits.

Interpolation along i needs two neighbouring planes, so one plane of the previous slab is kept. The blocks are small, so
memory is proportional to a few planes whatever the number of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dints_deploy.catalog.entry import Entry
from dints_deploy.imaging.geometry import Line, shared_axes
from dints_deploy.imaging.volume import Volume
from dints_deploy.runtime.blend import Logits, Slab
from dints_deploy.runtime.preprocess import Prepared

BLOCK_BYTES: Final = 256 << 20
"""Largest block of interpolated logits held at a time."""

Decide = Callable[[Logits], NDArray[Any]]
"""Logits (C, n, J, K) to labels (n, J, K)."""


def decision(entry: Entry) -> Decide:
    """Return how an entry's logits become labels: the largest class, or ordered regions above one half."""
    dtype = label_dtype(max(label.value for label in entry.labels))
    if entry.activation == "softmax":
        return lambda logits: np.argmax(logits, axis=0).astype(dtype)
    values = [region.value for region in entry.regions]

    def regions(logits: Logits) -> NDArray[Any]:
        labels = np.zeros(logits.shape[1:], dtype)
        for value, logit in zip(values, logits, strict=True):
            labels[logit > 0] = value  # sigmoid(logit) > 1/2
        return labels

    return regions


def label_dtype(largest: int) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds the labels."""
    return np.min_scalar_type(largest)


def restore(slabs: Iterable[Slab], prepared: Prepared, decide: Decide, *, block_bytes: int = BLOCK_BYTES) -> Volume:
    """Return the label map on the scan's own grid.

    Args:
        slabs: logits on the network's grid, in order, covering it.
        prepared: the scan's preparation.
        decide: logits to labels.
        block_bytes: of interpolated logits to hold at a time; one plane of the scan at least.
    """
    lines = shared_axes(prepared.inner, prepared.oriented)
    if lines is None:
        raise ValueError("expected the network's grid to share the scan's axes")
    restoring = _Restoring(prepared, lines, decide, block_bytes)
    for slab in slabs:
        restoring.take(slab)
    if restoring.labels is None or restoring.done < prepared.oriented.shape[0]:
        raise ValueError("expected slabs that cover the network's grid")
    return prepared.unorient(Volume(restoring.labels[np.newaxis], prepared.oriented.affine))


class _Restoring:
    """The planes of the scan that are done, and the logits still needed for the next ones."""

    def __init__(self, prepared: Prepared, lines: tuple[Line, Line, Line], decide: Decide, block_bytes: int) -> None:
        self.inner = prepared.inner.shape
        self.before = prepared.before
        self.shape = prepared.oriented.shape
        self.lines = lines
        self.decide = decide
        self.block_bytes = block_bytes
        self.labels: NDArray[Any] | None = None
        self.done = 0
        self.held: Logits | None = None  # planes first .. of the unpadded network grid
        self.first = 0

    def take(self, slab: Slab) -> None:
        """Add a slab and decide every plane of the scan whose two neighbours are there."""
        start = max(0, self.before[0] - slab.first)
        stop = min(slab.logits.shape[1], self.before[0] + self.inner[0] - slab.first)
        if start >= stop:
            return
        (_, j, k), (_, nj, nk) = self.before, self.inner
        fresh = slab.logits[:, start:stop, j : j + nj, k : k + nk]
        self.held = fresh if self.held is None else np.concatenate([self.held, fresh], axis=1)
        ready = int(np.searchsorted(self.lines[0].upper, self.first + self.held.shape[1], side="left"))
        plane_bytes = 4 * self.held.shape[0] * self.shape[1] * self.shape[2]
        rows = max(1, self.block_bytes // plane_bytes)
        for begin in range(self.done, ready, rows):
            self._decide(begin, min(begin + rows, ready))
        self.done = max(self.done, ready)
        self._forget()

    def _decide(self, begin: int, end: int) -> None:
        assert self.held is not None  # noqa: S101  take() sets it
        part = self.lines[0].part(begin, end)
        low = int(part.lower[0])
        near = self.held[:, low - self.first : int(part.upper[-1]) + 1 - self.first]
        along_i = Line(part.lower - low, part.upper - low, part.fraction)
        block = self.lines[2].linear(self.lines[1].linear(along_i.linear(near, 1), 2), 3)  # (C, n, J, K)
        labels = self.decide(block)
        if self.labels is None:
            self.labels = np.zeros(self.shape, labels.dtype)
        self.labels[begin:end] = labels

    def _forget(self) -> None:
        """Drop the planes that no later plane of the scan needs."""
        assert self.held is not None  # noqa: S101  take() sets it
        if self.done < self.shape[0]:
            needed = int(self.lines[0].lower[self.done])
            drop = min(needed - self.first, self.held.shape[1])
            if drop > 0:
                self.held, self.first = self.held[:, drop:].copy(), self.first + drop
