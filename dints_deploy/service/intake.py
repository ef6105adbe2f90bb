"""Make what comes in durable: the object under its digest, then its row; only then does `accept` return.

Threads that call at the same time share one transaction: whoever gets the turn commits for all that wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from dints_deploy.dicom.instance import Instance
from dints_deploy.errors import DintsError, IntakeRefused, OutputError
from dints_deploy.files import output_error, sync_folder
from dints_deploy.service.audit import record
from dints_deploy.service.fault import reach
from dints_deploy.service.model import Accepted, Received
from dints_deploy.service.store import Store

LOGGER: Final = logging.getLogger(__name__)

OBJECTS: Final = "objects"
INCOMING: Final = "incoming"
SHORT: Final = 10
"""Characters of a study's name in messages and logs."""

JUDGE_AFTER_S: Final = 0.3
"""Rest after an arrival before a study is judged: during a transfer it would be judged in vain."""

ROOM_SECONDS: Final = 0.5
"""How long a look at the disk's room counts."""

NOT_SLICES: Final = (
    "1.2.840.10008.5.1.4.1.1.7",  # secondary captures
    "1.2.840.10008.5.1.4.1.1.11.",  # presentation states
    "1.2.840.10008.5.1.4.1.1.30",  # parametric maps
    "1.2.840.10008.5.1.4.1.1.66",  # raw data, segmentations, surfaces, registrations, fiducials
    "1.2.840.10008.5.1.4.1.1.88.",  # structured reports
    "1.2.840.10008.5.1.4.1.1.104.",  # encapsulated documents
    "1.2.840.10008.5.1.4.1.1.481.",  # radiotherapy
)
"""Beginnings of SOP class UIDs of objects that are no scan (PS3.4 B.5): a result that a PACS sends back to us is kept,
but makes no new revision."""


@dataclass(frozen=True)
class Room:
    """When intake stops.

    Attributes:
        free_bytes: room that the disk must keep.
        quota_bytes: of objects at most; None for no limit.
    """

    free_bytes: int = 0
    quota_bytes: int | None = None


class _Ticket:
    """One caller's object, and what became of it."""

    def __init__(self, received: Received) -> None:
        self.received = received
        self.answer: Accepted | DintsError | None = None


class DurableIntake:
    """Takes objects into a data folder.

    Attributes:
        arrived: set after every commit, for whoever judges studies.
    """

    def __init__(self, store: Store, data_dir: Path, room: Room) -> None:
        self.arrived = threading.Event()
        self.room = room
        self._store, self._data_dir = store, data_dir
        self._waiting: list[_Ticket] = []
        self._over: list[tuple[str, str]] = []
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._held_bytes = _held(store)
        self._looked_s, self._free_bytes = 0.0, 0
        self._counts: Counter[str] = Counter()
        self._taken_bytes = 0

    def accept(self, received: Received) -> Accepted:
        """Return once file and row are durable; see `model.Intake`."""
        ticket = _Ticket(received)
        try:
            self._check_room(received.size_bytes)
            _sync(received.path)
            reach("intake-synced")
            with self._lock:
                self._waiting.append(ticket)
            with self._turn:
                if ticket.answer is None:
                    self._commit_waiting()
            reach("intake-committed")
            if isinstance(ticket.answer, Accepted):
                return ticket.answer
            raise ticket.answer or AssertionError("a ticket without an answer")
        except DintsError:
            with self._lock:
                self._counts["refused"] += 1
            raise
        finally:
            with contextlib.suppress(OSError):
                received.path.unlink(missing_ok=True)

    def association_closed(self, association: str, *, clean: bool) -> None:
        """Note that an association is over; its studies are judged at once."""
        with self._lock:
            self._over.append((association, "released" if clean else "aborted"))
        try:
            self.note_ends()
        except OutputError:
            LOGGER.warning("the end of an association is noted later", extra={"action": "end_waits"})

    def note_ends(self) -> None:
        """Write what associations are over; call it now and then, for those that found the disk full.

        Raises:
            OutputError: `disk-full`; they are kept for the next call.
        """
        with self._lock:
            over = tuple(self._over)
        if not over:
            return
        with self._store.transaction() as store:
            for association, state in over:
                store.run("close_association", {"id": association, "state": state})
                store.run("judge_association", {"id": association, "now": store.clock.now()})
        with self._lock:
            self._over = [one for one in self._over if one not in over]
        self.arrived.set()

    def remove_objects(self, digests: Sequence[str]) -> None:
        """Remove objects that no row needs any more; intake waits meanwhile."""
        with self._turn:
            self._remove_unneeded(digests)

    def _remove_unneeded(self, digests: Sequence[str]) -> None:
        """Remove objects without a row; called by whoever has the turn."""
        for digest in digests:
            if self._store.row("object_needed", {"sha256": digest}) is None:
                object_path(self._data_dir, digest).unlink(missing_ok=True)
        self._held_bytes = _held(self._store)

    def counts(self) -> tuple[dict[str, int], int]:
        """Return objects by outcome, and bytes taken, since the start."""
        with self._lock:
            return dict(self._counts), self._taken_bytes

    def free_bytes(self) -> int:
        """Return the disk's room, as it was half a second ago at most."""
        if time.monotonic() - self._looked_s > ROOM_SECONDS:
            self._free_bytes, self._looked_s = shutil.disk_usage(self._data_dir).free, time.monotonic()
        return self._free_bytes

    def full(self, size_bytes: int = 0) -> str:
        """Return why an object is not taken that lies in `incoming` already; empty where it is."""
        if self.free_bytes() < self.room.free_bytes:
            return f"expected {self.room.free_bytes} bytes to stay free on the disk, found {self._free_bytes}"
        quota = self.room.quota_bytes
        if quota is not None and self._held_bytes + size_bytes > quota:
            return f"expected at most {quota} bytes of objects, found {self._held_bytes}"
        return ""

    def _check_room(self, size_bytes: int) -> None:
        if found := self.full(size_bytes):
            raise IntakeRefused("intake-disk", f"{found}: free some space, or shorten the retention")

    def _commit_waiting(self) -> None:
        """Place and commit all that wait; called by whoever has the turn."""
        with self._lock:
            batch, self._waiting = self._waiting, []
        try:
            placed = _place(self._data_dir, batch)
            reach("intake-placed")
            with self._store.transaction() as store:
                answers = [_add(store, ticket.received) for ticket in placed]
        except DintsError as error:
            for ticket in batch:
                ticket.answer = ticket.answer or error
            with contextlib.suppress(DintsError):
                self._remove_unneeded([ticket.received.sha256 for ticket in batch])
            return
        for ticket, answer in zip(placed, answers, strict=True):
            ticket.answer = answer
        with self._lock:
            self._counts.update(answer.outcome for answer in answers)
            fresh = [t.received.size_bytes for t, a in zip(placed, answers, strict=True) if a.outcome != "duplicate"]
            self._taken_bytes += sum(fresh)
            self._held_bytes += sum(fresh)
        self.arrived.set()


def object_path(data_dir: Path, digest: str) -> Path:
    """Return where an object lies."""
    return data_dir / OBJECTS / digest[:2] / digest


def study_key(received: Received) -> tuple[str, str]:
    """Return the key of an object's study, and its kind: a NIfTI file is a study of its own."""
    if received.instance is not None:
        text, kind = f"dicom\n{received.instance.StudyInstanceUID}", "dicom"
    else:
        text, kind = f"nifti\n{received.name}\n{received.sha256}", "nifti"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest(), kind


def is_content(instance: Instance | None) -> bool:
    """Say whether an object is part of the scan, so that its arrival makes a new revision."""
    return instance is None or (instance.frames > 0 and not instance.SOPClassUID.startswith(NOT_SLICES))


def _place(data_dir: Path, batch: Sequence[_Ticket]) -> list[_Ticket]:
    """Give durable files their names by digest and make the names durable; return the tickets that have one."""
    placed: list[_Ticket] = []
    folders: set[Path] = set()
    for ticket in batch:
        target = object_path(data_dir, ticket.received.sha256)
        try:
            if not target.parent.is_dir():
                target.parent.mkdir(parents=True, exist_ok=True)
                folders |= {target.parent.parent, data_dir}
            if not target.exists():
                ticket.received.path.rename(target)
            folders.add(target.parent)  # also of a name that was there: whether it is durable is not known
            placed.append(ticket)
        except OSError as error:
            ticket.answer = output_error(target, error)
    for folder in folders:
        sync_folder(folder)
    return placed


def _add(store: Store, received: Received) -> Accepted:
    """Write the rows of an object, inside the batch's transaction."""
    key, kind = study_key(received)
    now = store.clock.now()
    study = store.row("study_by_key", {"key": key})
    if study is None:
        store.run("add_study", {"key": key, "kind": kind, "now": now})
        study = store.row("study_by_key", {"key": key})
    if study is None:
        raise AssertionError("a study that was just written is there")
    if received.association is not None:
        store.run("open_association", {"id": received.association})
    sender = {"study": study["id"], "door": received.door, "calling": received.calling}
    new_door = store.run("add_sender", sender) > 0
    outcome = _add_instance(store, study["id"], received, now)
    if outcome == "conflict":
        record(store, "conflict", study=(study["id"], key[:SHORT]), code="intake-conflict", sha256=received.sha256)
    if outcome == "new" or new_door:
        due = now + (JUDGE_AFTER_S if received.instance is not None else 0.0)
        store.run("study_arrival", {"study": study["id"], "now": now, "due": due})
    return Accepted(outcome, key[:SHORT])


def _add_instance(store: Store, study: int, received: Received, now: float) -> Literal["new", "duplicate", "conflict"]:
    instance = received.instance
    uid = "" if instance is None else instance.SOPInstanceUID
    known = store.rows("instances_of_uid", {"study": study, "uid": uid})
    for row in known:
        if row["sha256"] == received.sha256:
            store.run("restore_instance", {"id": row["id"]})
            return "duplicate"
    values = {
        "study": study,
        "uid": uid,
        "sha256": received.sha256,
        "size": received.size_bytes,
        "header": "" if instance is None else json.dumps(asdict(instance), separators=(",", ":")),
        "name": received.name.encode("utf-8", "replace").decode(),
        "association": received.association,
        "role": "conflict" if known else "content" if is_content(instance) else "extra",
        "now": now,
    }
    store.run("add_instance", values)
    return "conflict" if known else "new"


def _held(store: Store) -> int:
    row = store.row("object_bytes")
    return 0 if row is None else int(row[0])


def _sync(path: Path) -> None:
    """Make a file's bytes durable, and let nobody change them any more."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fchmod(descriptor, 0o400)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise output_error(path, error) from error
