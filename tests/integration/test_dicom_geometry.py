"""Series of any orientation, order, spacing and shear end as volumes with every voxel at its place in RAS mm."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dints_deploy.dicom.findings import REGULARISING, Action, Policy
from dints_deploy.dicom.pixels import decode
from dints_deploy.dicom.read import DicomVolume, read_series
from dints_deploy.dicom.series import collect
from dints_deploy.errors import ScanRefused
from tests.dicom_phantoms import Phantom, scans, straight, write, write_enhanced

TILT_ACCEPTED = Policy({"dicom-tilt": Action.ACCEPT})
PLACE_MM = 0.001
"""Cosines and positions in files are rounded to sixteen characters."""


def rotation(angles: tuple[float, float, float]) -> NDArray[np.float64]:
    """Return a rotation matrix from three angles about x, y and z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        c, s = np.cos(angle), np.sin(angle)
        turn = np.eye(3)
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn[[a, b], [a, b]], turn[a, b], turn[b, a] = c, -s, s
        matrix = turn @ matrix
    return matrix


@st.composite
def phantoms(draw: st.DrawFn, *, tilted: bool = False, uneven: bool = False) -> Phantom:
    """Draw an oblique phantom with any spacing; tilted up to 30 degrees, with uneven steps."""
    angles = [draw(st.floats(-3.1, 3.1)) for _ in range(3)]
    row, column, normal = rotation((angles[0], angles[1], angles[2])).T
    rows, columns = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    steps = draw(st.lists(st.floats(0.5, 6), min_size=2, max_size=6)) if uneven else []
    step, planes = draw(st.floats(0.5, 6)), draw(st.integers(3, 8))
    heights = np.cumsum([0.0, *steps]) if uneven else np.arange(planes) * step
    lean = np.tan(np.radians(draw(st.floats(6, 30)))) if tilted else 0.0
    origin = np.array([draw(st.floats(-300, 300)) for _ in range(3)])
    seed = draw(st.integers(0, 2**16))
    pixels = np.random.default_rng(seed).integers(0, 4000, (len(heights), rows, columns)).astype(np.uint16)
    return Phantom(
        pixels=pixels,
        positions=origin + heights[:, np.newaxis] * (normal + lean * column),
        row=tuple(row.tolist()),
        column=tuple(column.tolist()),
        between_rows=draw(st.floats(0.3, 5)),
        between_columns=draw(st.floats(0.3, 5)),
        slope=draw(st.sampled_from([1.0, 0.5, 2.25])),
        intercept=draw(st.sampled_from([0.0, -1024.0])),
    )


def read(phantom: Phantom, order: list[int], policy: Policy) -> DicomVolume:
    """Write a phantom, its planes in `order`, and read it back."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), phantom, order=order)
        (series,) = collect(Path(folder)).series
        return read_series(series, policy=policy)


def voxel_at(volume: DicomVolume, ras: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the voxel indices (..., 3), not rounded, of places in RAS mm."""
    inverse = np.linalg.inv(volume.volume.affine)
    indices: NDArray[np.float64] = ras @ inverse[:3, :3].T + inverse[:3, 3]
    return indices


def assert_every_pixel_is_at_its_place(volume: DicomVolume, phantom: Phantom) -> None:
    indices = voxel_at(volume, phantom.ras())
    nearest = np.rint(indices).astype(int)
    off = np.abs(indices - nearest) * volume.volume.grid.spacing
    assert off.max() < PLACE_MM
    found = volume.volume.data[0][tuple(np.moveaxis(nearest, -1, 0))]
    np.testing.assert_allclose(found, phantom.values(), rtol=1e-6)


EXAMPLES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@EXAMPLES
@given(phantoms(), st.randoms(use_true_random=False))
def test_every_voxel_of_an_oblique_series_in_any_order_lies_where_its_pixel_does(
    phantom: Phantom, random: object
) -> None:
    order = list(range(len(phantom.pixels)))
    random.shuffle(order)  # type: ignore[attr-defined]
    volume = read(phantom, order, Policy())
    assert not volume.regularised
    assert_every_pixel_is_at_its_place(volume, phantom)


@EXAMPLES
@given(phantoms(tilted=True))
def test_an_accepted_tilt_is_a_sheared_grid_with_every_voxel_at_its_place(phantom: Phantom) -> None:
    volume = read(phantom, list(range(len(phantom.pixels))), TILT_ACCEPTED)
    assert not volume.regularised
    assert_every_pixel_is_at_its_place(volume, phantom)


@EXAMPLES
@given(phantoms(tilted=True, uneven=True))
def test_regularising_reproduces_a_linear_function_of_place_and_returns_labels_within_half_a_voxel(
    phantom: Phantom,
) -> None:
    """Linear interpolation is exact for linear functions, and nearest labels come from at most half a voxel away."""
    ras = phantom.ras()
    gradient = np.array([2.0, -3.0, 5.0])
    offset = 30000 - (ras @ gradient).min()
    pixels = np.rint(ras @ gradient + offset)
    phantom = replace(phantom, pixels=pixels.astype(np.uint32), slope=1.0, intercept=0.0)
    volume = read(phantom, list(range(len(pixels))), REGULARISING)
    assert volume.regularised
    grid = volume.volume.grid
    np.testing.assert_allclose(grid.affine[:3, :3].T @ grid.affine[:3, :3], np.diag(np.square(grid.spacing)), atol=1e-5)

    world = grid.to_world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1).astype(float))
    inside = volume.volume.data[0] > pixels.min()  # elsewhere is the fill, or the clamped border
    border = border_voxels(volume, phantom, world)
    error = np.abs(volume.volume.data[0] - (world @ gradient + offset))[inside & ~border]
    assert error.size == 0 or error.max() < 2.0  # rounding to integers, and positions rounded to DS

    for axis in range(3):  # a label map that says where each voxel is
        for plane, source in zip(volume.planes, volume.to_source(world[..., axis]), strict=True):
            expected = phantom.ras()[index_of(plane.position, phantom)][..., axis]
            reach = 0.5 * np.abs(grid.affine[axis, :3]).sum()
            assert np.abs(source - expected).max() <= reach + PLACE_MM


def border_voxels(volume: DicomVolume, phantom: Phantom, world: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return the voxels that no four pixels of both neighbouring planes surround: those are clamped or filled."""
    first = volume.planes[0]
    along = np.array(volume.report.positions)
    across = np.array(volume.report.across) / [first.between_columns, first.between_rows]
    to_plane = np.linalg.inv(first.affine) @ np.diag([-1.0, -1.0, 1.0, 1.0])
    local = world @ to_plane[:3, :3].T + to_plane[:3, 3]  # column, row, mm along
    below = np.clip(np.searchsorted(along, local[..., 2] + 1e-9, side="right") - 1, 0, len(along) - 2)
    _, rows, columns = phantom.pixels.shape
    bad = (local[..., 2] < -1e-6) | (local[..., 2] > along[-1] + 1e-6)
    for plane in (below, below + 1):
        column, row = local[..., 0] - across[plane, 0], local[..., 1] - across[plane, 1]
        bad |= (column < 0) | (column > columns - 1) | (row < 0) | (row > rows - 1)
    return np.asarray(bad)


def index_of(position: tuple[float, float, float], phantom: Phantom) -> int:
    return int(np.linalg.norm(phantom.positions - position, axis=1).argmin())


@pytest.mark.parametrize(
    ("row", "column"),
    [((-1, 0, 0), (0, -1, 0)), ((1, 0, 0), (0, -1, 0)), ((0, 1, 0), (0, 0, -1)), ((0, 0, 1), (-1, 0, 0))],
)
def test_flipped_and_rotated_planes_are_not_mirrored(row: tuple[float, ...], column: tuple[float, ...]) -> None:
    phantom = straight(row=row, column=column, between_rows=0.8, between_columns=2.5)
    volume = read(phantom, [4, 2, 0, 1, 3], Policy())
    assert_every_pixel_is_at_its_place(volume, phantom)
    assert np.linalg.det(volume.volume.affine[:3, :3]) > 0  # a right-handed stack, as RAS is


def test_an_enhanced_file_with_shared_and_per_frame_groups_equals_its_phantom(tmp_path: Path) -> None:
    phantom = straight(planes=11, slope=0.5, intercept=-100.0, between_rows=0.7)
    phantom = replace(phantom, positions=phantom.positions[::-1].copy())
    write_enhanced(tmp_path / "one.dcm", phantom)
    (series,) = collect(tmp_path).series
    volume = read_series(series)
    assert [plane.header.frame for plane in volume.planes] == list(range(10, -1, -1))
    assert_every_pixel_is_at_its_place(volume, phantom)


def test_labels_go_back_to_the_very_pixels_they_came_from(tmp_path: Path) -> None:
    phantom = straight(planes=6, rows=5, columns=9)
    order = [3, 0, 5, 1, 4, 2]
    write(tmp_path, phantom, order=order)
    (series,) = collect(tmp_path).series
    volume = read_series(series)
    labels = (volume.volume.data[0] > 2000).astype(np.uint8)
    masks = volume.to_source(labels)
    for plane, mask in zip(volume.planes, masks, strict=True):
        index = order[int(plane.header.path.stem)]
        np.testing.assert_array_equal(mask, phantom.pixels[index] > 2000)
        assert mask.dtype == np.uint8
    with pytest.raises(ValueError, match="expected labels of shape"):
        volume.to_source(labels[:-1])


def test_a_tilted_head_ct_with_three_steps_comes_back_to_every_source_slice() -> None:
    """gantry-tilt-ge: +18.5 degrees, steps of 4, 7 and 1.08 mm."""
    (series,) = collect(scans("gantry-tilt-ge")).series
    with pytest.raises(ScanRefused, match=r"steps of 1\.08, 4, 7 mm.*dicom-uneven-steps"):
        read_series(series)
    volume = read_series(series, policy=REGULARISING)
    assert volume.report.tilt == pytest.approx(18.5, abs=0.01)
    assert volume.volume.shape == (512, 611, 134)
    assert len(volume.planes) == len(series.slices) == 28

    world = volume.volume.grid.to_world(
        np.stack(np.meshgrid(*map(np.arange, volume.volume.shape), indexing="ij"), axis=-1).astype(float)
    ).astype(np.float32)
    reach = 0.5 * np.abs(volume.volume.affine[:3, :3]).sum(axis=1) + PLACE_MM
    columns, rows = np.meshgrid(np.arange(512.0), np.arange(512.0))
    for axis in range(3):
        for plane, source in zip(volume.planes, volume.to_source(world[..., axis]), strict=True):
            lps = np.stack([columns, rows, np.zeros_like(rows), np.ones_like(rows)], axis=-1) @ plane.affine.T
            expected = lps[..., axis] * (-1 if axis < 2 else 1)
            assert np.abs(source - expected).max() <= reach[axis]


def test_a_regularised_slice_keeps_the_values_of_its_source_where_both_coincide() -> None:
    """The first plane of the regular grid is the first source plane, shifted by nothing."""
    (series,) = collect(scans("gantry-tilt-ge")).series
    volume = read_series(series, policy=REGULARISING)
    first = volume.planes[0]
    (source,) = decode([first.header])
    start = int(np.rint(voxel_at(volume, np.array(first.position) * [-1, -1, 1])[1]))
    np.testing.assert_array_equal(volume.volume.data[0, :, start : start + 512, 0].T, source)
