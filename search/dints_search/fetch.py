"""Download a task of the Medical Segmentation Decathlon: MONAI's list of addresses and checksums, verified, unpacked.

Nothing is left behind but the verified task: the archive is unpacked beside its place and moved there as a whole. Where
the connection breaks, or the disk is full, what came is kept, hidden, and the next call goes on from there.
"""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dints_deploy.catalog.dataset import read_dataset
from dints_deploy.errors import DatasetError, UsageError
from dints_deploy.files import CHUNK_BYTES, make_folder, output_error, sync_folder
from dints_search.recipe import match_task

TIMEOUT_SECONDS: Final = 30
"""Silence after which a download is given up."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all); 0 in all where the server does not say."""


@dataclass(frozen=True)
class Source:
    """Where a task's tar archive lies, and the MD5 of its bytes."""

    url: str
    md5: str


def msd_sources() -> dict[str, Source]:
    """Return the ten tasks by name, as MONAI lists them."""
    from monai.apps import DecathlonDataset

    return {task: Source(url, DecathlonDataset.md5[task]) for task, url in DecathlonDataset.resource.items()}


def find_task(task: str, sources: Mapping[str, Source]) -> str:
    """Return the name of a task given by number (4, 04), name (hippocampus) or full name.

    Raises:
        UsageError: `usage`, listing the tasks there are.
    """
    if name := match_task(task, sources):
        return name
    raise UsageError("usage", f"expected a task of {', '.join(sources)}, found {task!r}")


def fetch(
    task: str,
    out: Path,
    *,
    sources: Mapping[str, Source] | None = None,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Download a task to `out/<name>`, check its MD5, unpack it, and return its folder.

    Raises:
        UsageError: no such task, or its folder is there already. DatasetError: `fetch-failed` when the network, the
            checksum or the archive is not as expected. OutputError: `out` cannot be written.
    """
    known = msd_sources() if sources is None else sources
    name = find_task(task, known)
    target = out / name
    if target.exists():
        raise UsageError("usage", f"expected no {target} yet: it is there already; `data check` it, or remove it")
    make_folder(out)
    archive = out / f".{name}.tar.part"
    try:
        _download(known[name], archive, progress)
        try:
            _install(archive, known[name], target)
        except DatasetError:
            archive.unlink()  # it is not what was published
            raise
        archive.unlink()
    except OSError as error:
        raise output_error(target, error) from error
    return target


def _download(source: Source, archive: Path, progress: Progress) -> None:
    """Append to an archive what it lacks."""
    try:
        with archive.open("ab") as file:
            for chunk, start, total in _chunks(source.url, file.tell()):
                if start < file.tell():
                    file.truncate(start)  # the server began anew
                file.write(chunk)
                progress(start + len(chunk), total)
    finally:
        if archive.exists() and not archive.stat().st_size:
            archive.unlink()


def _install(archive: Path, source: Source, target: Path) -> None:
    """Check an archive and put the task that it holds in its place, as a whole."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as work:
        _check_digest(archive, source)
        _unpack(archive, Path(work))
        read_dataset(Path(work) / target.name)
        shutil.move(Path(work) / target.name, target)
    sync_folder(target.parent)


def _check_digest(archive: Path, source: Source) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != source.md5:
        raise DatasetError(
            "fetch-failed",
            f"expected MD5 {source.md5} of {source.url}, found {found} after {archive.stat().st_size} bytes: "
            "fetch it again",
        )


def _chunks(url: str, start: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the bytes at an address from `start` on, or from 0, where the server gives no part of a file.

    Yields:
        A piece, where in the file it begins, and the number of bytes in all, 0 where the server does not say.
    """
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            done = start if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
            length = int(response.headers.get("Content-Length") or 0)
            total = done + length if length else 0
            while chunk := response.read(CHUNK_BYTES):
                yield chunk, done, total
                done += len(chunk)
            if done < total:
                raise ConnectionError(f"the connection ended after {done} of {total} bytes, call again to go on")
    except (OSError, http.client.HTTPException, ValueError) as error:  # of the network: nothing is written here
        reason = getattr(error, "reason", error)
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            if start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return  # nothing is lacking
        raise DatasetError(
            "fetch-failed", f"expected to read {url}, found: {reason}: fetch it where there is a network, and copy it"
        ) from error


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack regular files and folders only, none of them outside `folder`; leave out the `._` files of macOS."""
    try:
        with tarfile.open(archive) as tar:
            wanted = [m for m in tar if (m.isfile() or m.isdir()) and not Path(m.name).name.startswith("._")]
            tar.extractall(folder, members=wanted, filter="data")
    except tarfile.TarError as error:
        raise DatasetError("fetch-failed", f"expected a sound tar archive, found: {error}") from error
