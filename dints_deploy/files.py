"""Durable files: write-fsync-rename, digests, and the folders of this machine's state."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from dints_deploy.errors import OutputError

CHUNK_BYTES = 1 << 20


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success make it durable and rename it to `path`.

    A reader sees the old file or the whole new one, never a part. On failure the temporary file is removed.

    Raises:
        OutputError: `disk-full` or `output-unwritable`.
    """
    # The suffixes stay at the end: nibabel and Pillow choose the format by them.
    partial = path.with_name(f".partial-{secrets.token_hex(4)}-{path.name}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` durably and at once."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, durably and at once."""
    write_bytes(path, text.encode())


def make_folder(path: Path) -> Path:
    """Create the folder `path` and its parents; raise `OutputError` where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(path, error) from error
    return path


def make_private_folder(path: Path) -> Path:
    """Create a folder that only its owner may enter, for what this machine makes; raise `OutputError` as above."""
    make_folder(path)
    try:
        path.chmod(0o700)
    except OSError as error:
        raise output_error(path, error) from error
    return path


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def output_error(path: Path, error: OSError) -> OutputError:
    """Name the reason why `path` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError("disk-full", f"expected room for {path}, found the disk full: free some space and run again")
    reason = error.strerror or type(error).__name__
    return OutputError("output-unwritable", f"expected to write {path}, found: {reason}: choose another place")


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def state_folder() -> Path:
    """Return the folder for what this machine makes (plans, added entries): `$DINTS_STATE`, or the user's own."""
    if configured := os.environ.get("DINTS_STATE"):
        return Path(configured)
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "dints-deploy"
