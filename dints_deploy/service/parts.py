"""The daemon's threads. A part that fails stops the daemon: there is no part that is dead while the rest looks well."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from dints_deploy.errors import OutputError

LOGGER: Final = logging.getLogger(__name__)

FULL_SECONDS: Final = 5.0
"""Between two attempts of a part that found the disk full."""


class Part:
    """A thread that makes steps until it is told to stop.

    Attributes:
        wake: set it to have the next step made at once.
        problem: why the part cannot do its work at present; empty where it can.
        failed: it ended by a fault.
    """

    def __init__(self, name: str, step: Callable[[], float]) -> None:
        self.wake, self.problem, self.failed = threading.Event(), "", False
        self._step, self._stop = step, threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def name(self) -> str:
        """Return its name."""
        return self._thread.name

    @property
    def alive(self) -> bool:
        """Say whether it still makes steps."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Make no further step."""
        self._stop.set()
        self.wake.set()

    def join(self, seconds: float) -> bool:
        """Wait for the last step; say whether it ended."""
        self._thread.join(max(0.0, seconds))
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.wake.wait(self._one_step())
        except Exception:
            self.failed = True
            LOGGER.exception("a part of the daemon failed", extra={"action": "part_failed", "part": self.name})

    def _one_step(self) -> float:
        """Make a step and return how long to rest; a full disk passes, everything else is a fault."""
        self.wake.clear()
        if self._stop.is_set():
            return 0.0
        try:
            rest = self._step()
        except OutputError as error:
            if error.code != "disk-full":
                raise
            self.problem = f"{self.name}: {error.code}"
            LOGGER.exception("the disk is full", extra={"action": "disk_full", "part": self.name})
            return FULL_SECONDS
        self.problem = ""
        return rest
