"""Supervise one worker process: start it, give it a task, and end it where it hangs, grows or is no longer wanted."""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dints_deploy.errors import WorkerError
from dints_deploy.service.worker import Task

LOGGER: Final = logging.getLogger(__name__)

START_SECONDS: Final = 60.0
SILENCE_SECONDS: Final = 30.0
"""Without a sign of life a worker counts as hung."""

WORRY_SECONDS: Final = 10.0
"""Without a sign of life the daemon says that it is not ready."""

LOOK_SECONDS: Final = 0.25
"""Time between two looks at a worker's memory and at whether it is still wanted."""

TOLD_BYTES: Final = 1 << 20
"""Longest answer."""


@dataclass(frozen=True)
class Limits:
    """What a worker may take.

    Attributes:
        job_seconds: for one task.
        memory_bytes: of private and resident memory; None for no limit.
    """

    job_seconds: float
    memory_bytes: int | None = None
    silence_seconds: float = SILENCE_SECONDS


class Worker:
    """A worker process for one device, started when it is needed. Used by one thread, which must outlive it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._heard_s: float | None = None

    @property
    def problem(self) -> str:
        """Say that the process has something to do and gives no sign of life; empty otherwise. From any thread."""
        heard_s = self._heard_s
        silent = 0.0 if heard_s is None else time.monotonic() - heard_s
        return f"no sign of life for {silent:.0f} s" if silent > WORRY_SECONDS else ""

    @property
    def pid(self) -> int | None:
        """Return the process that runs, if one does."""
        return None if self._process is None else self._process.pid

    def run(self, task: Task, wanted: Callable[[], bool]) -> dict[str, Any] | None:
        """Do a task and return the worker's answer; None, and the process is gone, once it is not wanted any more.

        Args:
            wanted: asked several times a second.

        Raises:
            WorkerError: `worker-start`, `worker-crashed`, `worker-hung`, `worker-memory`; the process is gone.
        """
        process = self._started(wanted)
        if process is None:
            return None
        try:
            if process.stdin is None:
                raise AssertionError("the worker was started with a pipe")
            process.stdin.write(task.line())
            process.stdin.flush()
        except OSError as error:
            raise self._crashed() from error
        return self._answer(("done", "refused", "failed"), self._limits.job_seconds, wanted)

    def stop(self) -> None:
        """End the process at once; nothing that counts is lost."""
        process, self._process, self._buffer = self._process, None, b""
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # a task that it no longer read
                    LOGGER.debug("a pipe was closed with unread bytes", extra={"action": "pipe_closed"})

    def _started(self, wanted: Callable[[], bool]) -> subprocess.Popen[bytes] | None:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        command = [sys.executable, "-m", "dints_deploy.service.worker"]
        command += [str(os.getpid()), str(self._limits.memory_bytes or 0)]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            found = error.strerror or type(error).__name__
            raise WorkerError("worker-start", f"expected to start a worker process, found: {found}") from error
        if self._answer(("ready",), START_SECONDS, wanted) is None:
            return None
        LOGGER.info("a worker runs", extra={"action": "worker_started", "pid": self._process.pid})
        return self._process

    def _answer(self, kinds: tuple[str, ...], seconds: float, wanted: Callable[[], bool]) -> dict[str, Any] | None:
        """Return the next answer of some kind, passing over signs of life."""
        begin = heard = self._heard_s = time.monotonic()
        try:
            while True:
                now = time.monotonic()
                if now - begin > seconds:
                    raise self._ended("worker-hung", f"expected an answer within {seconds:g} s, found none")
                if now - heard > self._limits.silence_seconds:
                    raise self._ended("worker-hung", f"expected a sign of life, found none for {now - heard:.0f} s")
                self._check_memory()
                if not wanted():
                    self.stop()
                    return None
                for line in self._lines():
                    heard = self._heard_s = time.monotonic()
                    answer: dict[str, Any] = json.loads(line)
                    if answer["kind"] in kinds:
                        return answer
        finally:
            self._heard_s = None

    def _lines(self) -> list[bytes]:
        """Return whole lines that came in, after a short wait for them."""
        process = self._process
        if process is None or process.stdout is None:
            raise AssertionError("a worker was started")
        descriptor = process.stdout.fileno()
        if not select.select([descriptor], [], [], LOOK_SECONDS)[0]:
            return []
        data = os.read(descriptor, 1 << 16)
        if not data:
            raise self._crashed()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > TOLD_BYTES:
            raise self._ended("worker-crashed", "expected a short answer, found an endless one")
        return lines

    def _check_memory(self) -> None:
        limit, pid = self._limits.memory_bytes, self.pid
        if limit is None or pid is None:
            return
        held = resident_bytes(pid)
        if held > limit:
            raise self._ended("worker-memory", f"expected at most {limit} bytes, found {held}")

    def _crashed(self) -> WorkerError:
        """Return how a process that broke off its answers ended."""
        if self._process is None:
            raise AssertionError("a worker was started")
        try:
            status = self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            status = 0
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        return self._ended("worker-crashed", f"expected an answer, found the worker gone ({how})")

    def _ended(self, code: str, message: str) -> WorkerError:
        self.stop()
        LOGGER.error("a worker was ended", extra={"action": "worker_ended", "code": code, "found": message})
        return WorkerError(code, f"{message}: the job is tried again, or put aside")


def resident_bytes(pid: int) -> int:
    """Return the memory that a process holds; 0 where it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
