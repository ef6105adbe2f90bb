"""The files of received objects: under their digest, durable before a row counts on them, removed when none does.

Many threads place objects at one time, each waiting for the disk by itself, so that the file system can write for all
of them at once.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from dints_deploy.files import make_private_folder, output_error, sync_folder
from dints_deploy.service.fault import reach

OBJECTS: Final = "objects"


def object_path(data_dir: Path, digest: str) -> Path:
    """Return where an object lies."""
    return data_dir / OBJECTS / digest[:2] / digest


def make_object_folders(data_dir: Path) -> None:
    """Make every folder that an object can lie in, so that none has to be made durable while objects come in."""
    make_private_folder(data_dir / OBJECTS)
    missing = [path for path in (data_dir / OBJECTS / f"{number:02x}" for number in range(256)) if not path.is_dir()]
    for path in missing:
        make_private_folder(path)
    if missing:
        sync_folder(data_dir / OBJECTS)
        sync_folder(data_dir)


class Objects:
    """The objects of a data folder.

    Attributes:
        held_bytes: of all objects that have their name.
    """

    def __init__(self, data_dir: Path, held_bytes: int) -> None:
        self.held_bytes = held_bytes
        self._data_dir = data_dir
        self._names = threading.Lock()
        self._coming: Counter[str] = Counter()
        self._unwanted: set[str] = set()

    @contextmanager
    def kept(self, digest: str) -> Iterator[None]:
        """Keep an object from being removed until the end of the block: its row may be on its way."""
        with self._names:
            self._coming[digest] += 1
        try:
            yield
        finally:
            with self._names:
                self._coming[digest] -= 1
                if not self._coming[digest]:
                    del self._coming[digest]

    def place(self, path: Path, digest: str) -> None:
        """Make a file durable under its digest's name; call it within `kept`.

        Raises:
            OutputError: `disk-full`, `output-unwritable`.
        """
        target = object_path(self._data_dir, digest)
        try:
            size_bytes = _sync(path)
            reach("intake-synced")
            with self._names:
                if not target.exists():  # never replaced: the bytes that are there may be what a row counts on
                    path.rename(target)
                    self.held_bytes += size_bytes
            sync_folder(target.parent)  # also for a name that was there: whoever gave it may not have come so far
        except OSError as error:
            raise output_error(target, error) from error

    def unwanted(self, digest: str) -> bool:
        """Say once whether an object was to be removed while it was kept; whoever brought it removes it then."""
        with self._names:
            found = digest in self._unwanted
            self._unwanted.discard(digest)
        return found

    def remove(self, digests: Sequence[str], needed: Callable[[str], bool]) -> None:
        """Remove the objects that are not needed; one that is on its way stays until `unwanted` is asked."""
        for digest in digests:
            target = object_path(self._data_dir, digest)
            with self._names:
                if digest in self._coming:
                    self._unwanted.add(digest)
                    continue
                if not target.exists() or needed(digest):
                    continue
                self.held_bytes -= target.stat().st_size
                target.unlink()


def _sync(path: Path) -> int:
    """Make a file's bytes durable, let nobody change them any more, and return how many they are."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, 0o400)
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
