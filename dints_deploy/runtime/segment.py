"""segment: a scan in, a label map out. The main path of the appliance.

check_accepts -> prepare -> plan -> cut -> infer -> blend -> restore -> postprocess

Cutting windows, running them, and blending and restoring overlap in time: each has a thread. The engine stays in the
thread that opened it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from dints_deploy.catalog.catalog import LoadedEntry, runnable
from dints_deploy.catalog.entry import Entry
from dints_deploy.imaging.volume import Volume
from dints_deploy.runtime.accepts import check_accepts
from dints_deploy.runtime.engine import Session, SessionInfo
from dints_deploy.runtime.memory import UNDER_WAY, Plan, make_plan
from dints_deploy.runtime.metrics import volume_ml
from dints_deploy.runtime.pipeline import Seconds
from dints_deploy.runtime.postprocess import postprocess
from dints_deploy.runtime.preprocess import Prepared, prepare
from dints_deploy.runtime.restore import decision
from dints_deploy.runtime.rss import available_bytes, resident_bytes
from dints_deploy.runtime.sessions import Opened, WarmSessions
from dints_deploy.runtime.sweep import Sweep, busy

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""

SHARE_OF_AVAILABLE: Final = 0.75
"""Of the machine's free memory that a run without a limit may take: the engine needs some, and others are there."""


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A result.

    Attributes:
        labels: (1, I, J, K), smallest unsigned type, on the scan's own grid.
        volumes_ml: label id -> millilitres.
        session: what ran.
        plan: how it ran.
        windows_run: windows that the engine ran; the others took the logits of an equal one.
        network_bytes: memory that the loaded networks hold, as far as it is known.
        seconds: stage -> seconds that it was busy; stages overlap. `engine` is the time spent in the network.
    """

    labels: Volume
    volumes_ml: dict[str, float]
    session: SessionInfo
    plan: Plan
    windows_run: int
    network_bytes: int
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
    warm: WarmSessions | None = None,
    planned: Callable[[Plan], None] = lambda plan: None,
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
        max_ram_bytes: for the whole process; the run is split into blocks to keep it, or refused before it starts.
        modality: DICOM Modality where it is known.
        warm: networks that stay loaded between scans; None loads them for this one.
        planned: called with the plan before the first window.
        progress: called after every window.

    Raises:
        ScanRefused: the scan is not what the entry accepts.
        EntryError: the entry is damaged. EngineError: the engine is missing or failed, or `memory-limit`.
    """
    spec, seconds = runnable(entry).spec, Seconds()
    check_accepts(scan, spec, modality=modality)
    with seconds.stage("prepare"):
        prepared = prepare(scan, spec.preparation)
        plan = _plan(prepared, spec, None, max_ram_bytes)
    with nullcontext(warm) if warm else WarmSessions() as pool:
        with seconds.stage("load"):
            opened = pool.open(
                entry, windows=plan.windows, engine=engine, precision=precision, device=device, threads=threads
            )
            if max_ram_bytes is not None:
                plan = _plan(prepared, spec, opened, max_ram_bytes)
        planned(plan)
        result = run(prepared, spec, opened.sessions, plan=plan, batch=opened.batch, seconds=seconds, progress=progress)
        return replace(result, network_bytes=opened.memory_bytes)


def _plan(prepared: Prepared, spec: Entry, opened: Opened | None, max_ram_bytes: int | None) -> Plan:
    """Return the plan for the memory there is: first without the networks, then beside them, warmed up."""
    if max_ram_bytes is None:
        room = int(SHARE_OF_AVAILABLE * available_bytes())
        return make_plan(prepared, spec, room_bytes=room, under_way=UNDER_WAY + 1)
    if opened is None:
        return make_plan(prepared, spec, room_bytes=max_ram_bytes - resident_bytes())
    opened.warm_up(spec)
    room = max_ram_bytes - resident_bytes()
    return make_plan(prepared, spec, room_bytes=room, batch=opened.batch, under_way=opened.under_way)


def run(
    prepared: Prepared,
    spec: Entry,
    sessions: Sequence[Session],
    *,
    plan: Plan | None = None,
    batch: int = 1,
    seconds: Seconds | None = None,
    progress: Progress = lambda done, total: None,
) -> Segmentation:
    """Run loaded networks over a prepared scan: the part that validation shares with the appliance.

    Args:
        prepared: the scan, axes i, j, k.
        spec: the entry.
        sessions: one per member, opened for `batch` windows.
        plan: of `make_plan`; None for one sweep without blocks.
        batch: windows per call of a session.
        seconds: where the times go.
        progress: called after every window.
    """
    plan, seconds = plan or make_plan(prepared, spec, batch=batch), seconds or Seconds()
    done = ran = 0

    def count(by_engine: bool) -> None:
        nonlocal done, ran
        done, ran = done + 1, ran + by_engine
        progress(done, plan.windows + plan.again)

    swept = prepared.along(plan.along)
    sweep = Sweep(swept, spec, plan.along, sessions, batch, decision(spec), seconds, count)
    labels = np.zeros(swept.oriented.shape, sweep.decide.dtype)
    with seconds.stage("sweep"):
        for block in plan.blocks:
            sweep.fill(labels, block)
    with seconds.stage("postprocess"):
        result = postprocess(swept.unorient(Volume(labels[np.newaxis], swept.oriented.affine)), spec)
    volumes = {label.id: volume_ml(result.data[0], label.value, result.grid) for label in spec.labels}
    held = sum(session.memory_bytes() for session in sessions)
    return Segmentation(result, volumes, sessions[0].info, plan, ran, held, busy(seconds))
