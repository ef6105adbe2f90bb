"""What a folder watch remembers between looks and runs, and how it opens files without following links."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO

from dints_deploy.errors import IntakeRefused, ScanRefused
from dints_deploy.files import CHUNK_BYTES, make_private_folder, output_error, write_text

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Look:
    """How a file looks from outside: another look means that it was changed, or is another file."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Look:
        """Return the look of a file."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class Seen:
    """The files of one folder that need not be read again.

    Files that were stored are kept in a file, a line each: digest of the relative path, look, digest of the content.
    No name is written. Files that are passed over are kept in memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stored: dict[str, tuple[Look, str]] = {}
        self._digests: set[str] = set()
        self._passed: dict[str, Look] = {}

    @classmethod
    def of(cls, folder: Path, watched: Path) -> Seen:
        """Return what is remembered about a watched folder, in a file below `folder`."""
        make_private_folder(folder)
        seen = cls(folder / f"{_key(watched)}.seen")
        with contextlib.suppress(FileNotFoundError):
            for line in seen._path.read_text(encoding="ascii", errors="replace").splitlines():
                seen._load(line.split())
        return seen

    def _load(self, fields: list[str]) -> None:
        """Take one line; the last one may be torn by a crash, and is then as if it were not there."""
        if len(fields) == 5 and len(fields[4]) == 64 and all(field.lstrip("-").isdigit() for field in fields[1:4]):
            key, size, mtime_ns, inode, digest = fields
            self._stored[key] = (Look(int(size), int(mtime_ns), int(inode)), digest)
            self._digests.add(digest)

    def knows(self, relative: Path, look: Look) -> bool:
        """Say whether a file that looks like this was dealt with."""
        key = _key(relative)
        stored = self._stored.get(key)
        return look == self._passed.get(key) or (stored is not None and stored[0] == look)

    def has(self, digest: str) -> bool:
        """Say whether these bytes were stored from this folder before."""
        with self._lock:
            return digest in self._digests

    def pass_over(self, relative: Path, look: Look) -> None:
        """Do not read a file again until it looks different."""
        with self._lock:
            self._passed[_key(relative)] = look

    def remember(self, relative: Path, look: Look, digest: str) -> None:
        """Remember a file that was stored. A lost line costs reading it again: the intake knows its bytes."""
        key = _key(relative)
        with self._lock:
            self._stored[key] = (look, digest)
            self._digests.add(digest)
            with contextlib.suppress(OSError), self._path.open("a", encoding="ascii") as file:
                file.write(_line(key, look, digest))

    def forget_others(self, present: Iterable[Path]) -> None:
        """Keep only what is known of files that are still there, in the file too."""
        keys = {_key(relative) for relative in present}
        with self._lock:
            self._stored = {key: stored for key, stored in self._stored.items() if key in keys}
            self._passed = {key: look for key, look in self._passed.items() if key in keys}
            self._digests = {digest for _, digest in self._stored.values()}
            write_text(self._path, "".join(_line(key, *stored) for key, stored in self._stored.items()))


@contextlib.contextmanager
def open_below(root: Path, relative: Path) -> Iterator[BinaryIO]:
    """Open a regular file below `root`; no part of the way below it may be a link.

    Raises:
        ScanRefused: `dicom-not-a-file` for a link, a folder, a device or a pipe; `scan-missing` where it is gone.
    """
    try:
        with contextlib.ExitStack() as opened:
            descriptor = os.open(root, FOLDER & ~os.O_NOFOLLOW)  # the operator named the root: a link to it is meant
            opened.callback(os.close, descriptor)
            for part in relative.parent.parts:
                descriptor = os.open(part, FOLDER, dir_fd=descriptor)
                opened.callback(os.close, descriptor)
            file = os.open(relative.name, FILE, dir_fd=descriptor)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ScanRefused("scan-missing", f"expected a readable file that is no link, found: {reason}") from error
    with os.fdopen(file, "rb") as opened_file:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ScanRefused("dicom-not-a-file", "expected a regular file, found a folder, device or pipe")
        yield opened_file


def copy_durably(source: BinaryIO, target: Path) -> tuple[str, int]:
    """Copy an open file to a new one; return the SHA-256 and the bytes of what was copied.

    Raises:
        OutputError: `disk-full`, `output-unwritable`. IntakeRefused: `intake-unsettled` where reading fails.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with target.open("xb") as file:
            while chunk := _read(source):
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
    except OSError as error:
        raise output_error(target, error) from error
    return digest.hexdigest(), size


def _read(source: BinaryIO) -> bytes:
    try:
        return source.read(CHUNK_BYTES)
    except OSError as error:  # a share that went away
        reason = error.strerror or type(error).__name__
        raise IntakeRefused("intake-unsettled", f"expected to read a file to its end, found: {reason}") from error


def _line(key: str, look: Look, digest: str) -> str:
    return f"{' '.join(map(str, (key, *astuple(look), digest)))}\n"


def _key(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
