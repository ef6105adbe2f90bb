"""What an operator can see of jobs and do with them; the daemon may run meanwhile, or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from dints_deploy.errors import ServiceError
from dints_deploy.service.audit import record
from dints_deploy.service.intake import SHORT
from dints_deploy.service.store import DATABASE, Row, Store, open_store

RETRIED: Final = frozenset({"quarantined", "refused"})
STOPPED: Final = frozenset({"queued", "running", "delivering"})


def open_existing(data_dir: Path) -> Store:
    """Open the database of a data folder that a daemon has made.

    Raises:
        ServiceError: `store-failed` where there is none; as `open_store`.
    """
    if not (data_dir / DATABASE).is_file():
        message = f"expected a database in {data_dir}, found none: start dints-deploy watch once, or name another"
        raise ServiceError("store-failed", message)
    return open_store(data_dir, check=False)


def list_jobs(store: Store, *, state: str | None = None, limit: int = 100) -> list[dict[str, Any]]:
    """Return jobs as JSON-ready data, newest first: what waits for an operator goes before all else."""
    return [_line(row) for row in store.rows("list_jobs", {"state": state, "limit": limit})]


def list_studies(store: Store) -> list[dict[str, Any]]:
    """Return the studies that are coming in, and what is waited for."""
    rows = store.rows("receiving_studies")
    return [{"study": row["key"][:SHORT], "objects": row["objects"], "reason": row["reason"]} for row in rows]


def show_job(store: Store, name: str) -> dict[str, Any]:
    """Return everything about a job: its study, deliveries, files and history.

    Raises:
        ServiceError: `job-unknown`.
    """
    row = _job(store, name)
    values = {"job": row["id"], "study": row["study_id"], "number": row["revision"]}
    revision = store.row("revision", values)
    deliveries = [_columns(one, DELIVERY_COLUMNS) for one in store.rows("deliveries_of_job", values)]
    return _line(row) | {
        "complete_because": "" if revision is None else revision["reason"],
        "crashes": row["crashes"],
        "interruptions": row["interruptions"],
        "message": row["message"],
        "files": json.loads(row["files"]),
        "seconds": json.loads(row["seconds"]),
        "supersedes": row["supersedes"],
        "deliveries": deliveries,
        "conflicts": [one["sha256"] for one in store.rows("conflicts", values)],
        "history": [json.loads(one["line"]) for one in store.rows("events_of_job", values)],
    }


def retry_job(store: Store, name: str) -> str:
    """Run a job again, or only deliver it again where its files are sound; return its new state.

    Raises:
        ServiceError: `job-unknown`, `job-state`.
    """
    with store.transaction():
        row = _job(store, name)
        if row["state"] not in RETRIED:
            raise _wrong_state(row, RETRIED)
        failed = [one for one in store.rows("deliveries_of_job", {"job": row["id"]}) if one["state"] == "failed"]
        again = bool(failed) and all(one["code"] != "object-damaged" for one in failed)
        state = "delivering" if again else "queued"
        values = {"id": row["id"], "job": row["id"], "state": state, "now": store.clock.now()}
        store.run("retry_job", values)
        store.run("retry_deliveries" if again else "renew_deliveries", values)
        record(store, "retry", study=_study(row), job=row["id"], code="operator", state=state)
    return state


def quarantine_job(store: Store, name: str) -> None:
    """Stop a job until an operator retries it; a worker that runs it is ended.

    Raises:
        ServiceError: `job-unknown`, `job-state`.
    """
    with store.transaction():
        row = _job(store, name)
        if row["state"] not in STOPPED:
            raise _wrong_state(row, STOPPED)
        values = {"id": row["id"], "job": row["id"], "at": store.clock.stamp()}
        store.run("quarantine_job", values)
        store.run("cancel_deliveries", values)
        record(store, "quarantined", study=_study(row), job=row["id"], code="operator")


def mark_purged(store: Store, name: str) -> str:
    """Let a job's study be removed, with its objects and results; return the study's short name.

    The daemon does it at its next look, or the next start.

    Raises:
        ServiceError: `job-unknown`; `job-state` where a job of the study is under way.
    """
    with store.transaction():
        row = _job(store, name)
        for one in store.rows("jobs_of_study", {"study": row["study_id"]}):
            if one["state"] in STOPPED:
                raise _wrong_state(one, frozenset({"done", "refused", "superseded", "quarantined"}))
        store.run("mark_purged", {"study": row["study_id"]})
        record(store, "purge", study=_study(row), job=row["id"], code="operator")
    return str(row["key"][:SHORT])


LINE_COLUMNS: Final = ("id", "state", "route", "entry", "revision", "attempts", "code", "created_at", "finished_at")
DELIVERY_COLUMNS: Final = ("destination", "state", "attempts", "code", "message", "committed", "finished_at")


def _line(row: Row) -> dict[str, Any]:
    return {"study": row["key"][:SHORT], **_columns(row, LINE_COLUMNS)}


def _columns(row: Row, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: row[name] for name in names}


def _job(store: Store, name: str) -> Row:
    """Return the one job whose identifier begins so."""
    found = store.rows("jobs_like", {"name": name}) if name.isalnum() else []
    if len(found) != 1:
        said = "none" if not found else f"{len(found)} of them"
        message = f"expected the beginning of one job's identifier, found {said}: see dints-deploy jobs list"
        raise ServiceError("job-unknown", message)
    return found[0]


def _study(row: Row) -> tuple[int, str]:
    return row["study_id"], row["key"][:SHORT]


def _wrong_state(row: Row, states: frozenset[str]) -> ServiceError:
    message = f"expected job {row['id']} to be {' or '.join(sorted(states))}, found it {row['state']}: see jobs show"
    return ServiceError("job-state", message)
