"""How commands speak: results on standard output, progress and errors on standard error, JSON where asked for."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated, Any, Protocol

import typer

from dints_deploy.errors import DintsError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]

PLAIN_LINE_SECONDS = 10
"""Time between two lines of progress where standard error is no terminal."""


def say(text: object = "") -> None:
    """Print text, or a rich table, on standard output; text is not marked up."""
    if isinstance(text, str):  # without rich, whose import a quick command would notice
        sys.stdout.write("\n".join(printable(line) for line in text.split("\n")) + "\n")
        return
    from rich.console import Console

    Console().print(text)


def say_json(document: Any) -> None:
    """Print one JSON document on standard output."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def say_error(error: DintsError, about: str = "") -> None:
    """Print an error on standard error, in one line: where, the sentence, the reason code; then its notes, if any."""
    lines = [f"error: {about + ': ' if about else ''}{error}", *(f"  {note}" for note in notes_of(error))]
    sys.stderr.write("".join(f"{printable(line)}\n" for line in lines))


def say_note(text: str) -> None:
    """Print a remark on standard error, in one line."""
    sys.stderr.write(printable(text) + "\n")


def notes_of(error: DintsError) -> list[str]:
    """Return what was noted beside an error, such as where its report lies."""
    return list(getattr(error, "__notes__", []))


def printable(text: str) -> str:
    """Return text with control characters and broken bytes as escapes: names of files can hold any."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def failing(as_json: bool) -> Iterator[None]:
    """Turn a DintsError into its message and its exit code."""
    try:
        yield
    except DintsError as error:
        if as_json:
            say_json({"error": {"code": error.code, "message": error.message}})
        say_error(error)
        raise typer.Exit(error.exit_code) from error


@contextmanager
def resumable() -> Iterator[None]:
    """Say how to go on with long work that a person interrupts."""
    try:
        yield
    except KeyboardInterrupt:
        say_note("interrupted: the same command goes on from the last checkpoint with --resume")
        raise


class Bar(Protocol):
    """Shows how far long work is."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` are done, and a note beside it."""


@contextmanager
def progress(title: str) -> Iterator[Bar]:
    """Yield a function of (done, total, note): a bar with the time left on a terminal, else a line now and then.

    The note stands below the bar, so that no terminal is too narrow for both. Of several processes under `torchrun`
    only the first one shows it.
    """
    if os.environ.get("RANK", "0") != "0":
        yield lambda done, total, note="": None
        return
    if not sys.stderr.isatty():
        yield _plain(printable(title))
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bar, below = Progress(*columns), Text()
    task = bar.add_task(printable(title), total=None)

    def move(done: int, total: int, note: str = "") -> None:
        below.plain = note
        bar.update(task, completed=done, total=total)

    def both() -> Group:
        return Group(bar, *([below] if below.plain else []))

    with Live(get_renderable=both, console=Console(stderr=True), transient=True):
        yield move


def _plain(title: str) -> Bar:
    last = time.monotonic()
    first: tuple[int, float] | None = None  # what is done before counts for nothing: a resumed run, reading the cases

    def line(done: int, total: int, note: str = "") -> None:
        nonlocal last, first
        now = time.monotonic()
        first = first or (done, now)
        if now - last >= PLAIN_LINE_SECONDS:
            last = now
            more = done - first[0]
            left = (
                f", {timedelta(seconds=round((now - first[1]) / more * (total - done)))} left"
                if total > done and more
                else ""
            )
            sys.stderr.write(f"{title}: {done} of {total}{left}{', ' if note else ''}{note}\n")

    return line
