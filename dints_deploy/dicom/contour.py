"""Outlines of a binary plane as closed polygons half a pixel from its border pixels' centres, holes joined by keyholes.

Coordinates are (column, row) with the centre of the first pixel at (0, 0).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Polygon = NDArray[np.float64]
"""(n, 2) column and row of each corner; the last corner joins the first."""

BETWEEN_ROWS: Final = 0.25
"""Where, between two rows of pixel centres, a keyhole runs: on no pixel centre, so that every reader fills it alike."""

COLLINEAR: Final = 1e-9


def outlines(mask: NDArray[Any]) -> list[Polygon]:
    """Return polygons around the True pixels (rows, columns): every True centre inside, every False centre outside.

    Marching squares at one half between the centres: the outline is half a pixel from the centres it separates. Holes
    are cut out by the keyhole technique (PS3.3 C.8.8.6.3), because separate contours are summed by some readers.
    """
    from contourpy import FillType, contour_generator

    if not mask.any():
        return []
    padded = np.pad(mask.astype(np.float64), 1)  # closes outlines at the border
    lines = contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, 1.5)
    polygons = []
    for points, offsets in zip(*lines, strict=True):
        rings = [_corners(points[a : b - 1] - 1.0) for a, b in pairwise(offsets)]
        polygons.append(keyholed(rings[0], rings[1:]))
    return polygons


def keyholed(outer: Polygon, holes: list[Polygon]) -> Polygon:
    """Return one polygon that is `outer` without `holes`.

    Each hole is joined to what lies right of it by a channel of no width, the rightmost hole first, so that no channel
    crosses another hole.
    """
    merged = outer
    for hole in sorted(holes, key=lambda ring: -float(ring[:, 0].max())):
        merged = _joined(merged, hole)
    return merged


def _joined(outer: Polygon, hole: Polygon) -> Polygon:
    """Return `outer` with a channel to `hole`, along the line a quarter below the hole's rightmost corner's row."""
    rightmost = float(hole[hole[:, 0].argmax(), 1])
    row = np.floor(rightmost) + BETWEEN_ROWS if rightmost % 1 else rightmost + BETWEEN_ROWS
    start, start_edge = _crossing(hole, row, farthest=True)
    end, end_edge = _crossing(outer, row, farthest=False, beyond=start)
    at_hole, at_outer = np.array([[start, row]]), np.array([[end, row]])
    around = np.roll(hole, -(start_edge + 1), axis=0)  # from the corner after the channel, once around
    if _turns_left(outer) == _turns_left(hole):
        around = around[::-1]
    return np.concatenate([outer[: end_edge + 1], at_outer, at_hole, around, at_hole, at_outer, outer[end_edge + 1 :]])


def _crossing(ring: Polygon, row: float, *, farthest: bool, beyond: float = -np.inf) -> tuple[float, int]:
    """Return the column where `ring` crosses `row`, and its edge: the rightmost, or the first right of `beyond`."""
    following = np.roll(ring, -1, axis=0)
    edges = np.flatnonzero((ring[:, 1] <= row) != (following[:, 1] <= row))
    (x1, y1), (x2, y2) = ring[edges].T, following[edges].T
    columns = x1 + (row - y1) * (x2 - x1) / (y2 - y1)
    right = columns > beyond
    columns, edges = columns[right], edges[right]
    chosen = int(columns.argmax() if farthest else columns.argmin())
    return float(columns[chosen]), int(edges[chosen])


def _turns_left(ring: Polygon) -> bool:
    x, y = ring.T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) > 0


def _corners(ring: Polygon) -> Polygon:
    """Return a ring without the points that lie on a straight line between their neighbours."""
    back, forth = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turn = back[:, 0] * forth[:, 1] - back[:, 1] * forth[:, 0]
    return ring[np.abs(turn) > COLLINEAR]
