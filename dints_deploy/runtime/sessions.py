"""Networks that stay loaded: the sessions of an entry, opened once and used for every scan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Self

import numpy as np

from dints_deploy.catalog.catalog import LoadedEntry, runnable
from dints_deploy.catalog.entry import Entry
from dints_deploy.errors import EngineError, EntryError
from dints_deploy.runtime.certified import INPUTS_FILE, choose_networks, may_rewrite, not_proven, side_by_side
from dints_deploy.runtime.engine import MOST_PER_CALL, Session, available_threads, choose_name
from dints_deploy.runtime.infer import mirrors
from dints_deploy.runtime.rss import available_bytes, resident_bytes

CALL_VOXELS: Final = 1 << 21
"""Voxels of one call on a GPU: two windows of 96 x 96 x 96 keep it busy, many small ones are not a launch each."""

MEMORY_PER_BYTE: Final = 20
"""Free memory for each byte of a network, to rewrite it: it then holds ten, and the scan wants some too."""


@dataclass(frozen=True, eq=False)
class Opened:
    """The loaded networks of an entry.

    Attributes:
        sessions: one per member.
        batch: windows per call.
        memory_bytes: what the networks hold: as the engine tells, else what the process grew by when they were loaded.
    """

    sessions: tuple[Session, ...]
    batch: int
    memory_bytes: int

    @property
    def under_way(self) -> int:
        """Return how many batches are submitted at a time."""
        return max(session.under_way for session in self.sessions)

    def warm_up(self, spec: Entry) -> None:
        """Run empty windows, so that the memory that running takes is held before the rest is planned."""
        empty = np.zeros((self.batch, len(spec.channels), *spec.window), np.float32)
        for session in self.sessions:
            for handle in [session.submit(empty) for _ in range(session.under_way)]:
                session.result(handle)


class WarmSessions:
    """Opened networks by entry and setting. Use it as a context; leaving it drops them.

    What a scan gets does not depend on the scans before it: short runs, whose `auto` is another engine, long ones,
    whose windows OpenVINO computes side by side, and those whose network is rewritten share none, as these round
    differently.
    """

    def __init__(self) -> None:
        self._opened: dict[tuple[object, ...], Opened] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop all networks."""
        self._opened.clear()

    def open(
        self,
        entry: LoadedEntry,
        *,
        windows: int,
        engine: str = "auto",
        precision: str = "fp32",
        device: str = "cpu",
        threads: int | None = None,
    ) -> Opened:
        """Return the networks of an entry, loaded now or before; arguments and errors as for `open_sessions`."""
        weights = tuple(entry.digests[member.onnx] for member in entry.spec.members)
        runs = runs_of(entry.spec, windows)
        at_once, rewritten = 1, False  # of engines other than OpenVINO, which long and short runs share
        name = choose_name(engine, runs, device)[0] if precision == "fp32" else engine
        if device == "cpu" and name in ("auto", "openvino"):
            at_once = side_by_side(entry.spec, runs, threads or available_threads())
            rewritten = may_rewrite(entry, runs, name, precision)
        proof = (entry.digests[INPUTS_FILE], entry.spec.parity.model_dump_json()) if rewritten else ()
        plain = (weights, entry.spec.window, engine, name, precision, device, threads, at_once)
        key = (*plain, *proof)
        if key not in self._opened:
            before, batch = resident_bytes(), windows_per_call(entry.spec.window, device)
            sessions = open_sessions(
                entry,
                windows=windows,
                batch=batch,
                engine=engine,
                precision=precision,
                device=device,
                threads=threads,
            )
            told = sum(session.memory_bytes() for session in sessions)
            self._opened[key] = Opened(tuple(sessions), batch, told or max(0, resident_bytes() - before))
            if not any(session.info.products_saved for session in sessions):
                self._opened.setdefault(plain, self._opened[key])
        return self._opened[key]


def windows_per_call(window: Sequence[int], device: str) -> int:
    """Return how many windows one call of the engine gets.

    One on a CPU: from 16 x 16 x 16 voxels up, more in one call took as long each (docs/decisions: one window per call).
    """
    return 1 if device == "cpu" else min(MOST_PER_CALL, max(1, CALL_VOXELS // math.prod(window)))


def runs_of(spec: Entry, windows: int) -> int:
    """Return how often networks run for so many windows: once per member and mirrored copy."""
    return windows * len(spec.members) * len(mirrors(spec.tta))


def open_sessions(
    entry: LoadedEntry,
    *,
    windows: int,
    batch: int = 1,
    engine: str = "auto",
    precision: str = "fp32",
    device: str = "cpu",
    threads: int | None = None,
) -> list[Session]:
    """Load the networks of an entry, one session per member.

    Args:
        entry: with weights.
        windows: how many will run, for the choice of `auto`; each runs once per member and mirrored copy.
        batch: windows per call.
        engine, precision, device, threads: as for `segment`.

    Raises:
        UsageError, EntryError, EngineError: as for `segment`.
    """
    spec = runnable(entry).spec
    runs = runs_of(spec, windows)

    choose = partial(
        choose_networks, entry, windows=runs, engine=engine, precision=precision, device=device, threads=threads
    )

    def opened(*, fewer_products: bool, note: str = "") -> list[Session]:
        chosen, networks, why = choose(fewer_products=fewer_products)
        told = why + note
        return [chosen.open(data, window=spec.window, batch=batch, precision=precision, why=told) for data in networks]

    if not may_rewrite(entry, runs, choose_name(engine, runs, device)[0], precision):
        return opened(fewer_products=False)
    sessions, fault = _proven(entry, opened)
    return sessions or opened(fewer_products=False, note=f"; as it is written: {fault}" if fault else "")


def _proven(entry: LoadedEntry, opened: Callable[..., list[Session]]) -> tuple[list[Session], str]:
    """Return networks that may have been rewritten and are proven; none, and why, where they cannot be used.

    Whatever is wrong with them, the network as it is written can still run.
    """
    needed = MEMORY_PER_BYTE * sum((entry.folder / member.onnx).stat().st_size for member in entry.spec.members)
    if available_bytes() < needed:
        return [], f"rewritten, it would want {needed / 2**30:.1f} GiB of free memory"
    try:
        sessions = opened(fewer_products=True)
        faults = [not_proven(entry, session) for session in sessions if session.info.products_saved]
    except (EngineError, EntryError) as error:
        return [], f"rewritten, {error.message}"
    return ([], f"rewritten, expected {faults[0]}") if any(faults) else (sessions, "")
