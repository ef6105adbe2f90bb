"""The surface of a voxel mask as surface elements (surfels): one per corner point between voxels, each with its area.

A corner point lies between 2x2x2 voxels. Which of the eight are set is the *neighbour code* of the point: bit
4*i + 2*j + k is the voxel at offset (i, j, k). Code 0 is outside, 255 inside, every other code carries a piece of
surface: polygons whose vertices are the middles of the cell's edges, as in marching cubes (Lorensen and Cline 1987).

The reference (DeepMind's surface-distance; Nikolov et al. 2021, doi 10.2196/26151) stores the 256 sets of triangles.
Three rules give the same areas, in every code and for every spacing:

1. The voxels in the minority (at most four of the eight) are the body; the majority is the background. A code and its
   complement so have the same area. With four against four both choices agree.
2. Body voxels are one body only where they share a face. Voxels that meet in an edge or a point, the ambiguous cases
   of marching cubes, are cut off separately and their areas add up.
3. That leaves six bodies, up to rotation and mirroring. Three have a flat polygon. The polygons of the bent ones (L
   and path) can be triangulated in several ways: of these the one with the *largest* area at unit spacing is taken.
"""

from __future__ import annotations

from functools import cache
from itertools import permutations, product
from typing import Final

import numpy as np
from numpy.typing import NDArray

Row = tuple[int, int, int]
"""A vector area along i, j, k in eighths of the cell's face areas; only magnitudes, the sign has no use here."""

BODIES: Final[tuple[tuple[tuple[int, ...], tuple[Row, ...]], ...]] = (
    ((0,), ((1, 1, 1),)),  # one voxel: a triangle
    ((0, 1), ((4, 4, 0),)),  # two in a row along k: a rectangle
    ((0, 1, 2), ((4, 0, 0), (3, 3, 3))),  # an L in the plane of j and k: a triangle and a trapezoid
    ((0, 1, 2, 3), ((8, 0, 0),)),  # a square in the plane of j and k: a square
    ((0, 1, 2, 4), ((6, 6, 6),)),  # a voxel and its three neighbours: a regular hexagon
    ((1, 0, 2, 6), ((2, 2, 0), (0, 2, 2), (4, 4, 4))),  # a path along k, j, i: four triangles
)
"""The six bodies of rule 3: the voxels that are set, by bit, and the vector areas of their surface."""

MOST_ROWS: Final = 4
"""Vector areas of the richest codes: four voxels of which no two share a face."""


def neighbour_codes(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return the neighbour code of every corner point of a mask, with the outside of the image unset.

    Args:
        mask: (I, J, K).

    Returns:
        (I + 1, J + 1, K + 1): entry (i, j, k) is the low corner of voxel (i, j, k).
    """
    size_i, size_j, size_k = mask.shape
    voxels = mask.view(np.uint8)
    codes = np.zeros((size_i + 1, size_j + 1, size_k + 1), dtype=np.uint8)
    for bit, (i, j, k) in enumerate(product((0, 1), repeat=3)):
        codes[1 - i : 1 - i + size_i, 1 - j : 1 - j + size_j, 1 - k : 1 - k + size_k] |= voxels << bit
    return codes


def surfel_areas(spacing: tuple[float, float, float]) -> NDArray[np.float64]:
    """Return the surface area of every neighbour code in mm2.

    Args:
        spacing: distance of neighbouring voxels along i, j, k in mm.

    Returns:
        (256,), zero for the codes 0 and 255.
    """
    i, j, k = spacing
    faces = np.array([j * k, i * k, i * j])  # mm2, across i, j, k
    areas: NDArray[np.float64] = np.linalg.norm(vector_areas() * faces, axis=-1).sum(axis=-1)
    return areas


@cache
def vector_areas() -> NDArray[np.float64]:
    """Return the vector areas (256, `MOST_ROWS`, 3) of every neighbour code, in units of the cell's face areas."""
    table = np.zeros((256, MOST_ROWS, 3))
    bodies = _bodies_in_every_pose()
    for code in range(1, 255):
        voxels = frozenset(bit for bit in range(8) if code >> bit & 1)
        body = voxels if len(voxels) <= 4 else frozenset(range(8)) - voxels
        rows = [row for part in _face_connected_parts(body) for row in bodies[part]]
        table[code, : len(rows)] = np.array(rows) / 8.0
    table.setflags(write=False)
    return table


def _bodies_in_every_pose() -> dict[frozenset[int], tuple[Row, ...]]:
    poses: dict[frozenset[int], tuple[Row, ...]] = {}
    for (voxels, rows), (a, b, c), mirrored in product(BODIES, permutations(range(3)), range(8)):
        moved = frozenset(_permuted(voxel, (a, b, c)) ^ mirrored for voxel in voxels)
        poses[moved] = tuple((row[a], row[b], row[c]) for row in rows)
    return poses


def _permuted(voxel: int, axes: tuple[int, int, int]) -> int:
    ijk = (voxel >> 2 & 1, voxel >> 1 & 1, voxel & 1)
    i, j, k = (ijk[axis] for axis in axes)
    return 4 * i + 2 * j + k


def _face_connected_parts(voxels: frozenset[int]) -> list[frozenset[int]]:
    parts: list[frozenset[int]] = []
    left = set(voxels)
    while left:
        part: set[int] = set()
        reached = {left.pop()}
        while reached:
            part |= reached
            reached = {voxel ^ step for voxel in reached for step in (1, 2, 4)} & left  # neighbours differ in one bit
            left -= reached
        parts.append(frozenset(part))
    return parts
