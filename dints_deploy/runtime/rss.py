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
    """Return the memory that this process can still take, of the machine or of its control group."""
    machine = 1024 * int(_fields(MEMINFO, ":")["MemAvailable"].split()[0])
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        cached = int(_fields(CGROUP / "memory.stat", " ")["inactive_file"])  # given back when others need it
    except (OSError, ValueError, KeyError):  # no control group of version 2, or the root group, which has no limit
        return machine
    return machine if limit == "max" else min(machine, int(limit) - used + cached)


def _fields(path: Path, separator: str) -> dict[str, str]:
    return dict(line.split(separator, 1) for line in path.read_text().splitlines())
