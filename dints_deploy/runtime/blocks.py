"""Split the plane that a sweep crosses into blocks: each with the columns and the windows that its voxels need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dints_deploy.imaging.geometry import Line
from dints_deploy.runtime.window import Start


@dataclass(frozen=True)
class Block:
    """A part of the plane that is swept at a time.

    Attributes:
        voxels: of the scan along j and k.
        columns: of the network's grid along j and k that these voxels need.
        starts: of the windows that reach the columns, ordered by i, then j, then k.
    """

    voxels: tuple[slice, slice]
    columns: tuple[slice, slice]
    starts: tuple[Start, ...]


@dataclass(frozen=True)
class Part:
    """A part of one axis of the plane: voxels of the scan, columns of the network's grid, windows that reach them."""

    voxels: slice
    columns: slice
    starts: tuple[int, ...]

    def span(self, window: int) -> int:
        """Return the voxels of the network's grid that its windows cover."""
        return self.starts[-1] + window - self.starts[0]


def parts_of(line: Line, before: int, starts: Sequence[int], window: int, count: int) -> list[Part]:
    """Return one axis in `count` parts of nearly equal length.

    Args:
        line: where the scan's voxels lie between those of the network's unpadded grid.
        before: voxels of padding before that grid.
        starts: of the windows along the axis.
        window: voxels of one window.
        count: at most the scan's voxels.
    """
    edges = [round(n * len(line.lower) / count) for n in range(count + 1)]
    parts = []
    for first, end in pairwise(edges):
        columns = slice(int(line.lower[first]) + before, int(line.upper[end - 1]) + 1 + before)
        reaching = tuple(s for s in starts if s < columns.stop and s + window > columns.start)
        parts.append(Part(slice(first, end), columns, reaching))
    return parts


def blocks_of(starts: Sequence[int], rows: Sequence[Part], columns: Sequence[Part]) -> tuple[Block, ...]:
    """Return the blocks of a plane split into rows (j) and columns (k); `starts` are those along the swept axis."""
    return tuple(
        Block(
            (row.voxels, column.voxels),
            (row.columns, column.columns),
            tuple((i, j, k) for i in starts for j in row.starts for k in column.starts),
        )
        for row in rows
        for column in columns
    )
