"""However a run is cut - axes, blocks, batches, windows run once - every label is that of the plain sliding window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dints_deploy.catalog.entry import Entry
from dints_deploy.errors import EngineError
from dints_deploy.imaging.volume import Volume
from dints_deploy.runtime.blend import SIGMA_SHARE, Slab
from dints_deploy.runtime.blocks import Block, blocks_of, parts_of
from dints_deploy.runtime.engine import Batch, Handle, SessionInfo
from dints_deploy.runtime.infer import constant_value, cut
from dints_deploy.runtime.memory import in_order, make_plan, sweep_axis
from dints_deploy.runtime.preprocess import Prepared, prepare
from dints_deploy.runtime.restore import decision, restore
from dints_deploy.runtime.segment import Segmentation, run
from dints_deploy.runtime.window import axis_starts, window_starts
from tests.phantoms import entry, noise, volumes

Shape = tuple[int, int, int]
SPACINGS = st.none() | st.tuples(*[st.floats(4, 9)] * 3)
WINDOWS = st.tuples(*[st.integers(4, 7)] * 3)


@dataclass(frozen=True)
class Slopes:
    """A quick network: per class another weighted sum of a voxel and its three neighbours behind, zero outside."""

    classes: int
    seed: int = 0

    def logits(self, batch: Batch) -> Batch:
        """Return the logits (N, classes, I, J, K) of a batch (N, 1, I, J, K)."""
        weights = np.random.default_rng(self.seed).normal(size=(self.classes, 5)).astype(np.float32)
        out = batch * weights[:, 0, None, None, None] + weights[:, 4, None, None, None]
        out[:, :, 1:] += batch[:, :, :-1] * weights[:, 1, None, None, None]
        out[:, :, :, 1:] += batch[:, :, :, :-1] * weights[:, 2, None, None, None]
        out[..., 1:] += batch[..., :-1] * weights[:, 3, None, None, None]
        return out


class Counting:
    """A session that keeps its batches, and fails where it is told to."""

    info = SessionInfo("slopes", "1", "cpu", "fp32", "a test")

    def __init__(self, network: Slopes, *, fail_at: int | None = None, under_way: int = 2) -> None:
        self.network = network
        self.batches: list[Batch] = []
        self.fail_at = fail_at
        self.under_way = under_way
        self.waited = 0

    def submit(self, batch: Batch) -> Handle:
        """Keep the batch."""
        if len(self.batches) == self.fail_at:
            raise EngineError("engine-failed", "expected to go on, found the end")
        self.batches.append(batch.copy())
        return self.batches[-1]

    def result(self, handle: Handle) -> Batch:
        """Compute now."""
        self.waited += 1
        return self.network.logits(handle)

    def memory_bytes(self) -> int:
        """Nothing lies on a device."""
        return 0


def plain_logits(prepared: Prepared, spec: Entry, network: Slopes) -> NDArray[np.float64]:
    """Return the blended logits (C, I, J, K) on the network's grid: every window run, the whole volume held."""
    bells = [np.exp(-0.5 * ((np.arange(w) - (w - 1) / 2) / (SIGMA_SHARE * w)) ** 2) for w in spec.window]
    weight = bells[0][:, None, None] * bells[1][:, None] * bells[2]
    total = np.zeros((spec.outputs, *prepared.grid.shape))
    weights = np.zeros(prepared.grid.shape)
    for start in window_starts(prepared.grid.shape, spec.window, spec.overlap):
        box = tuple(slice(a, a + w) for a, w in zip(start, spec.window, strict=True))
        total[:, *box] += network.logits(prepared.data[:, *box][np.newaxis])[0] * weight
        weights[box] += weight
    return total / weights


def body_in_air(shape: Shape, seed: int, affine: Any = None) -> Volume:
    """Return a block of noise in air of one value."""
    rng = np.random.default_rng(seed)
    data = np.full(shape, -1000, np.float32)
    box = tuple(slice(n // 3, n // 3 + max(2, n // 4)) for n in shape)
    data[box] = rng.normal(100, 300, data[box].shape)
    return Volume(data[np.newaxis], np.eye(4) if affine is None else affine)


def labels_of(result: Segmentation) -> NDArray[Any]:
    labels: NDArray[Any] = result.labels.data[0]
    return labels


@settings(max_examples=25, deadline=None)
@given(
    volumes(channels=1, least=2, most=9),
    SPACINGS,
    WINDOWS,
    st.sampled_from([0.0, 0.25, 0.5]),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_labels_are_those_of_the_plain_sliding_window(
    scan: Volume, spacing: Any, window: Shape, overlap: float, batch: int, under_way: int
) -> None:
    spec = entry(2, window=window, overlap=overlap, spacing=spacing)
    prepared = prepare(scan, spec.preparation)
    network = Slopes(3, 1)
    result = run(prepared, spec, [Counting(network, under_way=under_way)], batch=batch)
    assert result.labels.grid.same_as(scan.grid)
    expected = plain_logits(prepared, spec, network)
    # restore has its own test against the naive way: here it gets one slab that holds everything
    whole = restore([Slab(0, expected.astype(np.float32))], prepared, decision(spec))
    top = np.sort(expected, axis=0)
    if float((top[-1] - top[-2]).min()) > 1e-3:
        np.testing.assert_array_equal(labels_of(result), whole.data[0])
    else:  # rounding may decide a tie
        assert (labels_of(result) == whole.data[0]).mean() > 0.98


@settings(max_examples=25, deadline=None)
@given(
    volumes(channels=1, least=4, most=12),
    SPACINGS,
    WINDOWS,
    st.sampled_from([0.0, 0.25, 0.5]),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_blocks_give_the_labels_of_one_sweep_to_the_bit(
    scan: Volume, spacing: Any, window: Shape, overlap: float, counts: tuple[int, int]
) -> None:
    spec = entry(3, window=window, overlap=overlap, spacing=spacing)
    prepared = prepare(scan, spec.preparation)
    network = Slopes(4)
    whole = make_plan(prepared, spec)
    assert (len(whole.blocks), whole.again) == (1, 0)
    plan = replace(whole, blocks=in_parts(prepared, spec, whole.along, counts))
    blocks = run(prepared, spec, [Counting(network)], plan=plan)
    np.testing.assert_array_equal(labels_of(blocks), labels_of(run(prepared, spec, [Counting(network)])))


def in_parts(prepared: Prepared, spec: Entry, along: int, counts: tuple[int, int]) -> tuple[Block, ...]:
    """Return the plane of a sweep in so many rows and columns, as far as it has voxels."""
    swept, window = prepared.along(along), in_order(spec.window, along)
    starts = [axis_starts(n, w, spec.overlap) for n, w in zip(swept.grid.shape, window, strict=True)]
    rows, columns = (
        parts_of(swept.back[a], swept.before[a], starts[a], window[a], min(counts[a - 1], swept.oriented.shape[a]))
        for a in (1, 2)
    )
    return blocks_of(starts[0], rows, columns)


# --- windows that need not run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tta", [(), ("i", "k")])
@pytest.mark.parametrize("batch", [1, 3])
def test_air_is_run_once_and_no_label_changes(batch: int, tta: Sequence[str]) -> None:
    scan = body_in_air((30, 26, 34), 3)
    spec = entry(2, window=(8, 8, 8), overlap=0.5, tta=tta)
    prepared = prepare(scan, spec.preparation)
    network = Slopes(3)
    session = Counting(network)
    result = run(prepared, spec, [session], batch=batch)
    ran = sum(1 for b in session.batches[:: 2 ** len(tta)] for window in b if window.any())
    windows = window_starts(prepared.grid.shape, spec.window, spec.overlap)
    air = sum(constant_value(prepared.data[:, i : i + 8, j : j + 8, k : k + 8]) is not None for i, j, k in windows)
    assert air > len(windows) / 2
    assert result.windows_run == ran == len(windows) - air + 1
    assert result.plan.windows == len(windows)
    every = every_window_run(prepared, spec, network)
    np.testing.assert_array_equal(labels_of(result), labels_of(every))


def every_window_run(prepared: Prepared, spec: Entry, network: Slopes) -> Segmentation:
    """Return the result with every window run: voxels one bit apart make none of one value."""
    data = prepared.scan.data.copy()
    data[0, ::2, ::2, ::2] = np.nextafter(data[0, ::2, ::2, ::2], np.float32(np.inf))
    specked = replace(prepared, scan=Volume(data, prepared.scan.affine))
    session = Counting(network)
    result = run(specked, spec, [session])
    assert result.windows_run == result.plan.windows
    return result


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2), st.integers(0, 3), st.integers(0, 2**16))
def test_only_windows_equal_to_the_bit_count_as_of_one_value(channels: int, changed: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=channels).astype(np.float32)
    window = np.broadcast_to(values[:, None, None, None], (channels, 3, 4, 5)).copy()
    assert constant_value(window) == values.tobytes()
    for _ in range(changed):
        place = tuple(rng.integers(0, n) for n in window.shape)
        window[place] = np.nextafter(window[place], np.float32(np.inf))
    assert (constant_value(window) is None) == (changed > 0 and (window != values[:, None, None, None]).any())


def test_zero_and_minus_zero_are_two_values() -> None:
    window = np.zeros((1, 2, 2, 2), np.float32)
    window[0, 1, 0, 1] = -0.0
    assert constant_value(window) is None


# --- the plan -------------------------------------------------------------------------------------------------------


def test_the_sweep_runs_along_the_axis_that_holds_least() -> None:
    assert sweep_axis((512, 512, 600), (96, 96, 96)) == 2
    assert sweep_axis((600, 512, 512), (96, 96, 96)) == 0
    assert sweep_axis((100, 100, 100), (96, 96, 16)) == 2
    assert sweep_axis((100, 100, 100), (16, 96, 96)) == 0


def test_a_limit_splits_the_plane_and_says_what_it_costs() -> None:
    prepared = prepare(noise((200, 180, 160), np.eye(4)), entry(1).preparation)
    spec = entry(12, window=(32, 32, 32), overlap=0.25)
    free = make_plan(prepared, spec)
    assert free.again == 0
    room = free.peak_bytes - (8 << 20)
    tight = make_plan(prepared, spec, room_bytes=room)
    assert len(tight.blocks) > 1
    assert tight.peak_bytes <= room < free.peak_bytes
    assert tight.again == sum(len(block.starts) for block in tight.blocks) - free.windows > 0
    with pytest.raises(EngineError) as caught:
        make_plan(prepared, spec, room_bytes=1 << 20)
    assert caught.value.code == "memory-limit"
    assert "--max-ram" in caught.value.message


# --- cutting --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    volumes(channels=2, least=3, most=12),
    SPACINGS,
    WINDOWS,
    st.integers(0, 2),
)
def test_windows_cut_plane_by_plane_are_those_of_the_whole(
    scan: Volume, spacing: Any, window: Shape, along: int
) -> None:
    scheme = {"scheme": "window", "lower": 60, "upper": 130}
    names = [{"name": f"c{n}", "modality": "MR", "intensity": scheme, "fill": "minimum"} for n in range(scan.channels)]
    spec = entry(1, window=window, spacing=spacing, channels=names)
    prepared = prepare(scan, spec.preparation)
    swept, ordered = prepared.along(along), in_order(window, along)
    starts = window_starts(swept.grid.shape, ordered, 0.5)
    found = list(cut(swept, starts, ordered))
    assert [start for start, _ in found] == starts
    for (i, j, k), voxels in found:
        whole = np.moveaxis(prepared.data, 1 + along, 1)
        expected = whole[:, i : i + ordered[0], j : j + ordered[1], k : k + ordered[2]]
        np.testing.assert_array_equal(voxels, expected)


# --- failing --------------------------------------------------------------------------------------------------------


def test_an_engine_that_fails_in_the_middle_ends_the_run_with_its_own_error() -> None:
    spec = entry(2, window=(8, 8, 8))
    prepared = prepare(noise((30, 30, 30), np.eye(4)), spec.preparation)
    with pytest.raises(EngineError, match="found the end"):
        run(prepared, spec, [Counting(Slopes(3), fail_at=7)])


def test_a_run_that_fails_leaves_no_batch_under_way_in_a_network_that_stays_loaded() -> None:
    spec = entry(2, window=(8, 8, 8))
    prepared = prepare(noise((30, 30, 30), np.eye(4)), spec.preparation)
    session = Counting(Slopes(3), fail_at=7, under_way=3)
    with pytest.raises(EngineError):
        run(prepared, spec, [session])
    assert session.waited == len(session.batches) == 7


def test_progress_counts_every_window_once() -> None:
    spec = entry(2, window=(8, 8, 8))
    prepared = prepare(body_in_air((20, 20, 20), 0), spec.preparation)
    told: list[tuple[int, int]] = []
    result = run(prepared, spec, [Counting(Slopes(3))], progress=lambda *counts: told.append(counts))
    total = result.plan.windows
    assert told == [(n, total) for n in range(1, total + 1)]
