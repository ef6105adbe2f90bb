"""What this process holds in memory, and what the machine has left, as Linux tells it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

STATM: Final = Path("/proc/self/statm")
MEMINFO: Final = Path("/proc/meminfo")
CGROUP: Final = Path("/sys/fs/cgroup")


def resident_bytes() -> int:
    """Return the memory that this process holds now (VmRSS of proc(5))."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """Return the memory that this process can still take: of the machine, or of its control group where that is less.

    The group's page cache counts as taken: an estimate on the safe side.
    """
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    machine = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no control group of version 2, or the root group, which has no limit
        return machine
    return machine if limit == "max" else min(machine, int(limit) - used)
