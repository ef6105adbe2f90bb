"""What this process holds in memory, and what the machine has left, as Linux tells it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

STATM: Final = Path("/proc/self/statm")
MEMINFO: Final = Path("/proc/meminfo")
MEMBERSHIP: Final = Path("/proc/self/cgroup")
CGROUP: Final = Path("/sys/fs/cgroup")


def resident_bytes() -> int:
    """Return the memory that this process holds now (VmRSS of proc(5))."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_bytes(membership: Path = MEMBERSHIP, groups: Path = CGROUP) -> int:
    """Return the memory that this process can still take, of the machine, of its control group and of those above it.

    Args:
        membership: names the process's group (cgroups(7)).
        groups: where the groups of version 2 are mounted.
    """
    machine = 1024 * int(_fields(MEMINFO, ":")["MemAvailable"].split()[0])
    paths = [Path(line.removeprefix("0::/")) for line in _lines(membership) if line.startswith("0::/")]
    inside = [path for path in paths if ".." not in path.parts]  # a group that this mount does not show
    rooms = [_room(groups / part) for path in inside or [Path()] for part in (path, *path.parents)]
    return min([machine, *(room for room in rooms if room is not None)])


def _room(group: Path) -> int | None:
    """Return what a control group may still take; None for no limit, as the root group has none."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        cached = int(_fields(group / "memory.stat", " ")["inactive_file"])  # given back when others need it
    except (OSError, ValueError, KeyError):
        return None
    return None if limit == "max" else int(limit) - used + cached


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _fields(path: Path, separator: str) -> dict[str, str]:
    return dict(line.split(separator, 1) for line in path.read_text().splitlines())
