"""The plan of a run, made before it starts: along which axis to sweep, in which blocks, how much memory it takes.

A sweep holds the logits of one window's depth over the plane that it crosses. Where that is too much, the plane is
split into blocks, swept one after the other. A block runs every window that reaches it, so its voxels get the same sum
in the same order as in one sweep: the labels are the same, and windows at the borders of blocks are run again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Final

from dints_deploy.catalog.entry import Entry
from dints_deploy.errors import EngineError
from dints_deploy.runtime.blocks import Block, Part, blocks_of, parts_of
from dints_deploy.runtime.preprocess import PIECE_BYTES, Prepared
from dints_deploy.runtime.restore import BLOCK_BYTES, label_dtype
from dints_deploy.runtime.window import axis_starts

FLOAT_BYTES: Final = 4
MAX_PARTS: Final = 32
"""Parts of one axis at most: beyond, nearly all of the work would be done again."""

WINDOWS_HELD: Final = 3
"""Batches of windows and of logits at a time beside those under way: handed over, blended, of air."""

UNDER_WAY: Final = 2
"""Batches under way in an engine that computes one at a time; the last of them is fresh from it."""

SLACK_BYTES: Final = 128 << 20
"""What allocators keep, and everything small."""

MARGIN: Final = 1.05
"""Measured peaks were up to 2 % above the sum of what is known to be held."""

LABEL_COPIES: Final = 4
"""Of the label map while it is written and read back: the file, packed, unpacked, as an array."""


PARTS_BYTES: Final = 10
"""Of each voxel while the largest part of a label is looked for: masks, the parts' numbers, the result."""


@dataclass(frozen=True)
class Plan:
    """How a run goes. Axes are in the order of the sweep.

    Attributes:
        along: the axis (0, 1, 2 for i, j, k) that is swept.
        blocks: of the plane, together the whole.
        windows: of the whole scan.
        peak_bytes: what the run takes at most, beyond what the process holds before it.
    """

    along: int
    blocks: tuple[Block, ...]
    windows: int
    peak_bytes: int

    @property
    def again(self) -> int:
        """Return how many windows are run again because blocks share them."""
        return sum(len(block.starts) for block in self.blocks) - self.windows


def make_plan(
    prepared: Prepared, spec: Entry, *, room_bytes: int | None = None, batch: int = 1, under_way: int = UNDER_WAY
) -> Plan:
    """Return the plan with the fewest windows that keeps within `room_bytes`.

    Args:
        prepared: the scan, axes i, j, k.
        spec: of the network.
        room_bytes: what the run may take beyond what the process holds; None for any amount.
        batch: windows per call of the engine.
        under_way: calls of the engine at a time.

    Raises:
        EngineError: `memory-limit` when no plan keeps within it.
    """
    along = sweep_axis(prepared.grid.shape, spec.window)
    swept, window = prepared.along(along), in_order(spec.window, along)
    starts = [axis_starts(n, w, spec.overlap) for n, w in zip(swept.grid.shape, window, strict=True)]
    ways = [partial(_way, swept, axis, starts[axis], window[axis]) for axis in (1, 2)]
    split = _Split(ways[0](1), ways[1](1))
    held = batch * (under_way + WINDOWS_HELD)
    peak = _peak_bytes(swept, spec, window, held, split)
    if room_bytes is not None and peak > room_bytes:
        counts = [range(1, min(MAX_PARTS, swept.oriented.shape[axis]) + 1) for axis in (1, 2)]
        splits = [_Split(*parts) for parts in product(map(ways[0], counts[0]), map(ways[1], counts[1]))]
        peaks = [_peak_bytes(swept, spec, window, held, split) for split in splits]
        fitting = [n for n, needed in enumerate(peaks) if needed <= room_bytes]
        if not fitting:
            raise _too_little(min(peaks), room_bytes)
        best = min(fitting, key=lambda n: splits[n].price)
        split, peak = splits[best], peaks[best]
    return Plan(along, blocks_of(starts[0], split.rows, split.columns), math.prod(len(s) for s in starts), peak)


def sweep_axis(shape: Sequence[int], window: Sequence[int]) -> int:
    """Return the axis whose sweep holds the fewest voxels; of equal ones the last, along which scans lie in memory."""
    held = [math.prod(shape) // n * w for n, w in zip(shape, window, strict=True)]
    return max(axis for axis in range(3) if held[axis] == min(held))


def in_order(values: Sequence[int], along: int) -> tuple[int, int, int]:
    """Return three values with the one of the swept axis first."""
    first, (second, third) = values[along], [v for axis, v in enumerate(values) if axis != along]
    return first, second, third


@dataclass(frozen=True)
class _Split:
    """A plane in rows (j) and columns (k)."""

    rows: list[Part]
    columns: list[Part]

    @property
    def price(self) -> tuple[int, int]:
        """Return the windows over the plane, and the blocks: the fewer, the better."""
        windows = sum(len(part.starts) for part in self.rows) * sum(len(part.starts) for part in self.columns)
        return windows, len(self.rows) * len(self.columns)


def _way(swept: Prepared, axis: int, starts: Sequence[int], window: int, count: int) -> list[Part]:
    return parts_of(swept.back[axis], swept.before[axis], starts, window, count)


def _peak_bytes(swept: Prepared, spec: Entry, window: Sequence[int], windows_held: int, split: _Split) -> int:
    """Return the most that a sweep takes: it is the same for every image of this shape."""
    axes = (split.rows, split.columns)
    block = math.prod(max(p.columns.stop - p.columns.start for p in parts) for parts in axes)
    read = math.prod(max(p.span(w) for p in parts) for parts, w in zip(axes, window[1:], strict=True))
    decided = math.prod(max(p.voxels.stop - p.voxels.start for p in parts) for parts in axes)
    voxels, channels = math.prod(window), swept.scan.channels
    logits = spec.outputs * window[0] * block  # of the windows' depth over the block
    planes = channels * window[0] * read
    windows = windows_held * voxels * (channels + spec.outputs) + 3 * voxels
    plane = max(block * max(1, swept.inner.shape[0] // swept.oriented.shape[0] + 1), decided)
    deciding = 6 * max(BLOCK_BYTES, FLOAT_BYTES * plane)
    cutting = 6 * max(PIECE_BYTES, FLOAT_BYTES * channels * read)
    largest = label_dtype(max(label.value for label in spec.labels))
    whole = math.prod(swept.oriented.shape)
    labels = whole * int(largest.itemsize)
    after = max(LABEL_COPIES * labels, PARTS_BYTES * whole if spec.postprocess.keep_largest else 0)
    sweeping = FLOAT_BYTES * (logits + planes + windows) + deciding + cutting
    return int(MARGIN * (labels + max(sweeping, after)) + SLACK_BYTES)


def _too_little(needed: int, room: int) -> EngineError:
    return EngineError(
        "memory-limit",
        f"expected {needed / 2**30:.2f} GiB for this scan in the smallest blocks, found {max(0, room) / 2**30:.2f} GiB "
        "beside what is loaded: raise --max-ram, where one is set, or free memory",
    )
