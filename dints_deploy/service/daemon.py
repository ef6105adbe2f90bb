"""The daemon: startup, the main loop, shutdown.

    receive | watch -> intake -> judge -> queue -> perform -> outbox

Each arrow is a row in the database: a part looks there for what is due, and no part needs another one to be alive.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

from dints_deploy.config.appliance import Config
from dints_deploy.config.load import load_config
from dints_deploy.dicom.network import Commitments
from dints_deploy.errors import DeliveryError, DintsError, ServiceError
from dints_deploy.service.audit import Trail, record
from dints_deploy.service.complete import judge
from dints_deploy.service.deliver import Receipt, send
from dints_deploy.service.health import serve
from dints_deploy.service.intake import INCOMING, DurableIntake, Room
from dints_deploy.service.log import configure
from dints_deploy.service.model import Snapshot
from dints_deploy.service.notify import notify, starting, watchdog_seconds
from dints_deploy.service.outbox import deliver_next
from dints_deploy.service.parts import Part
from dints_deploy.service.perform import Performer
from dints_deploy.service.query import ask_sender
from dints_deploy.service.queue import recover
from dints_deploy.service.receive import Receiver
from dints_deploy.service.retention import clean_start, make_folders, retain
from dints_deploy.service.retry import Policy
from dints_deploy.service.route import check_routes, choose, study_facts
from dints_deploy.service.snapshot import take_snapshot
from dints_deploy.service.store import open_store
from dints_deploy.service.studies import Rules, judge_due
from dints_deploy.service.tally import Tally
from dints_deploy.service.watch_folder import FolderWatch

LOGGER: Final = logging.getLogger(__name__)

LOCK: Final = "lock"
POLL_SECONDS: Final = 0.5
"""Longest rest of a part: `jobs retry` of another process announces nothing."""

RETAIN_SECONDS: Final = 10.0
GRACE_SECONDS: Final = 30.0
ASSOCIATION_SECONDS: Final = 10.0
"""For running jobs, and for open associations, to finish when the daemon is told to stop."""

FIXED: Final = ("data_dir", "audit_anchor", "listeners", "folders", "worker", "http", "log")
"""Fields of the configuration that only a restart changes."""


class Daemon:
    """One daemon on one data folder.

    Raises:
        UsageError: of the configuration. ServiceError: `daemon-running`, `store-corrupt`, `store-newer`,
            `audit-broken`.
    """

    def __init__(self, config: Config, reread: Callable[[], Config]) -> None:
        self._config, self._reread = config, reread
        self._tally, self._commitments = Tally(), Commitments()
        self._parts: list[Part] = []
        self._performers: dict[str, Performer] = {}
        self._watches: list[FolderWatch] = []
        self._stopping, self._reload = threading.Event(), False
        self._end_s: float | None = None

    def run(self) -> None:
        """Run until SIGTERM or SIGINT; raise `ServiceError` `daemon-thread` where a part failed."""
        with ExitStack() as resources:
            with self._signals():
                with starting():
                    self._startup(resources)
                notify("READY=1")
                LOGGER.info("the daemon is ready", extra={"action": "ready", "pid": os.getpid()})
                self._main_loop()
            notify("STOPPING=1")
            self._shutdown()
        if failed := [part.name for part in self._parts if part.failed]:
            message = f"expected every part to work, found {', '.join(failed)} ended: see the log; it can be restarted"
            raise ServiceError("daemon-thread", message)

    def _startup(self, resources: ExitStack) -> None:
        """Take the folder, put in order what an earlier daemon left, open the ports, start the parts."""
        config = self._config
        check_routes(config)
        make_folders(config.data_dir)
        resources.enter_context(locked(config.data_dir))
        self._store = open_store(config.data_dir)
        resources.callback(self._store.close)
        self._trail = Trail(config.data_dir, config.audit_anchor)
        self._trail.open(self._store)
        self._recover()
        self._intake = DurableIntake(self._store, config.data_dir, _room(config))
        self._receiver = Receiver(self._intake, config.data_dir / INCOMING, self._commitments)
        self._watches = [FolderWatch(folder, self._intake, config.data_dir) for folder in config.folders]
        self._judge = self._add("judge", self._judge_step)
        self._intake.arrived = self._judge.wake
        self._add("audit", self._audit_step)
        self._add("retention", self._retain_step)
        for device in config.worker.devices:
            self._add_performer(device)
        self._follow_destinations()
        for number, watch in enumerate(self._watches):
            self._add(f"folder-{number}", partial(self._watch_step, watch))
        self._receiver.start(config.listeners)
        resources.callback(self._receiver.stop, seconds=0.0)
        if config.http is not None:
            resources.callback(serve(config.http, self._snapshot).stop)
        for part in self._parts:
            part.start()

    def _recover(self) -> None:
        """Put in order what a crash left; a clean end left nothing."""
        cut = self._store.run("abort_associations")
        removed = clean_start(self._store, self._config.data_dir)
        jobs = recover(self._store, self._policy)
        with self._store.transaction():
            record(self._store, "started", jobs=jobs, associations=cut, files=sum(removed.values()))
        LOGGER.info("recovered", extra={"action": "recovered", "jobs": jobs, **removed})

    def _main_loop(self) -> None:
        """Watch over the parts until told to stop, or one fails."""
        watchdog = watchdog_seconds()
        told_s = 0.0
        while True:
            time.sleep(POLL_SECONDS / 2)  # not `wait`: a signal's handler runs in this thread, inside its lock for ever
            if self._stopping.is_set():
                return
            if dead := [part.name for part in self._parts if not part.alive] + ["ports"] * (not self._receiver.alive):
                LOGGER.error("a part ended; the daemon stops", extra={"action": "stop", "parts": ", ".join(dead)})
                return
            if self._reload:
                self._reload = False
                self._reload_config()
            if watchdog is not None and time.monotonic() - told_s > watchdog / 3:
                told_s = time.monotonic()
                notify("WATCHDOG=1")

    def _shutdown(self) -> None:
        """Take nothing more, let running work finish for a while, give back what does not."""
        begin = time.monotonic()
        self._end_s = begin + GRACE_SECONDS
        LOGGER.info("the daemon stops", extra={"action": "stopping"})
        for part in self._parts:
            part.stop()
        self._receiver.stop(seconds=ASSOCIATION_SECONDS)
        for part in self._parts:
            part.join(self._end_s - time.monotonic() + 5.0)
        for performer in self._performers.values():
            performer.worker.stop()
        with self._store.transaction():
            record(self._store, "stopped")
        self._trail.export(self._store)
        LOGGER.info("the daemon stopped", extra={"action": "stopped", "seconds": round(time.monotonic() - begin, 1)})

    def _going(self) -> bool:
        """Say whether a running job may go on: always, until the daemon's time to stop is over."""
        return self._end_s is None or time.monotonic() < self._end_s

    # parts

    def _add(self, name: str, step: Callable[[], float]) -> Part:
        part = Part(name, step)
        self._parts.append(part)
        return part

    def _add_performer(self, device: str) -> None:
        settings = self._config.worker
        performer = Performer(self._store, self._config.data_dir, settings, device, self._tally, self._going)
        self._performers[device] = performer
        self._add(f"worker-{device}", lambda: 0.0 if performer.step() else POLL_SECONDS)

    def _judge_step(self) -> float:
        self._intake.note_ends()
        due_s = judge_due(self._store, self._config.data_dir, self._rules())
        for part in self._parts:
            if part.name.startswith("worker-"):
                part.wake.set()
        return POLL_SECONDS if due_s is None else min(POLL_SECONDS, max(0.01, due_s - self._store.clock.now()))

    def _audit_step(self) -> float:
        self._trail.export(self._store)
        return POLL_SECONDS

    def _retain_step(self) -> float:
        config = self._config
        retain(self._store, config.data_dir, config.retention, self._intake.remove_objects, self._trail.head.seq)
        return RETAIN_SECONDS

    def _watch_step(self, watch: FolderWatch) -> float:
        watch.run(self._stopping)
        return 0.0

    def _deliver_step(self, destination: str) -> float:
        sent = deliver_next(self._store, self._config.data_dir, destination, self._send, self._policy)
        if sent is None:
            return POLL_SECONDS
        if sent.code:
            self._tally.failed(sent.code)
        else:
            self._tally.took("deliver", sent.seconds)
        return 0.0

    def _send(self, name: str, files: Sequence[Path], job: str) -> Receipt:
        destination = next((one for one in self._config.destinations if one.name == name), None)
        if destination is None:
            message = f"expected a destination {name} in the configuration, found none: name it again, then retry"
            raise DeliveryError("destination-unknown", message, retryable=False)
        return send(destination, files, name=job, commitments=self._commitments)

    def _follow_destinations(self) -> list[Part]:
        """Add a part for every destination that is named, or that results still wait for."""
        wanted = {one.name for one in self._config.destinations}
        wanted |= {row[0] for row in self._store.rows("destinations_in_use")}
        there = {part.name for part in self._parts}
        missing = sorted(name for name in wanted if f"deliver-{name}" not in there)
        return [self._add(f"deliver-{name}", partial(self._deliver_step, name)) for name in missing]

    # configuration

    @property
    def _policy(self) -> Policy:
        return Policy(self._config.worker.attempts, self._config.worker.retry_seconds)

    def _rules(self) -> Rules:
        config = self._config
        return Rules(
            judge=lambda evidence, now_s: judge(evidence, now_s, config.completeness),
            ask=lambda calling, study: ask_sender(config.completeness, calling, study),
            facts_of=lambda study, doors, calling: study_facts(study, doors=doors, calling=calling),
            choose=lambda facts: choose(config, facts),
            routes={route.name: route for route in config.routes},
        )

    def _reload_config(self) -> None:
        """Take all but the `FIXED` fields from the file, which changes nothing where it is not sound."""
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            config = self._reread()
            check_routes(config)
        except DintsError as error:
            LOGGER.exception("the configuration stays as it was", extra={"action": "not_reloaded", "code": error.code})
        else:
            fixed = {name: getattr(self._config, name) for name in FIXED}
            later = [name for name in FIXED if getattr(config, name) != fixed[name]]
            self._config = config.model_copy(update=fixed)
            self._intake.room = _room(self._config)
            for part in self._follow_destinations():
                part.start()
            with self._store.transaction():
                record(self._store, "reloaded", routes=[route.name for route in config.routes])
            extra = {"action": "reloaded", "after_restart": ", ".join(later)}
            LOGGER.info("the configuration was read again", extra=extra)
        notify("READY=1")

    def _snapshot(self) -> Snapshot:
        problems = [part.problem for part in self._parts if part.problem]
        problems += [f"{part.name} ended" for part in self._parts if not part.alive]
        problems += [watch.problem for watch in self._watches if watch.problem]
        troubled = {device: performer.worker.problem for device, performer in self._performers.items()}
        problems += [f"worker-{device}: {problem}" for device, problem in troubled.items() if problem]
        problems += ["stopping"] * self._stopping.is_set()
        workers = {device: performer.doing for device, performer in self._performers.items()}
        return take_snapshot(self._store, self._intake, self._tally, problems=problems, workers=workers)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Stop on SIGTERM and SIGINT, at once on the second one; read the configuration again on SIGHUP."""

        def stop(number: int, frame: object) -> None:
            if self._stopping.is_set():
                self._end_s = time.monotonic()
            else:
                self._stopping.set()

        def reload(number: int, frame: object) -> None:
            self._reload = True

        handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: reload}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            self._stopping.set()
            signal.signal(signal.SIGHUP, before[signal.SIGHUP] or signal.SIG_DFL)


@contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Hold the lock of a data folder; the kernel gives it back when this process ends, however it does.

    Raises:
        ServiceError: `daemon-running`.
    """
    descriptor = os.open(data_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
            message = f"expected {data_dir} for itself alone, found a daemon at work there (process {holder}): stop it"
            raise ServiceError("daemon-running", message) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        with suppress(OSError):
            os.close(descriptor)


def run_daemon(path: Path) -> None:
    """Run the daemon of a configuration file until it is told to stop; see `Daemon` for the errors."""
    config = load_config(path)
    configure(config.log)
    Daemon(config, lambda: load_config(path)).run()


def _room(config: Config) -> Room:
    return Room(config.disk.free_bytes, config.disk.quota_bytes)
