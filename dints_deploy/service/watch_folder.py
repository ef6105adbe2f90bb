"""Watch a folder: take settled, whole, regular files below it, DICOM and NIfTI, and never follow a link out of it.

Announcements of the file system only make it look sooner: network shares give none, so everything is looked at now and
then. A file is taken when its size and time have stayed as they are for a while and it ends where its header says.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from watchfiles import watch

from dints_deploy.config.intake import Folder
from dints_deploy.dicom.instance import check_whole, identify
from dints_deploy.errors import DintsError, IntakeRefused, ScanRefused
from dints_deploy.imaging.nifti import read_nifti
from dints_deploy.process.source import DICOM_PREFIX, NIFTI_SUFFIXES, PREFIX_AT
from dints_deploy.service.model import Intake, Received
from dints_deploy.service.seen import Look, Seen, copy_durably, open_below

LOGGER: Final = logging.getLogger(__name__)

TAKERS: Final = 4
"""Files that are taken at one time: they share the intake's transaction."""

FORGET_SECONDS: Final = 24 * 3600.0
"""How often what is known of files that are gone is forgotten."""

NO_SCAN: Final = frozenset({"scan-truncated", "scan-gzip", "scan-empty", "scan-format"})
"""Reasons not to take a NIfTI file: no such file, or not all of it. A file that changes is looked at again."""

LATER: Final = frozenset({"intake-disk", "disk-full", "output-unwritable"})
"""Reasons that are not the file's: it is tried again at the next look."""


@dataclass(frozen=True)
class Candidate:
    """A regular file below the folder, as one look found it."""

    relative: Path
    look: Look


class FolderWatch:
    """One watched folder.

    Attributes:
        problem: why the folder cannot be watched at present; empty where it can.
    """

    def __init__(self, folder: Folder, intake: Intake, data_dir: Path) -> None:
        self.problem = ""
        self._folder, self._intake = folder, intake
        self._incoming = data_dir / "incoming"
        self._seen = Seen.of(data_dir / "folders", folder.path)
        self._pending: dict[Path, tuple[Look, float]] = {}
        self._changed = threading.Event()
        self._forget_s = float("inf")

    def run(self, stop: threading.Event) -> None:
        """Look until told to stop."""
        announcer = threading.Thread(target=self._announce, args=(stop,), name="folder-events", daemon=True)
        announcer.start()
        while not stop.is_set():
            self._changed.clear()
            self.look(time.monotonic())
            soon = self._folder.settle_seconds / 2 if self._pending else self._folder.scan_seconds
            self._wait(min(soon, self._folder.scan_seconds), stop)

    def _wait(self, seconds: float, stop: threading.Event) -> None:
        end = time.monotonic() + seconds
        while not stop.is_set() and not self._changed.is_set() and time.monotonic() < end:
            self._changed.wait(min(0.5, seconds))

    def _announce(self, stop: threading.Event) -> None:
        """Wake the watch when the file system announces something; it may never do so."""
        while not stop.is_set():
            try:
                for _ in watch(self._folder.path, stop_event=stop, watch_filter=None, raise_interrupt=False):
                    self._changed.set()
            except (OSError, RuntimeError):  # not there yet, or no more watches: the regular look goes on
                stop.wait(self._folder.scan_seconds)

    def look(self, now_s: float) -> int:
        """Look at everything once; return how many files were taken."""
        try:
            present = list(self._files())
        except OSError as error:
            self.problem = f"a watched folder cannot be read: {error.strerror or type(error).__name__}"
            LOGGER.warning("a watched folder cannot be read", extra={"action": "folder_unreadable"})
            return 0
        self.problem = ""
        self._forget_s = min(self._forget_s, now_s + FORGET_SECONDS)
        if now_s >= self._forget_s:
            self._forget_s = float("inf")
            self._seen.forget_others(one.relative for one in present)
        candidates = [one for one in present if not self._seen.knows(one.relative, one.look)]
        self._pending = {one.relative: self._since(one, now_s) for one in candidates}
        settled = [one for one in candidates if self._is_settled(one, now_s)]
        if not settled:
            return 0
        with ThreadPoolExecutor(TAKERS, thread_name_prefix="folder-take") as pool:
            taken = sum(pool.map(self._attend, settled))
        LOGGER.info("looked at files", extra={"action": "looked", "files": len(settled), "taken": taken})
        return taken

    def _files(self) -> Iterator[Candidate]:
        """Yield the regular files below the folder, without following links; hidden ones are somebody's own."""
        root = self._folder.path
        for folder, folders, names, descriptor in os.fwalk(root, follow_symlinks=False, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                if name.startswith("."):
                    continue
                try:
                    status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                except OSError:  # gone since the folder was listed
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield Candidate(Path(folder, name).relative_to(root), Look.of(status))

    def _since(self, one: Candidate, now_s: float) -> tuple[Look, float]:
        """Return a file's look and since when it has been so."""
        before = self._pending.get(one.relative)
        return before if before is not None and before[0] == one.look else (one.look, now_s)

    def _is_settled(self, one: Candidate, now_s: float) -> bool:
        return now_s - self._pending[one.relative][1] >= self._folder.settle_seconds

    def _attend(self, one: Candidate) -> bool:
        """Take a file, or remember that it is not one to take; say whether it was taken."""
        try:
            digest = self._take(one)
        except DintsError as refusal:
            if refusal.code in LATER:
                LOGGER.warning("a file must wait", extra={"action": "file_waits", "code": refusal.code})
            else:
                self._seen.pass_over(one.relative, one.look)
                self._pending.pop(one.relative, None)
                LOGGER.debug("passed over a file", extra={"action": "passed_over", "code": refusal.code})
            return False
        self._pending.pop(one.relative, None)
        self._after(one, digest)
        self._seen.remember(one.relative, one.look, digest)
        return True

    def _take(self, one: Candidate) -> str:
        """Copy a file, check the copy, hand it over; return its digest."""
        copy = self._incoming / f"{secrets.token_hex(16)}.part"
        try:
            with open_below(self._folder.path, one.relative) as source:
                _check_kind(one.relative.name, source)
                self._intake.check_room(os.fstat(source.fileno()).st_size)
                digest, size = copy_durably(source, copy)
                after = Look.of(os.fstat(source.fileno()))
            if after != one.look:
                raise IntakeRefused("intake-unsettled", "expected a file at rest, found it changed while it was read")
            if not self._seen.has(digest):
                self._intake.accept(self._received(one, copy, digest, size))
            return digest
        finally:
            copy.unlink(missing_ok=True)

    def _received(self, one: Candidate, copy: Path, digest: str, size: int) -> Received:
        """Return what the intake is told; raise `ScanRefused` for what is no scan, or not whole."""
        door = str(self._folder.path)
        if _is_nifti(one.relative.name):
            _check_nifti(copy)
            return Received("folder", door, copy, digest, size, name=one.relative.name)
        instance = identify(copy)
        check_whole(copy)
        return Received("folder", door, copy, digest, size, instance=instance)

    def _after(self, one: Candidate, digest: str) -> None:
        """Leave, move or delete a file that is safely stored, unless it has changed since."""
        if self._folder.after == "leave":
            return
        path = self._folder.path / one.relative
        try:
            if Look.of(path.lstat()) != one.look:
                return
            if self._folder.move_to is None:
                path.unlink()
                return
            self._folder.move_to.mkdir(parents=True, exist_ok=True)
            path.rename(self._folder.move_to / f"{digest[:16]}-{path.name}")
        except OSError as error:
            fields = {"action": "file_left", "error": error.strerror or type(error).__name__}
            LOGGER.warning("a stored file could not be moved or deleted and is left", extra=fields)


def _is_nifti(name: str) -> bool:
    return name.lower().endswith(NIFTI_SUFFIXES)


def _check_kind(name: str, source: BinaryIO) -> None:
    """Refuse a file that is neither DICOM nor NIfTI by its first bytes, before it is copied."""
    start = source.read(PREFIX_AT + len(DICOM_PREFIX))
    source.seek(0)
    if not _is_nifti(name) and start[PREFIX_AT:] != DICOM_PREFIX:
        raise ScanRefused("dicom-not-dicom", "expected the prefix DICM at byte 128 (PS3.10 7.1), found another file")


def _check_nifti(path: Path) -> None:
    """Refuse a NIfTI file that is not whole; what else may be wrong with it is for its job to say."""
    try:
        read_nifti(path)
    except ScanRefused as refusal:
        if refusal.code in NO_SCAN:
            raise


def _raise(error: OSError) -> None:
    raise error
