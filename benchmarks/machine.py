"""What a benchmark says about where it ran."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def description() -> dict[str, Any]:
    """Return processor, cores, memory and commit."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.processor()
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit() -> str:
    """Return the commit that is measured."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def origin() -> dict[str, str]:
    """Return the commit and the processor of a run, which it carries where a file gathers runs of several calls."""
    found = description()
    return {name: found[name] for name in ("commit", "processor")}


def read(name: str) -> dict[str, Any] | None:
    """Return what a benchmark wrote before, without the machine; None where it wrote nothing."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    machine = result.pop("machine")
    for run in runs_of(result):
        run.setdefault("processor", machine["processor"])
    return result


def runs_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the runs that a result gathers, in a list or as part -> contender -> runs."""
    runs = result.get("runs", [])
    if isinstance(runs, dict):
        return [run for part in runs.values() for several in part.values() for run in several]
    return list(runs)


def write(name: str, result: dict[str, Any]) -> Path:
    """Write a benchmark's JSON beside its script."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": description(), **result}, indent=1) + "\n")
    return path
