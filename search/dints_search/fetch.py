"""Download a task of the Medical Segmentation Decathlon: MONAI's list of addresses and checksums, verified, unpacked.

Nothing is left behind but the verified task: the archive is unpacked beside its place and moved there as a whole.
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
    with tempfile.TemporaryDirectory(dir=out, prefix=".fetching-") as work:
        archive = Path(work) / f"{name}.tar"
        try:
            _download(known[name], archive, progress)
            _unpack(archive, Path(work) / "unpacked")
            unpacked = Path(work) / "unpacked" / name
            read_dataset(unpacked)
            shutil.move(unpacked, target)
        except OSError as error:
            raise output_error(target, error) from error
    sync_folder(out)
    return target


def _download(source: Source, archive: Path, progress: Progress) -> None:
    digest, done = hashlib.md5(usedforsecurity=False), 0
    with archive.open("wb") as file:
        for chunk, total in _chunks(source.url):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            progress(done, total)
    if digest.hexdigest() != source.md5:
        raise DatasetError(
            "fetch-failed",
            f"expected MD5 {source.md5} of {source.url}, found {digest.hexdigest()} after {done} bytes: fetch it again",
        )


def _chunks(url: str) -> Iterator[tuple[bytes, int]]:
    """Yield the bytes at an address piece by piece, each with the number of bytes in all."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            total = int(response.headers.get("Content-Length") or 0)
            while chunk := response.read(CHUNK_BYTES):
                yield chunk, total
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(error, urllib.error.HTTPError):
            error.close()
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
