"""The appliance's own clock: seconds that only go forward, whatever happens to the wall clock.

Within one boot of the machine it is CLOCK_BOOTTIME plus an offset that the database keeps, so that it also passes while
the daemon is down. After another boot it goes on from the newest time that the database holds: leases, waiting times
and retention then take as much longer as the machine was off, which is harmless.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Boot:
    """One boot of the machine: its name, and the seconds since it began."""

    name: str
    since: Callable[[], float]


@dataclass(frozen=True)
class Clock:
    """The appliance's clock.

    Attributes:
        boot: of the machine.
        offset_s: appliance seconds = seconds since boot + offset.
        wall: the wall clock, for people and DICOM objects only.
    """

    boot: Boot
    offset_s: float
    wall: Callable[[], datetime] = lambda: datetime.now(UTC)

    def now(self) -> float:
        """Return appliance seconds."""
        return self.boot.since() + self.offset_s

    def stamp(self) -> str:
        """Return the wall clock's time as ISO 8601 text in UTC, to the millisecond."""
        return self.wall().isoformat(timespec="milliseconds")


def this_boot() -> Boot:
    """Return the running boot of this machine."""
    return Boot(BOOT_ID.read_text().strip(), lambda: time.clock_gettime(time.CLOCK_BOOTTIME))


def continued(boot: Boot, stored: tuple[str, float] | None, newest_s: float) -> Clock:
    """Return the clock that goes on from what a database knows.

    Args:
        boot: the running one.
        stored: name and offset of the boot in which the database was last opened; None for a new one.
        newest_s: the newest appliance time in the database.
    """
    if stored is not None and stored[0] == boot.name:
        return Clock(boot, stored[1])
    return Clock(boot, newest_s - boot.since())
