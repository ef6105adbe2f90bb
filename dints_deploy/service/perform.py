"""Perform jobs on one device: claim, let the worker process do it, put the files in their place, note it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from dints_deploy.config.appliance import Worker as Settings
from dints_deploy.errors import OutputError, ServiceError, WorkerError
from dints_deploy.files import output_error, sync_folder
from dints_deploy.service.fault import reach
from dints_deploy.service.objects import OBJECTS
from dints_deploy.service.outbox import RESULTS
from dints_deploy.service.queue import LEASE_S, Claimed, Produced, claim, expire, extend, fail, finish, release
from dints_deploy.service.retention import WORK
from dints_deploy.service.retry import Policy
from dints_deploy.service.store import Store
from dints_deploy.service.supervise import Limits, Worker
from dints_deploy.service.tally import Tally
from dints_deploy.service.worker import Task

LOGGER: Final = logging.getLogger(__name__)

EXTEND_S: Final = LEASE_S / 6
"""Time between two extensions of a lease."""

SPOILED: Final = frozenset({"worker-memory", "worker-failed", "engine-memory", "engine-failed"})
"""Failures after which the process may not be what it was: the next job gets a new one."""


class Performer:
    """Does the jobs of one device with one worker process. Used by one thread."""

    def __init__(
        self, store: Store, data_dir: Path, settings: Settings, device: str, tally: Tally, going: Callable[[], bool]
    ) -> None:
        self._store, self._data_dir, self._settings, self._device = store, data_dir, settings, device
        self._tally, self._going = tally, going
        self._policy = Policy(settings.attempts, settings.retry_seconds)
        self.worker = Worker(Limits(settings.job_seconds, settings.memory_bytes))
        self.doing = ""

    def step(self) -> bool:
        """Do the next job that is due; False where there is none."""
        expire(self._store)
        job = claim(self._store)
        if job is None:
            return False
        reach("claim-after")
        self.doing = job.id
        self._tally.took("wait", job.waited_s)
        folder = self._data_dir / WORK / job.lease
        try:
            self._perform(job, folder)
        finally:
            self.doing = ""
            shutil.rmtree(folder, ignore_errors=True)
        return True

    def _perform(self, job: Claimed, folder: Path) -> None:
        about = {"job": job.id, "study": job.study[1], "route": job.route}
        LOGGER.info("a job begins", extra={"action": "job_started", **about})
        try:
            answer = self.worker.run(self._task(job, folder), self._wanted(job))
        except WorkerError as error:
            self._tally.failed(error.code)
            fail(self._store, job, error, self._policy, crashed=True)
            return
        if answer is None:
            release(self._store, job)  # does nothing where the lease was lost
            return
        if answer["kind"] == "failed":
            if answer["code"] in SPOILED:
                self.worker.stop()
            self._tally.failed(answer["code"])
            act = fail(self._store, job, _error(answer), self._policy, crashed=False)
            LOGGER.warning("a job failed", extra={"action": "job_failed", "code": answer["code"], "then": act, **about})
            return
        try:
            self._finish(job, folder, answer)
        except OutputError as error:
            fail(self._store, job, error, self._policy, crashed=False)
            raise
        LOGGER.info("a job is done", extra={"action": "job_done", "kind": answer["kind"], **about})

    def _finish(self, job: Claimed, folder: Path, answer: dict[str, Any]) -> None:
        reach("finish-before")
        refusal = (answer["code"], answer["message"]) if answer["kind"] == "refused" else None
        produced = Produced(answer["files"], refusal, answer["about"], answer["seconds"])
        if extend(self._store, job):
            if produced.files:
                place(folder / "out", self._data_dir / RESULTS / job.id)
            reach("finish-placed")
        if not finish(self._store, job, produced):
            LOGGER.info("a result came too late", extra={"action": "lease_lost", "job": job.id})
            return
        reach("finish-after")
        for stage, seconds in produced.seconds.items():
            self._tally.took(stage, seconds)
        if refusal is not None:
            self._tally.refused(refusal[0])

    def _task(self, job: Claimed, folder: Path) -> Task:
        settings = self._settings
        return Task(
            job=job.id,
            kind=job.kind,
            objects=str(self._data_dir / OBJECTS),
            folder=str(folder),
            inputs=job.inputs,
            entry=job.entry,
            outputs=job.outputs,
            when=job.sealed_at,
            engine=settings.engine,
            precision=settings.precision,
            device=self._device,
            threads=settings.threads,
            supersedes=self._earlier(job),
        )

    def _earlier(self, job: Claimed) -> tuple[str, ...]:
        """Return the DICOM files of the result that a job's replaces."""
        if job.supersedes is None:
            return ()
        return tuple(map(str, sorted((self._data_dir / RESULTS / job.supersedes).glob("*.dcm"))))

    def _wanted(self, job: Claimed) -> Callable[[], bool]:
        """Return a function that keeps the job's lease and says whether the job is still wanted."""
        extended_s = self._store.clock.now()

        def wanted() -> bool:
            nonlocal extended_s
            if not self._going():
                return False
            now = self._store.clock.now()
            if now - extended_s < 1.0:
                return True
            extended_s = now
            return extend(self._store, job)

        return wanted


def place(source: Path, target: Path) -> None:
    """Move a folder of durable files to its place, durably; an earlier one there that no row names is replaced."""
    try:
        if target.exists():
            shutil.rmtree(target)
        source.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise output_error(target, error) from error


def _error(answer: dict[str, Any]) -> ServiceError:
    return ServiceError(answer["code"], answer["message"])
