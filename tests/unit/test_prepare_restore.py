"""prepare keeps every value at its place in mm, and restore brings the labels back there: on the scan's own grid."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from dints_deploy.catalog.preparation import Identity, Preparation, Window, ZScore
from dints_deploy.errors import ScanRefused
from dints_deploy.imaging.volume import Grid, Volume
from dints_deploy.runtime.blend import Logits, Slab, blend
from dints_deploy.runtime.intensity import normalise
from dints_deploy.runtime.preprocess import Prepared, prepare
from dints_deploy.runtime.restore import decision, label_dtype, restore
from dints_deploy.runtime.window import Start, window_starts
from tests.phantoms import (
    ORIENTATIONS,
    Triple,
    affine,
    depth_in_ball,
    entry,
    noise,
    threshold_logits,
    volumes,
    world,
)

EXAMPLES = settings(max_examples=50, deadline=None)
SPACINGS = st.none() | st.tuples(*[st.floats(0.5, 5)] * 3)
WINDOWS = st.tuples(*[st.integers(1, 12)] * 3)
CHANNEL = {"name": "MR", "modality": "MR", "intensity": {"scheme": "identity"}}
Shape = tuple[int, int, int]


def preparation(spacing: Triple | None, window: Shape, *, channels: int = 1, **channel: Any) -> Preparation:
    named = [CHANNEL | channel | {"name": f"c{n}"} for n in range(channels)]
    return Preparation.model_validate({"channels": named, "spacing": spacing, "window": window})


def places_in(grid: Grid, target: Grid) -> NDArray[np.float64]:
    """Return where the voxels of `target` lie in `grid`, in voxels, clamped to its border: (3, I, J, K)."""
    places = (world(target.shape, target.affine) - grid.affine[:3, 3]) @ np.linalg.inv(grid.affine[:3, :3]).T
    return np.moveaxis(np.clip(places, 0, np.array(grid.shape) - 1), -1, 0)


def cut(logits: Logits, ends: list[int]) -> Iterator[Slab]:
    """Yield logits (C, I, J, K) in slabs that end before the planes `ends`."""
    edges = sorted({0, logits.shape[1], *(end % logits.shape[1] for end in ends)})
    for first, end in pairwise(edges):
        yield Slab(first, logits[:, first:end].copy())


def naive(logits: Logits, prepared: Prepared) -> NDArray[np.float64]:
    """Return the logits (C, I, J, K) at the scan's own voxels: the whole volume at once, straight from the network."""
    box = tuple(slice(b, b + n) for b, n in zip(prepared.before, prepared.inner.shape, strict=True))
    places = places_in(prepared.inner, prepared.source)
    return np.stack([map_coordinates(c[box].astype(float), places, order=1, mode="nearest") for c in logits])


# --- prepare --------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(volumes(least=2, sheared=True), SPACINGS, WINDOWS)
def test_prepare_keeps_every_value_at_its_place_in_millimetres(
    scan: Volume, spacing: Triple | None, window: Shape
) -> None:
    prepared = prepare(scan, preparation(spacing, window, channels=scan.channels))
    box = tuple(slice(b, b + n) for b, n in zip(prepared.before, prepared.inner.shape, strict=True))
    for ours, channel in zip(prepared.data, scan.data, strict=True):
        expected = map_coordinates(channel.astype(float), places_in(scan.grid, prepared.inner), order=1)
        np.testing.assert_allclose(ours[box], expected, rtol=1e-4)
    whole, inner = (world(grid.shape, grid.affine) for grid in (prepared.grid, prepared.inner))
    np.testing.assert_allclose(whole[box], inner, atol=1e-8)
    assert prepared.data.shape[1:] == prepared.grid.shape
    assert all(n >= w for n, w in zip(prepared.grid.shape, window, strict=True))
    assert prepared.data.dtype == np.float32
    if spacing is not None:
        np.testing.assert_allclose(prepared.grid.spacing, spacing, rtol=2e-4)


@pytest.mark.parametrize("fill", ["zero", "minimum"])
def test_a_scan_smaller_than_the_window_lies_in_the_middle_of_the_fill(fill: str) -> None:
    scan = noise((4, 9, 5), affine())
    prepared = prepare(scan, preparation(None, (8, 8, 8), fill=fill))
    assert (prepared.before, prepared.grid.shape) == ((2, 0, 1), (8, 9, 8))
    expected = np.full((8, 9, 8), 0 if fill == "zero" else scan.data.min(), np.float32)
    expected[2:6, :, 1:6] = scan.data[0]
    np.testing.assert_array_equal(prepared.data[0], expected)


def test_the_fill_is_the_minimum_after_normalisation() -> None:
    scan = noise((4, 4, 4), affine())
    intensity = {"scheme": "window", "lower": 90, "upper": 110}
    prepared = prepare(scan, preparation(None, (6, 4, 4), intensity=intensity, fill="minimum"))
    assert (prepared.data[0, 0] == prepared.data[0, 1:5].min()).all()
    assert prepared.data.min() == 0


def test_the_wrong_number_of_channels_is_refused_naming_those_expected() -> None:
    with pytest.raises(ScanRefused, match=r"expected 2 channel\(s\) \(c0, c1\), found 1") as refusal:
        prepare(noise((4, 4, 4), affine()), preparation(None, (4, 4, 4), channels=2))
    assert refusal.value.code == "scan-channels"


@EXAMPLES
@given(volumes(channels=1, sheared=True, least=3), SPACINGS, WINDOWS)
def test_a_readers_labels_come_to_the_networks_grid_where_they_are_in_millimetres(
    scan: Volume, spacing: Triple | None, window: Shape
) -> None:
    prepared = prepare(scan, preparation(spacing, window))
    reference = Volume((scan.data % 4).astype(np.uint8), scan.affine)
    found = prepared.labels(reference)
    assert found.shape == prepared.grid.shape
    assert found.dtype == np.uint8
    box = tuple(slice(b, b + n) for b, n in zip(prepared.before, prepared.inner.shape, strict=True))
    places = places_in(scan.grid, prepared.inner)
    tie = (np.abs(places % 1 - 0.5) < 1e-6).any(axis=0)
    expected = reference.data[0][tuple(np.rint(places).astype(int))]
    np.testing.assert_array_equal(found[box][~tie], expected[~tie])
    assert np.count_nonzero(found) == np.count_nonzero(found[box])


# --- normalise ------------------------------------------------------------------------------------------------------

SKULL_STRIPPED = np.where(np.arange(1000) % 3, np.random.default_rng(1).gamma(9, 40, 1000), 0).reshape(10, 10, 10)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.float64])
def test_zscore_is_plain_numpy(dtype: type[np.generic]) -> None:
    values = SKULL_STRIPPED.astype(dtype)
    found = normalise(values, ZScore(scheme="zscore"))
    reference = values.astype(np.float64)
    np.testing.assert_allclose(found, (reference - reference.mean()) / reference.std(), rtol=1e-4, atol=1e-5)
    assert found.dtype == np.float32


def test_zscore_with_percentiles_clips_outliers_before_the_statistics() -> None:
    values = SKULL_STRIPPED.astype(np.float32)
    values[0, 0, 0] = 1e6
    found = normalise(values, ZScore(scheme="zscore", clip_percentiles=(1, 99)))
    clipped = np.clip(values.astype(np.float64), *np.percentile(values, (1, 99)))
    np.testing.assert_allclose(found, (clipped - clipped.mean()) / clipped.std(), rtol=1e-4, atol=1e-5)


def test_zscore_of_a_skull_stripped_brain_ignores_zeros_and_keeps_them() -> None:
    values = SKULL_STRIPPED.astype(np.float32)
    found = normalise(values, ZScore(scheme="zscore", nonzero=True, clip_percentiles=(0.5, 99.5)))
    brain = values[values != 0].astype(np.float64)
    brain = np.clip(brain, *np.percentile(brain, (0.5, 99.5)))
    np.testing.assert_allclose(found[values != 0], (brain - brain.mean()) / brain.std(), rtol=1e-4, atol=1e-5)
    assert (found[values == 0] == 0).all()


def test_zscore_keeps_its_digits_at_large_intensities() -> None:
    """Float32 sums of squares would lose the variation of a large mean."""
    values = (1e6 + SKULL_STRIPPED).astype(np.float32)
    found = normalise(values, ZScore(scheme="zscore")).astype(np.float64)
    assert abs(found.mean()) < 1e-4
    assert found.std() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("mean", "std"), [(None, None), (40.0, 25.0)])
def test_a_window_clips_then_scales_to_0_1_or_by_mean_and_std(mean: float | None, std: float | None) -> None:
    values = np.linspace(-2000, 3000, 125).reshape(5, 5, 5).astype(np.int16)
    found = normalise(values, Window(scheme="window", lower=-200, upper=300, mean=mean, std=std))
    clipped = np.clip(values.astype(np.float64), -200, 300)
    expected = (clipped + 200) / 500 if mean is None or std is None else (clipped - mean) / std
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_normalising_never_changes_its_input() -> None:
    schemes = (
        Identity(scheme="identity"),
        Window(scheme="window", lower=0, upper=1),
        ZScore(scheme="zscore", clip_percentiles=(10, 90), nonzero=True),
    )
    for scheme in schemes:
        values = SKULL_STRIPPED.astype(np.float32)
        normalise(values, scheme)
        np.testing.assert_array_equal(values, SKULL_STRIPPED.astype(np.float32))
    np.testing.assert_array_equal(normalise(values, schemes[0]), values)


def test_an_image_that_is_one_value_and_outliers_is_refused() -> None:
    values = np.zeros((10, 10, 10), np.float32)
    values[0, 0, 0] = 5
    with pytest.raises(ScanRefused) as refusal:
        normalise(values, ZScore(scheme="zscore", clip_percentiles=(1, 99)))
    assert refusal.value.code == "scan-constant"


# --- restore --------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    volumes(channels=1, sheared=True, least=2),
    SPACINGS,
    WINDOWS,
    st.integers(2, 5),
    st.lists(st.integers(0, 100), max_size=6),
    st.sampled_from([1, 2000, 1 << 28]),
    st.integers(0, 2**16),
)
def test_restoring_in_slabs_and_blocks_is_the_naive_way_on_the_scans_own_grid(
    scan: Volume, spacing: Triple | None, window: Shape, classes: int, ends: list[int], block: int, seed: int
) -> None:
    prepared = prepare(scan, preparation(spacing, window))
    logits = np.random.default_rng(seed).normal(0, 5, (classes, *prepared.grid.shape)).astype(np.float32)
    labels = restore(cut(logits, ends), prepared, decision(entry(classes - 1)), block_bytes=block)
    assert labels.data.dtype == np.uint8
    assert labels.shape == scan.shape
    np.testing.assert_allclose(labels.affine, scan.affine, atol=1e-8)
    expected = naive(logits, prepared)
    chosen = np.take_along_axis(expected, labels.data.astype(int), axis=0)[0]
    np.testing.assert_allclose(chosen, expected.max(axis=0), atol=1e-3)  # equal but for ties


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(ORIENTATIONS),
    st.tuples(*[st.floats(-0.3, 0.3)] * 3),
    st.sampled_from([(1.0, 1.0, 3.5), (0.8, 2.9, 0.8), (2.2, 1.0, 1.7), (1.0, 1.0, 1.0)]),
    st.tuples(*[st.floats(-150, 150)] * 3),
    st.tuples(*[st.floats(-6, 6)] * 3),
)
def test_the_labels_of_a_shifted_rotated_anisotropic_scan_lie_where_they_should_in_millimetres(
    codes: str, angles: Triple, spacing: Triple, origin: Triple, off: Triple
) -> None:
    shape = (round(46 / spacing[0]), round(50 / spacing[1]), round(42 / spacing[2]))
    grid = Grid(shape, affine(codes, spacing, origin=origin, angles=angles))
    x, y, z = grid.to_world((np.array(shape) - 1) / 2) + off
    depth = depth_in_ball(grid, (x, y, z), 12)
    scan = Volume((depth * 10 + 500)[np.newaxis].astype(np.float32), grid.affine)
    window, overlap = (20, 24, 28), 0.5
    prepared = prepare(scan, preparation((1.3, 1.0, 1.6), window))

    def network() -> Iterator[tuple[Start, Logits]]:
        for i, j, k in window_starts(prepared.grid.shape, window, overlap):
            part = prepared.data[:, i : i + window[0], j : j + window[1], k : k + window[2]]
            yield (i, j, k), threshold_logits(part, 500)

    labels = restore(blend(network(), prepared.grid.shape, window, overlap), prepared, decision(entry()))
    assert labels.grid.same_as(grid, 1e-8)
    found = labels.data[0] == 1
    dice = 2 * np.count_nonzero(found & (depth > 0)) / (np.count_nonzero(found) + np.count_nonzero(depth > 0))
    assert dice > 0.95
    centroid = world(grid.shape, grid.affine)[found].mean(axis=0)
    assert np.linalg.norm(centroid - (x, y, z)) < min(spacing) / 2


def test_regions_of_a_sigmoid_network_overwrite_each_other_in_their_order() -> None:
    regions = [
        {"name": "whole", "labels": [1, 2, 3], "value": 2},
        {"name": "core", "labels": [1, 3], "value": 1},
        {"name": "enhancing", "labels": [3], "value": 3},
    ]
    decide = decision(entry(3, activation="sigmoid", regions=regions))
    logits = np.array([[-1, 0.1, 1, 1, -0.1, 0], [-1, -1, 2, 1, 5, 0], [-1, -1, -3, 0.1, -1, 0]], np.float32)
    labels = decide(logits.reshape(3, 6, 1, 1))
    assert labels.ravel().tolist() == [0, 2, 1, 3, 1, 0]  # sigmoid(0) is one half: not above it
    assert labels.dtype == np.uint8


@pytest.mark.parametrize(("largest", "dtype"), [(1, "u1"), (255, "u1"), (256, "u2"), (65535, "u2"), (65536, "u4")])
def test_labels_have_the_smallest_unsigned_type_that_holds_them(largest: int, dtype: str) -> None:
    assert label_dtype(largest) == np.dtype(dtype)


def test_slabs_that_do_not_cover_the_grid_are_an_error() -> None:
    scan = noise((6, 4, 4), affine())
    prepared = prepare(scan, preparation(None, (4, 4, 4)))
    logits = np.zeros((2, 6, 4, 4), np.float32)
    for slabs in ([], [Slab(0, logits[:, :5])]):
        with pytest.raises(ValueError, match="expected slabs that cover"):
            restore(slabs, prepared, decision(entry()))


def test_a_voxel_is_never_interpolated_between_labels() -> None:
    """Between label 1 and label 3 lies no label 2: logits are interpolated, not labels."""
    prepared = prepare(noise((9, 1, 1), affine()), preparation((4.5, 1, 1), (1, 1, 1)))
    assert prepared.inner.shape == (2, 1, 1)
    logits = np.full((4, 2, 1, 1), -9, np.float32)
    logits[1, 0], logits[3, 1] = 5, 5
    labels = restore([Slab(0, logits)], prepared, decision(entry(3)))
    assert labels.data.ravel().tolist() in ([1] * 4 + [3] * 5, [1] * 5 + [3] * 4)
