"""The seam for fault injection: named points at which a test kills, hangs or fills this very process.

`DINTS_FAULT` holds `point:nth:act`: at the nth time that the process reaches the point, it acts; `kill` ends it as
kill -9 does, `hang` holds the interpreter's lock for ever, `pause` holds this thread alone, `grow` takes memory until
something stops it. Without the
variable, which no deployment sets, every point does nothing.
"""

from __future__ import annotations

import os
import signal
from functools import cache
from typing import Final

POINTS: Final[dict[str, str]] = {
    "intake-synced": "the object's bytes are durable, it has no name yet",
    "intake-placed": "the object has its name, its row is not written",
    "intake-committed": "file and row are durable, the sender has no answer",
    "seal-before": "a study was judged complete, nothing is written",
    "seal-after": "the revision and its jobs are durable",
    "claim-after": "a worker holds the lease, it was told nothing",
    "work-start": "in the worker: the job is known, nothing is read",
    "work-inputs": "in the worker: the study lies in its folder",
    "work-end": "in the worker: the files are written, nobody was told",
    "finish-before": "the worker answered, its files are not in their place",
    "finish-placed": "the files are in their place, the row is not written",
    "finish-after": "files and row are durable",
    "send-before": "a delivery was chosen, nothing is sent",
    "send-after": "the destination has it, the row is not written",
    "send-committed": "the delivery is durable",
    "audit-appended": "events are exported, the anchor is not moved",
    "purge-rows": "the rows of a study are gone, its files are not",
}
"""Every point, and what is true there."""


class Fault:
    """What is to happen to this process."""

    def __init__(self, setting: str) -> None:
        self._point, self._nth, self._act = "", 0, ""
        if setting:
            self._point, nth, self._act = setting.split(":")
            self._nth = int(nth)
            if self._point not in POINTS or self._act not in ACTS:
                raise ValueError(f"expected point:nth:act in DINTS_FAULT, found {setting!r}")

    def reach(self, point: str) -> None:
        """Count a point, and act where it is time."""
        if point == self._point:
            self._nth -= 1
            if self._nth == 0:
                ACTS[self._act]()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    import ctypes

    ctypes.PyDLL(None).pause()  # PyDLL keeps the interpreter's lock


def _pause() -> None:
    signal.pause()


def _grow() -> None:
    held = []
    while True:
        held.append(bytearray(b"\1" * (16 << 20)))


ACTS: Final = {"kill": _kill, "hang": _hang, "pause": _pause, "grow": _grow}


def reach(point: str) -> None:
    """Say that this process is at a point of `POINTS`."""
    _fault().reach(point)


@cache
def _fault() -> Fault:
    return Fault(os.environ.get("DINTS_FAULT", ""))
