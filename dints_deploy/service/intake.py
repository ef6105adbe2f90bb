"""Make what comes in durable: the object under its digest, then its row; only then does `accept` return.

Threads that call at the same time share one transaction: whoever gets the turn commits the rows of all that wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from dints_deploy.dicom.instance import Instance
from dints_deploy.errors import DintsError, IntakeRefused, OutputError
from dints_deploy.service.audit import record
from dints_deploy.service.fault import reach
from dints_deploy.service.model import Accepted, Received
from dints_deploy.service.objects import Objects
from dints_deploy.service.store import Store

LOGGER: Final = logging.getLogger(__name__)

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
        self._objects = Objects(data_dir, _held(store))
        self._looked_s, self._free_bytes = 0.0, 0
        self._counts: Counter[str] = Counter()
        self._taken_bytes = self._coming_bytes = 0

    def accept(self, received: Received) -> Accepted:
        """Return once file and row are durable; see `model.Intake`."""
        try:
            with self._objects.kept(received.sha256):
                with self._room_for(received.size_bytes):
                    self._objects.place(received.path, received.sha256)
                reach("intake-placed")
                answer = self._committed(_Ticket(received))
            reach("intake-committed")
            if self._objects.unwanted(received.sha256):  # its study was removed since the row was written
                with contextlib.suppress(DintsError):
                    self.remove_objects([received.sha256])
            return answer
        except DintsError:
            with self._lock:
                self._counts["refused"] += 1
            with contextlib.suppress(DintsError):
                self.remove_objects([received.sha256])
            raise
        finally:
            with contextlib.suppress(OSError):
                received.path.unlink(missing_ok=True)

    def _committed(self, ticket: _Ticket) -> Accepted:
        """Return once an object's row is durable, by this thread's turn or another's."""
        with self._lock:
            self._waiting.append(ticket)
        with self._turn:
            if ticket.answer is None:
                self._commit_waiting()
        if isinstance(ticket.answer, Accepted):
            return ticket.answer
        raise ticket.answer or AssertionError("a ticket without an answer")

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
        """Remove objects that no row needs any more."""
        self._objects.remove(digests, lambda digest: self._store.row("object_needed", {"sha256": digest}) is not None)

    def counts(self) -> tuple[dict[str, int], int]:
        """Return objects by outcome, and bytes taken, since the start."""
        with self._lock:
            return dict(self._counts), self._taken_bytes

    def free_bytes(self) -> int:
        """Return the disk's room, as it was half a second ago at most."""
        if time.monotonic() - self._looked_s > ROOM_SECONDS:
            self._free_bytes, self._looked_s = shutil.disk_usage(self._data_dir).free, time.monotonic()
        return self._free_bytes

    def check_room(self, size_bytes: int = 0) -> None:
        """Refuse an object that would not be taken, before it is written; see `model.Intake`."""
        _refuse(self.full(size_bytes, unwritten_bytes=size_bytes))

    def full(self, size_bytes: int = 0, *, unwritten_bytes: int = 0) -> str:
        """Return why an object is not taken; empty where it is."""
        if self.free_bytes() - unwritten_bytes < self.room.free_bytes:
            return f"expected {self.room.free_bytes} bytes to stay free on the disk, found {self._free_bytes}"
        quota = self.room.quota_bytes
        if quota is not None and self._objects.held_bytes + self._coming_bytes + size_bytes > quota:
            return f"expected at most {quota} bytes of objects, found {self._objects.held_bytes}"
        return ""

    @contextmanager
    def _room_for(self, size_bytes: int) -> Iterator[None]:
        """Hold room for an object until it is counted among those that are there."""
        with self._lock:
            _refuse(self.full(size_bytes))
            self._coming_bytes += size_bytes
        try:
            yield
        finally:
            with self._lock:
                self._coming_bytes -= size_bytes

    def _commit_waiting(self) -> None:
        """Commit the rows of all that wait; called by whoever has the turn."""
        with self._lock:
            batch, self._waiting = self._waiting, []
        try:
            with self._store.transaction() as store:
                answers = [_add(store, ticket.received) for ticket in batch]
        except DintsError as error:
            for ticket in batch:
                ticket.answer = error
            return
        for ticket, answer in zip(batch, answers, strict=True):
            ticket.answer = answer
        fresh = [t.received.size_bytes for t, a in zip(batch, answers, strict=True) if a.outcome != "duplicate"]
        with self._lock:
            self._counts.update(answer.outcome for answer in answers)
            self._taken_bytes += sum(fresh)
        self.arrived.set()


def _refuse(found: str) -> None:
    if found:
        raise IntakeRefused("intake-disk", f"{found}: free some space, or shorten the retention")


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
