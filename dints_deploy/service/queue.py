"""The queue of jobs: claiming with a lease, keeping it, and every way in which a job ends.

Whoever holds a lease may end the job; an end without it changes nothing, so a worker that was given up, or whose study
grew meanwhile, cannot bring its result in.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from dints_deploy.errors import DintsError
from dints_deploy.service.audit import record
from dints_deploy.service.intake import SHORT
from dints_deploy.service.retry import Policy, after_failure, after_interruption
from dints_deploy.service.store import Row, Store

LEASE_S: Final = 60.0
"""How long a lease holds without a sign of life."""

MESSAGE_CHARACTERS: Final = 500


@dataclass(frozen=True)
class Claimed:
    """A job with its lease.

    Attributes:
        study: row number and short name.
        sealed_at: when its revision was complete: the time that its DICOM objects carry, so that a repeated job writes
            equal ones.
        inputs: SHA-256 and file name of each object.
        supersedes: the job whose result this one's replaces.
    """

    id: str
    lease: str
    study: tuple[int, str]
    kind: str
    revision: int
    route: str
    entry: str
    outputs: tuple[str, ...]
    send_refusals: bool
    supersedes: str | None
    sealed_at: str
    inputs: tuple[tuple[str, str], ...]
    waited_s: float = 0.0


@dataclass(frozen=True)
class Produced:
    """What a worker made of a job.

    Attributes:
        files: file name -> SHA-256, all durable in the job's folder.
        refusal: code and message where the scan was refused; the files, if any, say so.
        about: what goes into the audit trail: entry, weights, engine, digests.
        seconds: stage -> seconds.
    """

    files: Mapping[str, str]
    refusal: tuple[str, str] | None = None
    about: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


def claim(store: Store) -> Claimed | None:
    """Take the next job that is due: higher priority first, then older."""
    now = store.clock.now()
    values = {"lease": secrets.token_hex(8), "now": now, "until": now + LEASE_S}
    with store.transaction():
        row = store.row("claim_job", values)
        if row is None:
            return None
        study = store.row("study", {"id": row["study_id"]})
        revision = store.row("revision", {"study": row["study_id"], "number": row["revision"]})
        if study is None or revision is None:
            raise AssertionError("a job has a study and a revision: foreign keys are on")
        content = store.rows("content", {"study": row["study_id"], "revision": row["revision"]})
        record(store, "claimed", study=(study["id"], study["key"][:SHORT]), job=row["id"], attempt=row["attempts"])
    return Claimed(
        id=row["id"],
        lease=values["lease"] if isinstance(values["lease"], str) else "",
        study=(study["id"], study["key"][:SHORT]),
        kind=study["kind"],
        revision=row["revision"],
        route=row["route"],
        entry=row["entry"],
        outputs=tuple(json.loads(row["outputs"])),
        send_refusals=bool(row["send_refusals"]),
        supersedes=row["supersedes"],
        sealed_at=revision["sealed_at"],
        inputs=tuple((one["sha256"], one["name"]) for one in content),
        waited_s=max(0.0, now - row["created_s"]),
    )


def extend(store: Store, job: Claimed) -> bool:
    """Keep a lease; False where it is lost."""
    values = {"id": job.id, "lease": job.lease, "until": store.clock.now() + LEASE_S}
    return store.run("extend_lease", values) == 1


def finish(store: Store, job: Claimed, produced: Produced) -> bool:
    """Note what a job made, whose files are durable; False where the lease is lost."""
    with store.transaction():
        send = bool(produced.files) and (produced.refusal is None or job.send_refusals)
        code, message = produced.refusal or ("", "")
        values = {
            "id": job.id,
            "lease": job.lease,
            "state": "delivering" if send else "refused",
            "code": code,
            "message": message[:MESSAGE_CHARACTERS],
            "refused": produced.refusal is not None,
            "files": json.dumps(dict(produced.files)),
            "seconds": json.dumps({name: round(value, 3) for name, value in produced.seconds.items()}),
            "now": store.clock.now(),
            "at": store.clock.stamp(),
        }
        if store.run("finish_job", values) == 0:
            return False
        if not send:
            store.run("cancel_deliveries", {"job": job.id, "at": store.clock.stamp()})
        action = "produced" if produced.refusal is None else "refused"
        extra = {"code": code} if code else {}
        record(store, action, study=job.study, job=job.id, files=dict(produced.files), **produced.about, **extra)
    return True


def fail(store: Store, job: Claimed, error: DintsError, policy: Policy, *, crashed: bool) -> str:
    """Note a failed attempt; return what follows: `again`, `quarantine`, or `lost` where the lease is.

    Args:
        crashed: the worker process ended, hung or grew too large, rather than answering.
    """
    with store.transaction():
        row = store.row("leased_job", {"id": job.id, "lease": job.lease})
        if row is None:
            return "lost"
        failures = row["attempts"] - row["interruptions"]
        decision = after_failure(error.code, failures, policy)
        _put_back(store, row, job.study, decision.act, decision.wait_s, (error.code, error.message), crashed=crashed)
    return decision.act


def release(store: Store, job: Claimed) -> None:
    """Give a job back that was not finished, because the daemon stops; it counts as no attempt."""
    with store.transaction():
        if store.run("release_job", {"id": job.id, "lease": job.lease, "now": store.clock.now()}):
            record(store, "released", study=job.study, job=job.id)


def recover(store: Store, policy: Policy) -> int:
    """Put back what was running when the daemon ended; call it once, before any claim. Return how many there were."""
    with store.transaction():
        rows = store.rows("running_jobs")
        for row in rows:
            interruptions = row["interruptions"] + 1
            decision = after_interruption(interruptions, policy)
            store.run("count_interruption", {"id": row["id"]})
            reason = ("worker-crashed", f"the daemon ended {interruptions} times while this job ran")
            _put_back(store, row, _study(store, row), decision.act, decision.wait_s, reason, crashed=False)
    return len(rows)


def expire(store: Store) -> int:
    """Put back jobs whose lease ran out: their part could not even note how they ended. Return how many there were."""
    rows = store.rows("expired_jobs", {"now": store.clock.now()})
    if not rows:
        return 0
    with store.transaction():
        for row in store.rows("expired_jobs", {"now": store.clock.now()}):
            reason = ("worker-hung", "expected its lease to be kept, found it run out")
            _put_back(store, row, _study(store, row), "again", 0.0, reason, crashed=False)
    return len(rows)


def _put_back(
    store: Store,
    row: Row,
    study: tuple[int, str],
    act: str,
    wait_s: float,
    reason: tuple[str, str],
    *,
    crashed: bool,
) -> None:
    values = {
        "id": row["id"],
        "state": "queued" if act == "again" else "quarantined",
        "due": store.clock.now() + wait_s,
        "crashes": int(crashed),
        "code": reason[0],
        "message": reason[1][:MESSAGE_CHARACTERS],
    }
    store.run("put_back_job", values)
    action = "retry" if act == "again" else "quarantined"
    record(store, action, study=study, job=row["id"], code=reason[0], wait_s=round(wait_s, 1))


def _study(store: Store, row: Row) -> tuple[int, str]:
    study = store.row("study", {"id": row["study_id"]})
    return row["study_id"], "" if study is None else study["key"][:SHORT]
