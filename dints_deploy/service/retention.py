"""Remove what the policy, or an operator, no longer keeps: rows first, then files; a crash in between leaves files
without rows, which the next start removes."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from dints_deploy.config.appliance import Retention
from dints_deploy.files import make_private_folder
from dints_deploy.service.audit import record
from dints_deploy.service.fault import reach
from dints_deploy.service.intake import INCOMING, SHORT
from dints_deploy.service.objects import OBJECTS, make_object_folders
from dints_deploy.service.outbox import RESULTS
from dints_deploy.service.store import Row, Store

LOGGER: Final = logging.getLogger(__name__)

DAY_S: Final = 24 * 3600.0
WORK: Final = "work"

RemoveObjects = Callable[[Sequence[str]], None]
"""Removes objects that no row needs; see `DurableIntake.remove_objects`."""


def make_folders(data_dir: Path) -> None:
    """Make the folders of a data folder, for its owner only."""
    for name in ("", INCOMING, WORK, RESULTS):
        make_private_folder(data_dir / name)
    make_object_folders(data_dir)


def clean_start(store: Store, data_dir: Path) -> dict[str, int]:
    """Remove what a crash left: half-received files, a worker's folder, files that no row knows. Return how many.

    Call it before anything runs. Nothing that was acknowledged is among them.
    """
    removed = {"scratch": 0, OBJECTS: 0, RESULTS: 0}
    for name in (INCOMING, WORK):
        for path in (data_dir / name).iterdir():
            _remove(path)
            removed["scratch"] += 1
    objects = {row[0] for row in store.rows("stored_objects")}
    for path in (data_dir / OBJECTS).glob("*/*"):
        if path.name not in objects:
            _remove(path)
            removed[OBJECTS] += 1
    results = {row[0] for row in store.rows("jobs_with_files")}
    for path in (data_dir / RESULTS).iterdir():
        if path.name not in results:
            _remove(path)
            removed[RESULTS] += 1
    return removed


def retain(store: Store, data_dir: Path, policy: Retention, remove_objects: RemoveObjects, exported: int) -> int:
    """Remove what is older than the policy keeps, and what an operator asked to purge; return how many studies went.

    A study is as old as its last job's end; one with a job under way, or waiting for an operator, stays, unless the
    policy names a time for quarantine.

    Args:
        exported: number of the last event in the audit file: earlier ones of studies that are gone are forgotten.
    """
    now = store.clock.now()
    if policy.objects_days is not None:
        for study in store.rows("studies_to_empty", {"before": now - policy.objects_days * DAY_S}):
            _empty(store, study, remove_objects)
    gone = list(store.rows("studies_to_purge"))
    if policy.results_days is not None:
        gone += store.rows("finished_studies", {"before": now - policy.results_days * DAY_S})
    if policy.quarantine_days is not None:
        gone += store.rows("quarantined_studies", {"before": now - policy.quarantine_days * DAY_S})
    for study in {row["id"]: row for row in gone}.values():
        purge(store, data_dir, study, remove_objects)
    store.run("forget_events", {"exported": exported})
    store.run("forget_associations")
    return len(gone)


def purge(store: Store, data_dir: Path, study: Row, remove_objects: RemoveObjects) -> None:
    """Remove a study with everything that was made of it; the audit trail keeps that it was there."""
    with store.transaction():
        objects = [row["sha256"] for row in store.rows("objects_of_study", {"study": study["id"]})]
        jobs = [row["id"] for row in store.rows("jobs_of_study", {"study": study["id"]})]
        store.run("delete_study", {"study": study["id"]})
        record(store, "purged", study=(study["id"], study["key"][:SHORT]), objects=len(objects), jobs=jobs)
    reach("purge-rows")
    for job in jobs:
        _remove(data_dir / RESULTS / job)
    remove_objects(objects)
    LOGGER.info("removed a study", extra={"action": "purged", "study": study["key"][:SHORT]})


def _empty(store: Store, study: Row, remove_objects: RemoveObjects) -> None:
    """Remove a study's objects; its rows still know them, so that the same ones coming again change nothing."""
    with store.transaction():
        objects = [row["sha256"] for row in store.rows("objects_of_study", {"study": study["id"]})]
        store.run("forget_objects", {"study": study["id"]})
        record(store, "emptied", study=(study["id"], study["key"][:SHORT]), objects=len(objects))
    remove_objects(objects)


def _remove(path: Path) -> None:
    """Remove a file or folder, whatever is in it; what cannot be removed stays for the next start."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def orphans(store: Store, data_dir: Path) -> Iterable[Path]:
    """Yield files that no row knows, and rows' files that are not there: of a daemon at rest there are none."""
    objects = {row[0] for row in store.rows("stored_objects")}
    here = {path.name: path for path in (data_dir / OBJECTS).glob("*/*")}
    results = {row[0] for row in store.rows("jobs_with_files")}
    there = {path.name: path for path in (data_dir / RESULTS).iterdir()}
    yield from (here[name] for name in sorted(here.keys() - objects))
    yield from (data_dir / OBJECTS / name[:2] / name for name in sorted(objects - here.keys()))
    yield from (there[name] for name in sorted(there.keys() - results))
    yield from (data_dir / RESULTS / name for name in sorted(results - there.keys()))
    for name in (INCOMING, WORK):
        yield from (data_dir / name).iterdir()
