"""No voxel moves in millimetres; each change of grid is undone by its inverse; interpolation agrees with scipy."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from dints_deploy.errors import ScanRefused
from dints_deploy.imaging.geometry import bounding_box, crop, orient, pad, resample, shared_axes, spaced
from dints_deploy.imaging.volume import Grid, Volume
from tests.phantoms import DIRECTIONS, ORIENTATIONS, Triple, affine, affines, noise, volumes, world

EXAMPLES = settings(max_examples=40, deadline=None)
codes = st.sampled_from(ORIENTATIONS)
spacings = st.tuples(*[st.floats(0.4, 6)] * 3)
GRADIENT, OFFSET = np.array([2.0, -3.0, 0.5]), 40.0


def assert_same(found: Volume, expected: Volume) -> None:
    np.testing.assert_array_equal(found.data, expected.data)
    assert found.data.dtype == expected.data.dtype
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-8)


def indices_in(grid: Grid, target: Grid) -> NDArray[np.float64]:
    """Return where the voxels of `target` lie in `grid`, in voxels: (I, J, K, 3)."""
    places = world(target.shape, target.affine) - grid.affine[:3, 3]
    indices: NDArray[np.float64] = places @ np.linalg.inv(grid.affine[:3, :3]).T
    return indices


def ramp(grid: Grid) -> Volume:
    """Return a volume whose value is a linear function of the place in mm."""
    return Volume((world(grid.shape, grid.affine) @ GRADIENT + OFFSET)[np.newaxis], grid.affine)


def clamped_ramp(source: Grid, target: Grid) -> NDArray[np.float64]:
    """Return what linear interpolation of a ramp on `source` must give on `target`; the border voxel counts outside."""
    inside = np.clip(indices_in(source, target), 0, np.array(source.shape) - 1)
    values: NDArray[np.float64] = (inside @ source.affine[:3, :3].T + source.affine[:3, 3]) @ GRADIENT + OFFSET
    return values


# --- orient ---------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(volumes(sheared=True), codes)
def test_orient_then_its_inverse_is_the_original(volume: Volume, target: str) -> None:
    moved, back = orient(volume, target)
    assert_same(back(moved), volume)


@EXAMPLES
@given(volumes(sheared=True), codes, st.data())
def test_orient_never_moves_a_voxel_in_millimetres(volume: Volume, target: str, data: st.DataObject) -> None:
    moved, _ = orient(volume, target)
    i, j, k = (data.draw(st.integers(0, n - 1)) for n in volume.shape)
    place = world(volume.shape, volume.affine)[i, j, k]
    there = np.linalg.solve(moved.affine, [*place, 1])[:3]
    p, q, r = np.rint(there).astype(int)
    np.testing.assert_allclose(there, [p, q, r], atol=1e-6)
    np.testing.assert_array_equal(moved.data[:, p, q, r], volume.data[:, i, j, k])


@pytest.mark.parametrize("target", ORIENTATIONS)
def test_orient_makes_the_axes_point_along_all_48_codes(target: str) -> None:
    for n, source in enumerate(ORIENTATIONS):
        volume = noise((2, 3, 4), affine(source, (1, 2, 3), angles=(0.1, -0.2, 0.15)), seed=n)
        moved, _ = orient(volume, target)
        along = moved.affine[:3, :3] / np.linalg.norm(moved.affine[:3, :3], axis=0)
        for axis, code in enumerate(target):
            assert along[:, axis] @ DIRECTIONS[code] > np.cos(np.pi / 4)


@EXAMPLES
@given(volumes(), codes)
def test_the_inverse_of_orient_takes_labels_made_on_the_new_grid_to_the_place_they_mark(
    volume: Volume, target: str
) -> None:
    moved, back = orient(volume, target)
    labels = Volume((moved.data[:1] > 100).astype(np.uint8), moved.affine)
    returned = back(labels)
    np.testing.assert_array_equal(returned.data, volume.data[:1] > 100)
    assert returned.data.dtype == np.uint8
    assert returned.grid.same_as(volume.grid, 1e-8)


# --- crop and pad ---------------------------------------------------------------------------------------------------


@EXAMPLES
@given(volumes(sheared=True), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=3))
def test_pad_then_its_inverse_is_the_original_and_keeps_every_place(
    volume: Volume, margins: list[tuple[int, int]]
) -> None:
    before, after = zip(*margins, strict=True)
    grown, back = pad(volume, before, after, fill=-7)
    assert_same(back(grown), volume)
    box = tuple(slice(b, b + n) for b, n in zip(before, volume.shape, strict=True))
    np.testing.assert_allclose(world(grown.shape, grown.affine)[box], world(volume.shape, volume.affine), atol=1e-8)
    around = np.ones(grown.shape, bool)
    around[box] = False
    assert (grown.data[:, around] == -7).all()


@EXAMPLES
@given(volumes(sheared=True), st.data())
def test_crop_keeps_every_place_and_its_inverse_surrounds_the_box_with_fill(
    volume: Volume, data: st.DataObject
) -> None:
    start = [data.draw(st.integers(0, n - 1)) for n in volume.shape]
    stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, volume.shape, strict=True)]
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    kept, back = crop(volume, start, stop, fill=-7)
    np.testing.assert_array_equal(kept.data, volume.data[(slice(None), *box)])
    np.testing.assert_allclose(world(kept.shape, kept.affine), world(volume.shape, volume.affine)[box], atol=1e-8)
    expected = np.full_like(volume.data, -7)
    expected[(slice(None), *box)] = volume.data[(slice(None), *box)]
    assert_same(back(kept), Volume(expected, volume.affine))


@pytest.mark.parametrize(
    ("start", "stop"), [((0, 0, 0), (0, 2, 2)), ((-1, 0, 0), (2, 2, 2)), ((0, 0, 0), (2, 2, 4)), ((2, 0, 0), (1, 2, 2))]
)
def test_a_box_that_is_empty_or_leaves_the_volume_is_an_error(
    start: tuple[int, int, int], stop: tuple[int, int, int]
) -> None:
    with pytest.raises(ValueError, match="expected 0 <= start < stop"):
        crop(noise((3, 3, 3), affine()), start, stop)


@EXAMPLES
@given(st.integers(0, 2**16), st.floats(0.01, 0.3))
def test_a_bounding_box_holds_every_marked_voxel_and_touches_one_on_each_face(seed: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((5, 6, 7)) < share
    assume(mask.any())
    start, stop = bounding_box(mask)
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    assert mask[box].sum() == mask.sum()
    assert all(np.take(mask[box], end, axis).any() for axis, end in product(range(3), (0, -1)))


def test_an_empty_mask_has_no_bounding_box() -> None:
    with pytest.raises(ScanRefused) as refusal:
        bounding_box(np.zeros((2, 2, 2), bool))
    assert refusal.value.code == "scan-constant"


# --- spaced ---------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(volumes(sheared=True), spacings)
def test_spaced_keeps_the_centre_the_directions_and_the_box_within_half_a_voxel(
    volume: Volume, spacing: Triple
) -> None:
    old, new = volume.grid, spaced(volume.grid, spacing)
    centres = [grid.affine @ [*((np.array(grid.shape) - 1) / 2), 1] for grid in (old, new)]
    np.testing.assert_allclose(centres[0], centres[1], atol=1e-8)
    np.testing.assert_allclose(new.spacing, spacing, rtol=2e-4)
    np.testing.assert_allclose(new.affine[:3, :3] / new.spacing, old.affine[:3, :3] / old.spacing, atol=1e-9)
    for axis in range(3):
        assert abs(new.extent[axis] - old.extent[axis]) <= spacing[axis] / 2 * 1.001 or new.shape[axis] == 1


def test_spaced_keeps_the_very_grid_where_the_spacing_already_agrees() -> None:
    grid = Grid((5, 6, 7), affine("LPS", (1.00005, 0.99995, 3), angles=(0.1, 0.2, 0.3), origin=(9, 8, 7)))
    kept = spaced(grid, (1, 1, 3))
    assert kept.shape == grid.shape
    np.testing.assert_allclose(kept.affine, grid.affine, atol=1e-12)


# --- resample -------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(volumes(sheared=True), spacings)
def test_linear_resampling_reproduces_a_linear_function_of_millimetres(volume: Volume, spacing: Triple) -> None:
    target = spaced(volume.grid, spacing)
    assert shared_axes(volume.grid, target) is not None
    found, _ = resample(ramp(volume.grid), target)
    assert found.data.dtype == np.float32
    np.testing.assert_allclose(found.data[0], clamped_ramp(volume.grid, target), rtol=1e-5, atol=2e-3)


@EXAMPLES
@given(volumes(least=2), affines(), st.tuples(*[st.integers(1, 6)] * 3))
def test_oblique_resampling_reproduces_a_linear_function_of_millimetres(
    volume: Volume, matrix: NDArray[np.float64], shape: tuple[int, int, int]
) -> None:
    matrix[:3, 3] = volume.affine[:3, 3] + matrix[:3, 3] / 50  # near each other, so that they overlap
    target = Grid(shape, matrix)
    found, _ = resample(ramp(volume.grid), target)
    np.testing.assert_allclose(found.data[0], clamped_ramp(volume.grid, target), rtol=1e-5, atol=2e-3)


@EXAMPLES
@given(volumes(least=2), st.sampled_from([(0.3, 0, 0), (0.1, -0.2, 0.3), (0, 0, 0)]), spacings)
def test_resampling_agrees_with_scipy_point_by_point(volume: Volume, angles: Triple, spacing: Triple) -> None:
    target = Grid((4, 5, 6), affine("RAS", spacing, angles=angles, origin=tuple(volume.affine[:3, 3] + 1)))
    places = np.moveaxis(indices_in(volume.grid, target), -1, 0)
    found, _ = resample(volume, target)
    for ours, channel in zip(found.data, volume.data, strict=True):
        theirs = map_coordinates(channel.astype(np.float64), places, order=1, mode="nearest")
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


@EXAMPLES
@given(volumes(channels=1), affines(), st.tuples(*[st.integers(1, 6)] * 3), st.sampled_from([np.uint8, np.int16]))
def test_nearest_takes_the_label_whose_centre_is_nearest(
    volume: Volume, matrix: NDArray[np.float64], shape: tuple[int, int, int], dtype: type[np.generic]
) -> None:
    labels = Volume((volume.data % 5).astype(dtype), volume.affine)
    matrix[:3, 3] = volume.affine[:3, 3] + matrix[:3, 3] / 50
    target = Grid(shape, matrix)
    found, _ = resample(labels, target, "nearest")
    assert found.data.dtype == dtype
    inside = np.clip(indices_in(labels.grid, target), 0, np.array(labels.shape) - 1)
    tie = (np.abs(inside % 1 - 0.5) < 1e-6).any(axis=-1)
    expected = labels.data[0][tuple(np.moveaxis(np.rint(inside).astype(int), -1, 0))]
    np.testing.assert_array_equal(found.data[0][~tie], expected[~tie])


@EXAMPLES
@given(volumes(channels=1, sheared=True), st.tuples(*[st.floats(0.25, 0.95)] * 3))
def test_labels_resampled_finer_then_back_are_the_original(volume: Volume, shares: Triple) -> None:
    labels = Volume((volume.data % 7).astype(np.uint8), volume.affine)
    finer = [old * share for old, share in zip(volume.grid.spacing, shares, strict=True)]
    moved, back = resample(labels, spaced(labels.grid, finer), "nearest")
    assert_same(back(moved), labels)


@EXAMPLES
@given(volumes(sheared=True), st.tuples(*[st.sampled_from([1, 3, 5])] * 3))
def test_linear_resampling_at_an_odd_fraction_of_the_spacing_then_back_is_the_original(
    volume: Volume, parts: tuple[int, int, int]
) -> None:
    """Every old centre is a new centre then, so nothing is lost."""
    finer = [old / n for old, n in zip(volume.grid.spacing, parts, strict=True)]
    moved, back = resample(volume, spaced(volume.grid, finer))
    assert moved.shape == tuple(n * part for n, part in zip(volume.shape, parts, strict=True))
    returned = back(moved)
    np.testing.assert_allclose(returned.data, volume.data, rtol=1e-4)
    np.testing.assert_array_equal(returned.affine, volume.affine)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.7, 1, 1)])
def test_linear_gives_float32_and_nearest_keeps_the_type_on_any_grid(dtype: type[np.generic], spacing: Triple) -> None:
    volume = Volume(np.arange(64).reshape(1, 4, 4, 4).astype(dtype), affine())
    target = spaced(volume.grid, spacing)
    assert resample(volume, target)[0].data.dtype == np.float32
    assert resample(volume, target, "nearest")[0].data.dtype == dtype


# --- shared axes ----------------------------------------------------------------------------------------------------


@EXAMPLES
@given(affines(), st.sampled_from([(1e-3, 0, 0), (0, 0.1, 0), (0.2, -0.1, 0.3)]))
def test_a_turned_grid_shares_no_axes(matrix: NDArray[np.float64], angles: Triple) -> None:
    turned = matrix.copy()
    turned[:3, :3] = affine(angles=angles)[:3, :3] @ matrix[:3, :3]
    assert shared_axes(Grid((20, 20, 20), matrix), Grid((20, 20, 20), turned)) is None


def test_permuted_axes_are_not_shared_and_flipped_ones_are() -> None:
    source = Grid((4, 5, 6), affine("RAS", origin=(0, 0, 0)))
    assert shared_axes(source, Grid((4, 5, 6), affine("ARS"))) is None
    flipped = shared_axes(source, Grid((4, 5, 6), affine("LAS", origin=(3, 0, 0))))
    assert flipped is not None
    np.testing.assert_array_equal(flipped[0].lower, [3, 2, 1, 0])


@EXAMPLES
@given(volumes(sheared=True), spacings)
def test_every_spaced_grid_shares_its_axes_so_that_logits_can_come_back(volume: Volume, spacing: Triple) -> None:
    oriented, _ = orient(volume)
    assert shared_axes(spaced(oriented.grid, spacing), oriented.grid) is not None
