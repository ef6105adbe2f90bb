"""The audit trail: one JSON line per event, each with the SHA-256 of the line before, the head anchored elsewhere.

An event is written to the database in the transaction of the change it tells of, so neither is ever there without the
other. From there it is appended to `audit/audit.jsonl` and made durable, and then the anchor (a second file, best on
another disk) is replaced by the number and digest of the last line. After a crash the file may end in a torn line: it
is cut off at the next start and written again from the database. A line that is whole is never changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dints_deploy.errors import ServiceError
from dints_deploy.files import make_private_folder, output_error, sync_folder, write_text
from dints_deploy.service.fault import reach
from dints_deploy.service.store import Store

AUDIT_FILE: Final = Path("audit") / "audit.jsonl"
FIRST: Final = "0" * 64
"""What the first line names as the digest of the line before."""

BATCH: Final = 1000
"""Lines per append."""

TAIL_BYTES: Final = 1 << 16
"""More than the longest line."""


@dataclass(frozen=True)
class Head:
    """The last line of a trail: its number, from 1, and its SHA-256."""

    seq: int
    sha256: str


NOTHING: Final = Head(0, FIRST)


def record(
    store: Store,
    action: str,
    *,
    study: tuple[int, str] | None = None,
    job: str | None = None,
    **fields: str | int | float | bool | list[str] | dict[str, str],
) -> None:
    """Add an event to the trail; call it inside the transaction of the change.

    Args:
        action: what happened, of few fixed words.
        study: row number and short name.
        job: identifier.
        fields: what else; no patient's name, identifier or date, no UID.
    """
    last = store.row("last_event")
    seq, previous = (1, FIRST) if last is None else (last["seq"] + 1, _digest(last["line"].encode()))
    event: dict[str, Any] = {"seq": seq, "previous": previous, "time": store.clock.stamp(), "action": action}
    if study is not None:
        event["study"] = study[1]
    if job is not None:
        event["job"] = job
    line = json.dumps(event | fields, separators=(",", ":"), ensure_ascii=True)
    values = {"seq": seq, "line": line, "study": None if study is None else study[0], "job": job}
    store.run("add_event", values)


class Trail:
    """The exported trail of a data folder."""

    def __init__(self, data_dir: Path, anchor: Path | None) -> None:
        self.path = data_dir / AUDIT_FILE
        self.anchor = anchor or data_dir / "audit.anchor"
        self._head = NOTHING

    def open(self, store: Store) -> None:
        """Cut off a torn last line, and check that file, anchor and database continue each other.

        Raises:
            ServiceError: `audit-broken`. OutputError: the file or anchor cannot be written.
        """
        make_private_folder(self.path.parent)
        try:
            _cut_torn_line(self.path)
        except OSError as error:
            raise output_error(self.path, error) from error
        self._head = _last_line(self.path)
        _check_anchor(self.anchor, self.path, self._head)
        known = store.row("event", {"seq": self._head.seq})
        if self._head != NOTHING and (known is None or _digest(known["line"].encode()) != self._head.sha256):
            raise _broken(self.path, f"line {self._head.seq}, which the database does not know")

    def export(self, store: Store) -> int:
        """Append the events that the file lacks, make them durable, move the anchor; return how many there were."""
        done = 0
        while rows := store.rows("events_after", {"seq": self._head.seq, "limit": BATCH}):
            if rows[0]["seq"] != self._head.seq + 1:
                raise _broken(self.path, f"no event {self._head.seq + 1} in the database")
            lines = [row["line"].encode() for row in rows]
            _append(self.path, b"".join(line + b"\n" for line in lines))
            reach("audit-appended")
            self._head = Head(rows[-1]["seq"], _digest(lines[-1]))
            write_text(self.anchor, json.dumps({"seq": self._head.seq, "sha256": self._head.sha256}) + "\n")
            done += len(rows)
        return done

    @property
    def head(self) -> Head:
        """Return the last line that was exported."""
        return self._head


def verify_trail(data_dir: Path, anchor: Path | None) -> Head:
    """Check every line of a trail against the one before, and the anchor; return the last line.

    A last line without its end is passed over: the daemon may be writing it, or was killed while it did.

    Raises:
        ServiceError: `audit-broken` with the line.
    """
    trail = Trail(data_dir, anchor)
    head = NOTHING
    anchored = read_anchor(trail.anchor)
    for number, line in enumerate(whole_lines(trail.path), 1):
        if (found := _link(line)) != (number, head.sha256):
            raise _broken(trail.path, f"line {number} that does not follow the one before ({found})")
        head = Head(number, _digest(line))
        if anchored is not None and anchored.seq == number and anchored.sha256 != head.sha256:
            raise _broken(trail.path, f"line {number} that is not the one that was anchored")
    if anchored is not None and anchored.seq > head.seq:
        raise _broken(trail.path, f"{head.seq} lines, although line {anchored.seq} was anchored")
    return head


def read_anchor(path: Path) -> Head | None:
    """Return what an anchor holds; None where there is none.

    Raises:
        ServiceError: `audit-broken` where it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Head(int(found["seq"]), str(found["sha256"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(path, f"an anchor that cannot be read ({type(error).__name__})") from error


def whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a trail that are whole, without their ends."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line[:-1]


def _link(line: bytes) -> tuple[int, str] | None:
    """Return the number and the digest of the line before that a line names."""
    try:
        event = json.loads(line)
        return int(event["seq"]), str(event["previous"])
    except (ValueError, KeyError, TypeError):
        return None


def _check_anchor(anchor: Path, path: Path, head: Head) -> None:
    anchored = read_anchor(anchor)
    if anchored is None and head.seq > BATCH:  # fewer: a crash before the first anchor was written
        raise _broken(path, f"{head.seq} lines, but no anchor at {anchor}")
    if anchored is not None and anchored.seq > head.seq:
        raise _broken(path, f"{head.seq} lines, although line {anchored.seq} was anchored")
    if anchored is not None and anchored.seq == head.seq and anchored != head:
        raise _broken(path, f"line {head.seq} that is not the one that was anchored")


def _cut_torn_line(path: Path) -> None:
    """Cut off what follows the last end of a line: an append that a crash broke off."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - TAIL_BYTES)
        file.seek(start)
        keep = start + file.read().rfind(b"\n") + 1
        if keep < size:
            file.truncate(keep)
            os.fsync(file.fileno())


def _last_line(path: Path) -> Head:
    if not path.exists():
        return NOTHING
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().splitlines()
    if not lines:
        return NOTHING
    link = _link(lines[-1])
    if link is None:
        raise _broken(path, "a last line that cannot be read")
    return Head(link[0], _digest(lines[-1]))


def _append(path: Path, data: bytes) -> None:
    new = not path.exists()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if os.write(descriptor, data) != len(data):
                os.ftruncate(descriptor, size)
                raise OSError(28, "No space left on device")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if new:
            sync_folder(path.parent)
    except OSError as error:
        raise output_error(path, error) from error


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _broken(path: Path, found: str) -> ServiceError:
    advice = "keep file and anchor as they are and find out who changed them"
    return ServiceError("audit-broken", f"expected an unbroken audit trail at {path}, found {found}: {advice}")
