"""Bring logits back to the scan's grid, slab by slab, and decide the label there: never the labels, always the logits.

Interpolation along i needs two neighbouring planes, so one plane of the previous slab is kept. Classes are interpolated
one after the other, with a running maximum: memory is one class of a few planes, whatever the number of classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dints_deploy.catalog.entry import Entry
from dints_deploy.imaging.volume import Volume
from dints_deploy.runtime.blend import Logits, Slab
from dints_deploy.runtime.preprocess import Lines, Prepared

BLOCK_BYTES: Final = 8 << 20
"""Interpolated logits of one class held at a time: what a processor's cache holds."""


@dataclass(frozen=True)
class Decision:
    """How logits become labels: the largest class, or ordered regions above one half.

    Attributes:
        dtype: of the labels.
        regions: label value per region, in the order of the channels; None for the largest class.
    """

    dtype: np.dtype[Any]
    regions: tuple[int, ...] | None = None

    def __call__(self, logits: Iterable[Logits]) -> NDArray[Any]:
        """Return the labels (n, J, K) of logits given channel by channel, each (n, J, K); the first of equals wins."""
        return self._largest(logits) if self.regions is None else self._above_half(logits, self.regions)

    def _largest(self, logits: Iterable[Logits]) -> NDArray[Any]:
        channels = iter(logits)
        largest = np.array(next(channels))
        labels = np.zeros_like(largest, self.dtype)
        for value, channel in enumerate(channels, start=1):
            np.copyto(labels, self.dtype.type(value), where=channel > largest)
            np.maximum(channel, largest, out=largest)
        return labels

    def _above_half(self, logits: Iterable[Logits], regions: tuple[int, ...]) -> NDArray[Any]:
        labels: NDArray[Any] | None = None
        for value, channel in zip(regions, logits, strict=True):
            labels = np.zeros_like(channel, self.dtype) if labels is None else labels
            labels[channel > 0] = value  # sigmoid(logit) > 1/2
        if labels is None:
            raise ValueError("expected at least one region")
        return labels


def decision(entry: Entry) -> Decision:
    """Return how an entry's logits become labels."""
    dtype = label_dtype(max(label.value for label in entry.labels))
    regions = None if entry.activation == "softmax" else tuple(region.value for region in entry.regions)
    return Decision(dtype, regions)


def label_dtype(largest: int) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds the labels."""
    return np.min_scalar_type(largest)


def restore(slabs: Iterable[Slab], prepared: Prepared, decide: Decision, *, block_bytes: int = BLOCK_BYTES) -> Volume:
    """Return the label map on the scan's own grid.

    Args:
        slabs: logits on the network's grid, in order, covering it.
        prepared: the scan's preparation.
        decide: logits to labels.
        block_bytes: of interpolated logits to hold at a time; one plane of the scan at least.
    """
    labels = np.zeros(prepared.oriented.shape, decide.dtype)
    i, j, k = (line.shifted(before) for line, before in zip(prepared.back, prepared.before, strict=True))
    fill(labels, slabs, (i, j, k), decide, block_bytes=block_bytes)
    return prepared.unorient(Volume(labels[np.newaxis], prepared.oriented.affine))


def fill(
    labels: NDArray[Any], slabs: Iterable[Slab], lines: Lines, decide: Decision, *, block_bytes: int = BLOCK_BYTES
) -> None:
    """Fill labels (I, J, K) from slabs of logits.

    Args:
        labels: a view of the label map on the scan's grid.
        slabs: in order, without gaps.
        lines: where the labels' voxels lie between those of the slabs, along i, j, k.
        decide: logits to labels.
        block_bytes: as for `restore`.

    Raises:
        ValueError: the slabs end before the labels do.
    """
    done, last = 0, None  # last: (C, 1, J, K), the plane before the slab
    for slab in slabs:
        end = slab.first + slab.logits.shape[1]
        ready = int(np.searchsorted(lines[0].upper, end))  # planes whose two neighbours are there
        rows = _rows(labels, slab.logits, lines, block_bytes)
        for begin in range(done, ready, rows):
            stop = min(begin + rows, ready)
            labels[begin:stop] = decide(_interpolated(slab, last, lines, begin, stop))
        done = max(done, ready)
        if done < len(labels) and lines[0].lower[done] < end:
            last = slab.logits[:, -1:].copy()
        del slab  # the next one is summed up meanwhile
    if done < len(labels):
        raise ValueError("expected slabs that cover the network's grid")


def _rows(labels: NDArray[Any], logits: Logits, lines: Lines, block_bytes: int) -> int:
    """Return how many planes of the scan are decided at a time."""
    per_row = int(lines[0].upper[-1] - lines[0].lower[0]) // len(labels) + 1
    plane = max(labels[0].size, per_row * logits[0, 0].size)
    return max(1, block_bytes // (4 * int(plane)))


def _interpolated(slab: Slab, last: Logits | None, lines: Lines, begin: int, stop: int) -> Iterator[Logits]:
    """Yield the logits (n, J, K) of the scan's planes begin <= i < stop, class by class."""
    along, needed = lines[0].within(begin, stop - begin)
    low, high = needed.start - slab.first, needed.stop - slab.first
    for number, channel in enumerate(slab.logits):
        planes = channel[max(low, 0) : high]
        if low < 0 and last is not None:
            planes = np.concatenate([last[number], planes])
        yield lines[2].linear(lines[1].linear(along.linear(planes, 0), 1), 2)
