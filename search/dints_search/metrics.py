"""The figures of a run as it goes: one JSON object a line, and the same as TensorBoard events.

What was written after the checkpoint that a run resumes from is dropped, so that a run that was killed leaves the same
lines as one that was not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final

from dints_deploy.errors import OutputError
from dints_deploy.files import make_folder, output_error, write_text

FILE: Final = "metrics.jsonl"

Figures = dict[str, float | str]

NO_CURVES: Final = ("step", "time")
"""Figures that are written as they are and not as events."""


class Metrics:
    """A run's metrics, open for more; `step` is the number of steps that are done.

    Args:
        folder: of the run. step: lines of later steps are dropped.
        writes: whether this process is the one that writes.

    Raises:
        OutputError: here and in every method, `disk-full` or `output-unwritable`.
    """

    def __init__(self, folder: Path, *, step: int, writes: bool = True) -> None:
        self._writes, self._path = writes, folder / FILE
        if not writes:
            return
        rewind(folder, step)
        with _writing(self._path):
            self._file = self._path.open("a", encoding="utf-8")
        self._events = Events(make_folder(folder / "events"), step=step)

    def add(self, figures: Figures) -> None:
        """Write the figures of one step."""
        if not self._writes:
            return
        with _writing(self._path):
            self._file.write(json.dumps(figures) + "\n")
            self._file.flush()
        self._events.add(figures)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._writes:
            return
        try:
            with _writing(self._path), ExitStack() as both:
                both.callback(self._file.close)
                both.callback(self._events.close)
        except OutputError:
            if fault is None:  # else what went wrong first is what there is to say
                raise


class Events:
    """The same figures as TensorBoard reads them.

    Not written by torch's `SummaryWriter`: its thread meets a full disk minutes later and prints a traceback.

    Args:
        folder: gets a file. step: what other files of the folder say of later steps is void.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # slow to import, and only wanted here
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._path = folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        with _writing(self._path):
            self._file = self._path.open("xb")
            self._records = RecordWriter(self._file)
            start = SessionLog(status=SessionLog.START)
            for head in (Event(file_version="brain.Event:2"), Event(step=step + 1, session_log=start)):
                head.wall_time = time.time()
                self._records.write(head.SerializeToString())
            self._file.flush()

    def add(self, figures: Figures) -> None:
        """Write the figures of one step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        curves = {name: value for name, value in figures.items() if name not in NO_CURVES}
        values = [Summary.Value(tag=n, simple_value=v) for n, v in curves.items() if not isinstance(v, str)]
        event = Event(wall_time=time.time(), step=int(figures["step"]), summary=Summary(value=values))
        with _writing(self._path):
            self._records.write(event.SerializeToString())
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise output_error(path, error) from error


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
