"""Send results: one thread for each destination, each delivery tried alone, always with the stored files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from dints_deploy.errors import DeliveryError
from dints_deploy.files import sha256_file
from dints_deploy.service.audit import record
from dints_deploy.service.fault import reach
from dints_deploy.service.intake import SHORT
from dints_deploy.service.queue import MESSAGE_CHARACTERS
from dints_deploy.service.retry import Policy, after_refusal
from dints_deploy.service.store import Row, Store

LOGGER: Final = logging.getLogger(__name__)

RESULTS: Final = "results"


class Taken(Protocol):
    """What a destination said when it took a result."""

    @property
    def committed(self) -> bool:
        """Say whether it also committed to keep it."""


Send = Callable[[str, Sequence[Path], str], Taken]
"""Destination, files and the job's name -> receipt; raises `DeliveryError`."""


@dataclass(frozen=True)
class Sent:
    """What became of one delivery: its destination, seconds, and the reason code of a failure."""

    destination: str
    seconds: float
    code: str = ""


def deliver_next(store: Store, data_dir: Path, destination: str, send: Send, policy: Policy) -> Sent | None:
    """Send the next result that is due at a destination; None where there is none.

    The state `sent` is written after the destination has it. A crash in between sends the same files again, which a
    destination knows by their UIDs or names.
    """
    due = store.row("due_delivery", {"destination": destination, "now": store.clock.now()})
    if due is None:
        return None
    reach("send-before")
    begin = store.clock.now()
    try:
        files = stored_files(data_dir, due["job_id"], json.loads(due["files"]))
        receipt = send(destination, files, due["job_id"])
    except DeliveryError as error:
        _note_failure(store, due, error, policy)
        about = {"action": "delivery_failed", "job": due["job_id"], "destination": destination, "code": error.code}
        LOGGER.warning("a destination did not take a result", extra=about)
        return Sent(destination, store.clock.now() - begin, error.code)
    reach("send-after")
    _note_success(store, due, committed=receipt.committed)
    reach("send-committed")
    LOGGER.info("delivered", extra={"action": "delivered", "job": due["job_id"], "destination": destination})
    return Sent(destination, store.clock.now() - begin)


def stored_files(data_dir: Path, job: str, files: Mapping[str, str]) -> list[Path]:
    """Return the files of a result, each with the bytes that were stored.

    Raises:
        DeliveryError: `object-damaged` where one is not.
    """
    folder = data_dir / RESULTS / job
    for name, digest in files.items():
        try:
            sound = sha256_file(folder / name) == digest
        except OSError:
            sound = False
        if not sound:
            message = f"expected {name} of job {job} as it was stored, found other bytes or none: retry the job"
            raise DeliveryError("object-damaged", message, retryable=False)
    return [folder / name for name in files]


def _note_success(store: Store, due: Row, *, committed: bool) -> None:
    with store.transaction():
        values = {"job": due["job_id"], "destination": due["destination"], "at": store.clock.stamp()}
        if store.run("delivery_sent", values | {"committed": committed}) == 0:
            return  # purged while it was sent
        record(store, "delivered", study=_study(due), job=due["job_id"], destination=due["destination"])
        _close_job(store, due)


def _note_failure(store: Store, due: Row, error: DeliveryError, policy: Policy) -> None:
    decision = after_refusal(due["attempts"] + 1, policy, retryable=error.retryable)
    with store.transaction():
        values = {
            "job": due["job_id"],
            "destination": due["destination"],
            "state": "pending" if decision.act == "again" else "failed",
            "due": store.clock.now() + decision.wait_s,
            "code": error.code,
            "message": error.message[:MESSAGE_CHARACTERS],
        }
        if store.run("delivery_failed", values) == 0:
            return
        fields = {"destination": due["destination"], "code": error.code, "wait_s": round(decision.wait_s, 1)}
        record(store, "not-delivered", study=_study(due), job=due["job_id"], **fields)
        if decision.act == "quarantine":
            _close_job(store, due)


def _close_job(store: Store, due: Row) -> None:
    """End a job none of whose deliveries is pending."""
    counts = {row["state"]: row["number"] for row in store.rows("delivery_states", {"job": due["job_id"]})}
    if counts.get("pending"):
        return
    failed = store.row("failed_delivery", {"job": due["job_id"]})
    values = {
        "id": due["job_id"],
        "state": "quarantined" if failed is not None else "refused" if due["refused"] else "done",
        "code": due["code"] if failed is None else failed["code"],
        "message": due["message"] if failed is None else failed["message"],
        "now": store.clock.now(),
        "at": store.clock.stamp(),
    }
    store.run("close_job", values)
    record(store, "closed", study=_study(due), job=due["job_id"], state=str(values["state"]))


def _study(due: Row) -> tuple[int, str]:
    return due["study_id"], due["key"][:SHORT]
