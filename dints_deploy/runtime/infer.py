"""infer: windows of a prepared scan in, logits out, in order.

A window is a function of its voxels alone, so a window whose voxels all have one value, as air has after clipping, is
run once; later ones of the same value take its logits, bit for bit. Work is proportional to the body, and no label
changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations, groupby, islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dints_deploy.errors import EngineError
from dints_deploy.runtime.blend import Logits
from dints_deploy.runtime.engine import Batch, Handle, Session, check_output
from dints_deploy.runtime.pipeline import Seconds
from dints_deploy.runtime.preprocess import PIECE_BYTES, Prepared
from dints_deploy.runtime.window import Start

Voxels = NDArray[np.float32]

AXIS_OF: Final = {"i": 2, "j": 3, "k": 4}
"""Axis of a batch (N, C, I, J, K)."""


def cut(prepared: Prepared, starts: Sequence[Start], window: Sequence[int]) -> Iterator[tuple[Start, Voxels]]:
    """Yield (start, voxels (C, *window)) of windows ordered by i; only the planes of one window's depth are held.

    Args:
        prepared: makes the voxels.
        starts: of the windows.
        window: (i, j, k) of one window.
    """
    low = [min(start[axis] for start in starts) for axis in (1, 2)]
    high = [max(start[axis] for start in starts) + window[axis] for axis in (1, 2)]
    step = max(1, PIECE_BYTES // (4 * (high[0] - low[0]) * (high[1] - low[1])))
    planes: deque[Voxels] = deque()  # (C, J, K) each, of the planes first ..
    first = made = 0
    for i, group in groupby(starts, key=lambda start: start[0]):
        while planes and first < i:
            planes.popleft()
            first += 1
        first, made = i, max(made, i)
        while made < i + window[0]:
            stop = min(made + step, i + window[0])
            planes.extend(prepared.box((made, *low), (stop, *high)).swapaxes(0, 1))
            made = stop
        for _, j, k in group:
            jk = (slice(j - low[0], j - low[0] + window[1]), slice(k - low[1], k - low[1] + window[2]))
            yield (i, j, k), np.stack([plane[:, *jk] for plane in planes], axis=1)


@dataclass(frozen=True, eq=False)
class Output:
    """What the network says of a window: its start, logits (classes, *window), whether an equal one had been run."""

    start: Start
    logits: Logits
    again: bool


def infer(
    sessions: Sequence[Session],
    windows: Iterable[tuple[Start, Voxels]],
    classes: int,
    tta: Sequence[str],
    *,
    batch: int = 1,
    seconds: Seconds,
) -> Iterator[Output]:
    """Yield the logits of every window, in order: the mean over members and mirrored copies.

    Args:
        sessions: one per member, opened for `batch` windows.
        windows: (start, voxels (C, *window)).
        classes: that a session must return.
        tta: axes mirrored, in all combinations.
        batch: windows per call of a session.
        seconds: where the time spent in the engine goes.

    Raises:
        EngineError: `engine-failed` or `engine-output`.
    """
    planned: deque[_Planned] = deque()

    def distinct() -> Iterator[Voxels]:
        latest: bytes | None = None
        for start, voxels in windows:
            value = constant_value(voxels)
            again = value is not None and value == latest
            planned.append(_Planned(start, value is not None, again))
            latest = latest if value is None else value
            if not again:
                yield voxels

    kept: Logits | None = None
    for logits in _means(distinct(), sessions, classes, mirrors(tta), batch, seconds):
        while planned[0].again and kept is not None:
            yield Output(planned.popleft().start, kept, again=True)
        one = planned.popleft()
        kept = logits if one.constant else kept
        yield Output(one.start, logits, again=False)
    while planned and kept is not None:
        yield Output(planned.popleft().start, kept, again=True)


@dataclass(frozen=True)
class _Planned:
    """A window that was drawn: where it starts, whether it is of one value, whether that value was run before."""

    start: Start
    constant: bool
    again: bool


def constant_value(voxels: Voxels) -> bytes | None:
    """Return the value of each channel where every voxel of the window has it, to the bit; None elsewhere."""
    bits = voxels.view(np.uint32)
    first = bits[:, :1, :1, :1]
    if (bits[:, -1:, -1:, -1:] != first).any() or (bits != first).any():  # the far corner settles nearly all
        return None
    return first.tobytes()


def mirrors(tta: Sequence[str]) -> list[tuple[int, ...]]:
    """Return every combination of mirrored batch axes, the unmirrored one first."""
    axes = [AXIS_OF[axis] for axis in tta]
    return [combination for size in range(len(axes) + 1) for combination in combinations(axes, size)]


def _means(
    windows: Iterator[Voxels],
    sessions: Sequence[Session],
    classes: int,
    flips: Sequence[tuple[int, ...]],
    batch: int,
    seconds: Seconds,
) -> Iterator[Logits]:
    """Yield each window's logits, the mean over sessions and mirrored copies, in order."""
    runs = len(sessions) * len(flips)
    counts: deque[int] = deque()

    def jobs() -> Iterator[Job]:
        while several := list(islice(windows, batch)):
            counts.append(len(several))
            stack = np.zeros((batch, *several[0].shape), np.float32)  # the last batch is filled up with zeros
            np.stack(several, out=stack[: len(several)])
            yield from ((stack, session, flip) for session in sessions for flip in flips)

    results = _run_ahead(jobs(), classes, seconds)
    for total in results:
        for _ in range(runs - 1):
            total = total + next(results)
        if runs > 1:
            total /= np.float32(runs)
        yield from total[: counts.popleft()]


Job = tuple[Batch, Session, tuple[int, ...]]
"""A batch (N, C, I, J, K), which network runs it, which axes are mirrored."""


def _run_ahead(jobs: Iterable[Job], classes: int, seconds: Seconds) -> Iterator[Batch]:
    """Yield each job's logits (N, classes, I, J, K), in order, while the next job already runs."""
    under_way: deque[tuple[Job, Handle]] = deque()

    def finish() -> Batch:
        (batch, session, flip), handle = under_way.popleft()
        with seconds.stage("engine"):
            logits = session.result(handle)
        upright: Batch = np.flip(check_output(logits, _shape(batch, classes), session.info.engine), flip)
        return upright

    try:
        for job in jobs:
            batch, session, flip = job
            with seconds.stage("engine"):
                under_way.append((job, session.submit(np.ascontiguousarray(np.flip(batch, flip)))))
            if len(under_way) >= session.under_way:
                yield finish()
        while under_way:
            yield finish()
    finally:  # a session that stays loaded takes no batch for the next scan while it computes one of this
        for (_, session, _), handle in under_way:
            with suppress(EngineError):
                session.result(handle)


def _shape(batch: Batch, classes: int) -> tuple[int, ...]:
    return (len(batch), classes, *batch.shape[2:])
