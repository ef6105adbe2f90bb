"""Volumes whose every voxel has a known value at a known place in RAS mm, on grids of any orientation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations, product
from typing import Any

import numpy as np
from hypothesis import strategies as st
from nibabel.affines import apply_affine
from numpy.typing import NDArray

from dints_deploy.catalog.entry import Entry
from dints_deploy.imaging.volume import Grid, Volume

Triple = tuple[float, float, float]

ORIENTATIONS = tuple("".join(codes) for axes in permutations(("RL", "AP", "SI")) for codes in product(*axes))
"""All 48 ways in which i, j, k can run along the patient."""

DIRECTIONS = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
"""Letter -> unit vector in RAS."""

MAX_TURN = 0.3
"""Radians about each axis by which an oblique grid is turned: below 45 degrees in all, so its letters stay true."""


def rotation(angles: Sequence[float]) -> NDArray[np.float64]:
    """Return the rotation about x, then y, then z by `angles` in radians."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[b, a], turn[a, b] = np.sin(angle), -np.sin(angle)
        matrix = turn @ matrix
    return matrix


def affine(
    codes: str = "RAS",
    spacing: Triple = (1, 1, 1),
    *,
    origin: Triple = (0, 0, 0),
    angles: Triple = (0, 0, 0),
    shear: float = 0,
) -> NDArray[np.float64]:
    """Return the affine of a grid: axes along `codes`, then turned by `angles`, `j` leaning by `shear` towards `i`."""
    axes = rotation(angles) @ np.array([DIRECTIONS[code] for code in codes], dtype=np.float64).T
    axes[:, 1] += shear * axes[:, 0]
    matrix = np.eye(4)
    matrix[:3, :3] = axes * spacing
    matrix[:3, 3] = origin
    return matrix


def world(shape: Sequence[int], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the RAS mm of every voxel, (I, J, K, 3), by nibabel's arithmetic."""
    indices = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    return np.asarray(apply_affine(matrix, indices), dtype=np.float64)


def noise(shape: Sequence[int], matrix: NDArray[np.float64], *, seed: int = 0, channels: int = 1) -> Volume:
    """Return a volume of random float32 voxels."""
    values = np.random.default_rng(seed).normal(100, 30, (channels, *shape))
    return Volume(values.astype(np.float32), matrix)


def depth_in_ball(grid: Grid, centre: Triple, radius: float) -> NDArray[np.float64]:
    """Return how deep each voxel (I, J, K) lies under the surface of a ball, in mm; negative outside."""
    depth: NDArray[np.float64] = radius - np.linalg.norm(world(grid.shape, grid.affine) - centre, axis=-1)
    return depth


def threshold_logits(data: NDArray[Any], threshold: float) -> NDArray[np.float32]:
    """Return what a network says that calls every voxel above `threshold` label 1: logits (2, I, J, K)."""
    return np.stack([np.zeros_like(data[0]), data[0] - np.float32(threshold)])


@st.composite
def affines(draw: st.DrawFn, *, oblique: bool = True, sheared: bool = False, least: float = 0.4) -> NDArray[np.float64]:
    """Draw an affine: any orientation, anisotropic, turned where `oblique`, leaning where `sheared`."""
    spacing = draw(st.tuples(*[st.floats(least, 5)] * 3))
    origin = draw(st.tuples(*[st.floats(-200, 200)] * 3))
    angles = draw(st.tuples(*[st.floats(-MAX_TURN, MAX_TURN)] * 3)) if oblique else (0.0, 0.0, 0.0)
    shear = draw(st.floats(-0.2, 0.2)) if sheared else 0.0
    return affine(draw(st.sampled_from(ORIENTATIONS)), spacing, origin=origin, angles=angles, shear=shear)


@st.composite
def volumes(
    draw: st.DrawFn, *, least: int = 1, most: int = 9, channels: int = 2, oblique: bool = True, sheared: bool = False
) -> Volume:
    """Draw a volume of random voxels with `least` to `most` of them along each axis."""
    shape = draw(st.tuples(*[st.integers(least, most)] * 3))
    matrix = draw(affines(oblique=oblique, sheared=sheared))
    return noise(shape, matrix, seed=draw(st.integers(0, 2**16)), channels=draw(st.integers(1, channels)))


def entry(labels: int = 1, **changes: Any) -> Entry:
    """Return an entry that accepts nearly everything, with `labels` labels; `changes` replace its fields."""
    tissue = {"value": "85756007", "scheme": "SCT", "meaning": "Tissue"}
    fields: dict[str, Any] = {
        "schema_version": 1,
        "name": "phantom",
        "version": "1.0.0",
        "title": "A phantom",
        "intended_use": "Tests.",
        "licence": "CC0-1.0",
        "members": [{"onnx": "model.onnx"}],
        "channels": [{"name": "MR", "modality": "MR", "intensity": {"scheme": "identity"}}],
        "labels": [
            {
                "value": n,
                "id": f"part-{n}",
                "name": f"Part {n}",
                "colour": [255, 20 * n, 0],
                "category": tissue,
                "type": tissue,
                "nsd_tolerance": 1.0,
            }
            for n in range(1, labels + 1)
        ],
        "window": [8, 8, 8],
        "accepts": {
            "modality": ["MR"],
            "extent_min": [0.1] * 3,
            "extent_max": [1000.0] * 3,
            "spacing_min": [0.1] * 3,
            "spacing_max": [100.0] * 3,
        },
    }
    return Entry.model_validate(fields | changes)
