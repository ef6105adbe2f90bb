"""segment: a scan in, a label map out. The main path of the appliance.

check_accepts -> prepare -> windows -> engine -> blend -> restore -> postprocess
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Final

import numpy as np

from dints_deploy.catalog.catalog import LoadedEntry, runnable
from dints_deploy.catalog.entry import Entry
from dints_deploy.imaging.volume import Volume
from dints_deploy.runtime.accepts import check_accepts
from dints_deploy.runtime.blend import Logits, blend
from dints_deploy.runtime.engine import Batch, Handle, Session, SessionInfo, check_output, choose_engine
from dints_deploy.runtime.memory import check_memory
from dints_deploy.runtime.metrics import volume_ml
from dints_deploy.runtime.postprocess import postprocess
from dints_deploy.runtime.preprocess import Prepared, prepare
from dints_deploy.runtime.restore import decision, restore
from dints_deploy.runtime.window import Start, window_starts

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""

UNDER_WAY: Final = 2
"""Windows submitted before the oldest one is waited for."""

AXIS_OF: Final = {"i": 2, "j": 3, "k": 4}
"""Axis of a batch (N, C, I, J, K)."""


@dataclass
class Seconds:
    """Where the time went."""

    by_stage: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.by_stage[name] = self.by_stage.get(name, 0.0) + time.perf_counter() - begin


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A result.

    Attributes:
        labels: (1, I, J, K), smallest unsigned type, on the scan's own grid.
        volumes_ml: label id -> millilitres.
        session: what ran.
        windows: number of network windows.
        seconds: stage -> seconds; `engine` is the time spent waiting for the network.
    """

    labels: Volume
    volumes_ml: dict[str, float]
    session: SessionInfo
    windows: int
    seconds: dict[str, float]


def segment(
    scan: Volume,
    entry: LoadedEntry,
    *,
    engine: str = "auto",
    precision: str = "fp32",
    device: str = "cpu",
    threads: int | None = None,
    max_ram_bytes: int | None = None,
    modality: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Segmentation:
    """Segment a scan with a zoo entry.

    Args:
        scan: (C, I, J, K) with the entry's channels, any orientation and spacing, RAS mm.
        entry: from `load_entry`.
        engine: auto, openvino, onnx or tensorrt.
        precision: fp32; others need a parity certificate made on this machine.
        device: cpu or cuda:N.
        threads: CPU threads, None for all.
        max_ram_bytes: refuse in advance what would need more.
        modality: DICOM Modality where it is known.
        progress: called after every window.

    Raises:
        ScanRefused: the scan is not what the entry accepts.
        EntryError: the entry is damaged. EngineError: the engine is missing or failed.
    """
    spec, seconds = runnable(entry).spec, Seconds()
    check_accepts(scan, spec, modality=modality)
    check_memory(scan, spec, max_ram_bytes)
    with seconds.stage("prepare"):
        prepared = prepare(scan, spec.preparation)
    starts = window_starts(prepared.grid.shape, spec.window, spec.overlap)
    with seconds.stage("load"):
        sessions = open_sessions(
            entry, windows=len(starts), engine=engine, precision=precision, device=device, threads=threads
        )
    return run(prepared, spec, sessions, starts, seconds=seconds, progress=progress)


def open_sessions(
    entry: LoadedEntry,
    *,
    windows: int,
    engine: str = "auto",
    precision: str = "fp32",
    device: str = "cpu",
    threads: int | None = None,
) -> list[Session]:
    """Load the networks of an entry, one session per member; arguments as for `segment`.

    Args:
        windows: how many will run, for the choice of `auto`.
    """
    chosen, why = choose_engine(engine, windows=windows, device=device, threads=threads)
    spec = runnable(entry).spec
    return [
        chosen.open(entry.member_bytes(member), window=spec.window, batch=1, precision=precision, why=why)
        for member in spec.members
    ]


def run(
    prepared: Prepared,
    spec: Entry,
    sessions: Sequence[Session],
    starts: Sequence[Start],
    *,
    seconds: Seconds | None = None,
    progress: Progress = lambda done, total: None,
) -> Segmentation:
    """Run loaded networks over a prepared scan: the part that validation shares with the appliance."""
    seconds = seconds or Seconds()
    expected = (1, spec.outputs, *spec.window)
    with seconds.stage("windows and restore"):
        outputs = infer(sessions, prepared.data, starts, expected, spec.tta, seconds)
        slabs = blend(_counted(outputs, len(starts), progress), prepared.grid.shape, spec.window, spec.overlap)
        labels = restore(slabs, prepared, decision(spec))
    with seconds.stage("postprocess"):
        labels = postprocess(labels, spec)
    volumes = {label.id: volume_ml(labels.data[0], label.value, labels.grid) for label in spec.labels}
    return Segmentation(labels, volumes, sessions[0].info, len(starts), seconds.by_stage)


def infer(
    sessions: Sequence[Session],
    data: Logits,
    starts: Sequence[Start],
    expected: tuple[int, ...],
    tta: Sequence[str],
    seconds: Seconds,
) -> Iterator[tuple[Start, Logits]]:
    """Yield (start, logits (classes, *window)) of every window: the mean over members and mirrored copies.

    Args:
        sessions: one per member.
        data: (C, I, J, K), prepared.
        starts: of the windows.
        expected: (1, classes, *window), the shape that a session must return.
        tta: axes mirrored, in all combinations.
        seconds: where the time spent waiting for the engine goes.
    """
    flips = mirrors(tta)
    runs = len(sessions) * len(flips)
    jobs = ((start, session, flip) for start in starts for session in sessions for flip in flips)
    results = _run_ahead(jobs, data, expected, seconds)
    for start in starts:
        logits = next(results)
        for _ in range(runs - 1):
            logits = logits + next(results)
        yield start, logits if runs == 1 else logits / np.float32(runs)


Job = tuple[Start, Session, tuple[int, ...]]
"""Where a window starts, which network runs it, which axes are mirrored."""


def _run_ahead(jobs: Iterable[Job], data: Logits, expected: tuple[int, ...], seconds: Seconds) -> Iterator[Logits]:
    """Yield each job's logits (classes, *window), in order, while the next job already runs."""
    under_way: deque[tuple[Job, Handle]] = deque()

    def finish() -> Logits:
        (_, session, flip), handle = under_way.popleft()
        with seconds.stage("engine"):
            logits = session.result(handle)
        upright: Logits = np.flip(check_output(logits, expected, session.info.engine), flip)[0]
        return upright

    for job in jobs:
        start, session, flip = job
        with seconds.stage("engine"):
            under_way.append((job, session.submit(_window(data, start, expected[2:], flip))))
        if len(under_way) >= UNDER_WAY:
            yield finish()
    while under_way:
        yield finish()


def mirrors(tta: Sequence[str]) -> list[tuple[int, ...]]:
    """Return every combination of mirrored batch axes, the unmirrored one first."""
    axes = [AXIS_OF[axis] for axis in tta]
    return [combination for size in range(len(axes) + 1) for combination in combinations(axes, size)]


def _window(data: Logits, start: Start, window: Sequence[int], flip: tuple[int, ...]) -> Batch:
    box = tuple(slice(a, a + w) for a, w in zip(start, window, strict=True))
    return np.ascontiguousarray(np.flip(data[(slice(None), *box)][np.newaxis], flip))  # (1, C, *window)


def _counted(outputs: Iterator[tuple[Start, Logits]], total: int, progress: Progress) -> Iterator[tuple[Start, Logits]]:
    for done, output in enumerate(outputs, start=1):
        yield output
        progress(done, total)
