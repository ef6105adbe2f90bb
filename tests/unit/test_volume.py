"""A Volume or a Grid that exists is valid, and its lengths are millimetres between places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine
from numpy.typing import NDArray

from dints_deploy.errors import ScanRefused
from dints_deploy.imaging.volume import Grid, Volume
from tests.phantoms import affine, affines, volumes, world

EXAMPLES = settings(max_examples=40, deadline=None)


def broken(**entries: float) -> NDArray[np.float64]:
    matrix = np.eye(4)
    for place, value in entries.items():
        matrix[int(place[1]), int(place[2])] = value
    return matrix


@pytest.mark.parametrize(
    "matrix",
    [
        np.eye(3),
        np.zeros((4, 4)),
        broken(a00=np.nan),
        broken(a03=np.inf),
        broken(a22=0),
        broken(a00=0, a10=1),  # i and j along one line
        broken(a30=1),
        broken(a33=2),
    ],
)
def test_a_grid_without_a_finite_invertible_affine_is_refused(matrix: NDArray[np.float64]) -> None:
    with pytest.raises(ScanRefused) as refusal:
        Grid((2, 2, 2), matrix)
    assert refusal.value.code == "scan-affine"
    with pytest.raises(ScanRefused) as refusal:
        Volume(np.zeros((1, 2, 2, 2)), matrix)
    assert refusal.value.code == "scan-affine"


@pytest.mark.parametrize("shape", [(0, 2, 2), (2, 2, -1), (2, 2), (2, 2, 2, 2)])
def test_a_grid_without_three_positive_axes_is_refused(shape: Any) -> None:
    with pytest.raises(ScanRefused) as refusal:
        Grid(shape, np.eye(4))
    assert refusal.value.code == "scan-dimensions"


@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 2), (0, 2, 2, 2), (1, 2, 0, 2), (1, 1, 2, 2, 2)])
def test_an_array_that_is_not_c_i_j_k_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ScanRefused) as refusal:
        Volume(np.zeros(shape), np.eye(4))
    assert refusal.value.code == "scan-dimensions"


@pytest.mark.parametrize("dtype", [np.complex64, "V3", "U1", object, "M8[s]"])
def test_voxels_that_are_not_real_numbers_are_refused(dtype: Any) -> None:
    with pytest.raises(ScanRefused) as refusal:
        Volume(np.zeros((1, 2, 2, 2), dtype), np.eye(4))
    assert refusal.value.code == "scan-datatype"


def test_a_grid_keeps_its_own_affine_that_nobody_can_change() -> None:
    given_affine = np.eye(4)
    volume = Volume(np.zeros((1, 2, 2, 2)), given_affine)
    given_affine[0, 3] = 7
    assert volume.affine[0, 3] == 0
    with pytest.raises(ValueError, match="read-only"):
        volume.affine[0, 3] = 7


def test_an_affine_of_integers_becomes_float64() -> None:
    grid = Grid((2, 3, 4), np.eye(4, dtype=np.int16))
    assert grid.affine.dtype == np.float64
    assert grid.shape == (2, 3, 4)


@EXAMPLES
@given(volumes(least=2, sheared=True))
def test_spacing_is_the_distance_between_neighbours_and_extent_counts_voxel_borders(volume: Volume) -> None:
    places = world(volume.shape, volume.affine)
    for axis in range(3):
        step = np.linalg.norm(np.diff(places, axis=axis), axis=-1)
        np.testing.assert_allclose(volume.grid.spacing[axis], step, rtol=1e-6)
        first_to_last = np.linalg.norm(np.take(places, -1, axis) - np.take(places, 0, axis), axis=-1).mean()
        assert volume.grid.extent[axis] == pytest.approx(first_to_last + volume.grid.spacing[axis])


@EXAMPLES
@given(affines(sheared=True))
def test_a_voxels_millilitres_are_the_parallelepiped_of_its_edges(matrix: NDArray[np.float64]) -> None:
    i, j, k = matrix[:3, :3].T
    assert Grid((1, 1, 1), matrix).voxel_ml == pytest.approx(abs(np.dot(i, np.cross(j, k))) / 1000)


@EXAMPLES
@given(affines(sheared=True), st.lists(st.tuples(*[st.floats(-50, 50)] * 3), min_size=1, max_size=5))
def test_to_world_is_the_affine(matrix: NDArray[np.float64], indices: list[tuple[float, float, float]]) -> None:
    np.testing.assert_allclose(
        Grid((2, 2, 2), matrix).to_world(np.array(indices)), apply_affine(matrix, indices), atol=1e-9
    )


@EXAMPLES
@given(affines(), st.tuples(*[st.floats(-1, 1)] * 3), st.floats(1e-4, 0.1))
def test_same_grid_means_corners_within_the_tolerance(
    matrix: NDArray[np.float64], direction: tuple[float, float, float], tolerance: float
) -> None:
    moved = matrix.copy()
    moved[:3, 3] += np.array(direction) / max(1e-6, np.abs(direction).max()) * tolerance
    grid = Grid((4, 5, 6), matrix)
    assert grid.same_as(Grid((4, 5, 6), moved), tolerance * 1.01)
    if any(np.abs(direction) > 1e-6):
        assert not grid.same_as(Grid((4, 5, 6), moved), tolerance * 0.99)
    assert not grid.same_as(Grid((4, 5, 7), matrix), 1e9)


def test_a_small_turn_is_seen_at_the_far_corner_of_a_large_grid() -> None:
    straight = Grid((500, 500, 500), affine())
    assert not straight.same_as(Grid((500, 500, 500), affine(angles=(0, 0, 1e-5))))
    assert straight.same_as(Grid((500, 500, 500), affine(angles=(0, 0, 1e-7))))


def test_a_volume_tells_its_channels_and_voxels_apart() -> None:
    volume = Volume(np.zeros((2, 3, 4, 5), bool), np.eye(4))
    assert (volume.channels, volume.shape, volume.grid.shape) == (2, (3, 4, 5), (3, 4, 5))
