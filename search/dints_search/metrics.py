"""The figures of a run as it goes: one JSON object a line, and the same as TensorBoard events.

What was written after the checkpoint that a run resumes from is dropped, so that a run that was killed leaves the same
lines as one that was not.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Final

from dints_deploy.files import write_text

FILE: Final = "metrics.jsonl"

Figures = dict[str, float | str]


class Metrics:
    """A run's metrics, open for more; `step` is the number of steps that are done.

    Args:
        folder: of the run. step: lines of later steps are dropped.
        writes: whether this process is the one that writes.
    """

    def __init__(self, folder: Path, *, step: int, writes: bool = True) -> None:
        self._writes = writes
        if not writes:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only wanted here

        rewind(folder, step)
        self._file = (folder / FILE).open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder / "events"), purge_step=step + 1)

    def add(self, figures: Figures) -> None:
        """Write the figures of one step."""
        if not self._writes:
            return
        self._file.write(json.dumps(figures) + "\n")
        self._file.flush()
        step = int(figures["step"])
        for name, value in figures.items():
            if name != "step" and not isinstance(value, str):
                self._events.add_scalar(name, value, step)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writes:
            self._file.close()
            self._events.close()


def rewind(folder: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line that a kill has torn."""
    path = folder / FILE
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
        write_text(path, "".join(line + "\n" for line in kept))


def read_metrics(folder: Path) -> list[Figures]:
    """Return the figures of all steps; a torn last line is left out."""
    lines = (folder / FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if _step(line) < float("inf")]


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")
