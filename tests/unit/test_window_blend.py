"""A network that returns its input is put together exactly, whatever the shapes, windows and overlaps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dints_deploy.runtime.blend import Slab, axis_weights, blend
from dints_deploy.runtime.window import Start, axis_starts, window_starts

EXAMPLES = settings(max_examples=60, deadline=None)
OVERLAPS = st.sampled_from([0.0, 0.25, 0.5, 0.625, 0.75, 0.9]) | st.floats(0, 0.9)
Shape = tuple[int, int, int]


@st.composite
def axes(draw: st.DrawFn, *, longest: int = 200) -> tuple[int, int, float]:
    """Draw an axis' length, a window that fits, and an overlap."""
    window = draw(st.integers(1, longest // 2))
    return draw(st.integers(window, longest)), window, draw(OVERLAPS)


@st.composite
def plans(draw: st.DrawFn) -> tuple[Shape, Shape, float]:
    """Draw a small volume's shape, a window that fits, and an overlap."""
    window = draw(st.tuples(*[st.integers(1, 7)] * 3))
    i, j, k = (n + draw(st.integers(0, 9)) for n in window)
    return (i, j, k), window, draw(OVERLAPS)


def windows_of(
    volume: NDArray[np.float32], window: Shape, overlap: float
) -> Iterator[tuple[Start, NDArray[np.float32]]]:
    """Yield what a network that returns its input makes of every window."""
    for i, j, k in window_starts(volume.shape[1:], window, overlap):
        yield (i, j, k), volume[:, i : i + window[0], j : j + window[1], k : k + window[2]].copy()


# --- windows --------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(axes())
def test_windows_along_an_axis_cover_every_voxel_stay_inside_and_never_repeat(axis: tuple[int, int, float]) -> None:
    length, window, overlap = axis
    starts = axis_starts(length, window, overlap)
    covered = np.zeros(length, int)
    for start in starts:
        assert 0 <= start <= length - window
        covered[start : start + window] += 1
    assert covered.min() >= 1
    assert starts == sorted(set(starts))


@EXAMPLES
@given(axes())
def test_neighbouring_windows_overlap_at_least_as_asked_and_there_are_no_more_than_that_needs(
    axis: tuple[int, int, float],
) -> None:
    length, window, overlap = axis
    starts = axis_starts(length, window, overlap)
    share = window * (1 - overlap)
    assert all(step <= max(1, share + 1e-6) for step in np.diff(starts))
    assert len(starts) <= 1 + np.ceil((length - window) / max(1, np.floor(share + 1e-6)))


@pytest.mark.parametrize(
    ("length", "window", "overlap", "starts"),
    [
        (10, 10, 0.5, [0]),
        (11, 10, 0.5, [0, 1]),
        (10, 4, 0.5, [0, 2, 4, 6]),
        (11, 4, 0.5, [0, 2, 4, 6, 7]),
        (12, 4, 0.0, [0, 4, 8]),
        (30, 10, 0.8, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),  # 10 * (1 - 0.8) is 1.9999999999999996
        (3, 1, 0.9, [0, 1, 2]),
    ],
)
def test_starts_by_hand(length: int, window: int, overlap: float, starts: list[int]) -> None:
    assert axis_starts(length, window, overlap) == starts


def test_an_axis_shorter_than_the_window_is_an_error_and_never_an_empty_plan() -> None:
    with pytest.raises(ValueError, match="window 5 is larger than axis 4: pad the volume"):
        axis_starts(4, 5, 0.5)
    with pytest.raises(ValueError, match="window 5 is larger than axis 4"):
        window_starts((8, 4, 8), (5, 5, 5), 0.5)


@EXAMPLES
@given(plans())
def test_windows_cover_every_voxel_of_a_volume_ordered_by_i_then_j_then_k(plan: tuple[Shape, Shape, float]) -> None:
    shape, window, overlap = plan
    starts = window_starts(shape, window, overlap)
    covered = np.zeros(shape, int)
    for i, j, k in starts:
        covered[i : i + window[0], j : j + window[1], k : k + window[2]] += 1
    assert covered.min() >= 1
    assert starts == sorted(set(starts))


# --- weights --------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(axes())
def test_weights_are_positive_and_sum_to_one_at_every_voxel_of_an_axis(axis: tuple[int, int, float]) -> None:
    length, window, overlap = axis
    weights = axis_weights(length, window, overlap)
    total = np.zeros(length)
    for start, weight in weights.items():
        assert (weight > 0).all()
        total[start : start + window] += weight
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    assert list(weights) == axis_starts(length, window, overlap)


def test_the_middle_of_a_window_counts_more_than_its_border() -> None:
    first, second = axis_weights(12, 8, 0.5).values()
    assert first[4] > 0.9  # voxel 4 of the volume: half-way in the first, the border of the second
    assert second[0] < 0.1
    assert first[5] + second[1] == pytest.approx(1)
    np.testing.assert_allclose(first, second[::-1], rtol=1e-6)


# --- reassembly -----------------------------------------------------------------------------------------------------


@EXAMPLES
@given(plans(), st.integers(1, 4), st.integers(0, 2**16))
def test_a_network_that_returns_its_input_is_reassembled_exactly(
    plan: tuple[Shape, Shape, float], channels: int, seed: int
) -> None:
    shape, window, overlap = plan
    volume = np.random.default_rng(seed).uniform(1, 100, (channels, *shape)).astype(np.float32)
    slabs = list(blend(windows_of(volume, window, overlap), shape, window, overlap))
    np.testing.assert_allclose(np.concatenate([s.logits for s in slabs], axis=1), volume, rtol=1e-5)


@EXAMPLES
@given(plans())
def test_slabs_come_in_order_cover_every_plane_once_and_are_no_deeper_than_a_window(
    plan: tuple[Shape, Shape, float],
) -> None:
    shape, window, overlap = plan
    volume = np.ones((1, *shape), np.float32)
    at = 0
    for slab in blend(windows_of(volume, window, overlap), shape, window, overlap):
        assert slab.first == at
        assert slab.logits.shape[1] <= window[0]
        assert slab.logits.shape[2:] == shape[1:]
        at += slab.logits.shape[1]
    assert at == shape[0]


def test_a_finished_slab_is_not_changed_by_later_windows() -> None:
    volume = np.arange(1.0, 25, dtype=np.float32).reshape(1, 24, 1, 1)
    slabs: list[tuple[Slab, NDArray[np.float32]]] = []
    for slab in blend(windows_of(volume, (4, 1, 1), 0.5), (24, 1, 1), (4, 1, 1), 0.5):
        slabs.append((slab, slab.logits.copy()))
    for slab, then in slabs:
        np.testing.assert_array_equal(slab.logits, then)


def test_a_slab_is_yielded_as_soon_as_no_later_window_reaches_it() -> None:
    """Memory is a slab: the first planes are out before the windows behind them have run."""
    taken = 0

    def counted() -> Iterator[tuple[Start, NDArray[np.float32]]]:
        nonlocal taken
        for output in windows_of(np.ones((1, 40, 2, 2), np.float32), (4, 2, 2), 0.5):
            taken += 1
            yield output

    slabs = blend(counted(), (40, 2, 2), (4, 2, 2), 0.5)
    first = next(slabs)
    assert (first.first, first.logits.shape[1]) == (0, 2)
    assert taken == 2


def test_two_networks_that_disagree_blend_to_a_weighted_mean_between_them() -> None:
    """The first window says 0 everywhere, the second 1: the result rises from 0 to 1 across their overlap."""
    outputs = [((0, 0, 0), np.zeros((1, 8, 1, 1), np.float32)), ((4, 0, 0), np.ones((1, 8, 1, 1), np.float32))]
    slabs = list(blend(outputs, (12, 1, 1), (8, 1, 1), 0.5))
    profile = np.concatenate([s.logits for s in slabs], axis=1).ravel()
    np.testing.assert_array_equal(profile[:4], 0)
    np.testing.assert_allclose(profile[8:], 1, rtol=1e-6)
    assert (np.diff(profile[3:9]) > 0).all()
    np.testing.assert_allclose(profile[4:8] + profile[7:3:-1], 1, rtol=1e-5)
