"""Predict the cases whose labels a leaderboard keeps, and pack them as the Medical Segmentation Decathlon wants them.

TASK/<case>.nii.gz, each on its scan's own grid, whole numbers; one archive per task, which the leaderboard unpacks
beside the other tasks'.
"""

from __future__ import annotations

import gzip
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from dints_deploy.catalog.entry import Entry
from dints_deploy.errors import ScanRefused, UsageError
from dints_deploy.files import make_folder, replacing
from dints_deploy.imaging.nifti import read_grid, read_nifti, write_nifti
from dints_deploy.runtime.accepts import check_accepts, check_grid
from dints_deploy.runtime.engine import Session
from dints_deploy.runtime.preprocess import prepare
from dints_deploy.runtime.segment import run

ZIP_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
"""The time written for every file, so that equal predictions give equal archives."""


def check_archive_name(path: Path) -> None:
    """Refuse a file name that is no archive's; raise `UsageError` (`usage`)."""
    if not path.name.lower().endswith((".zip", ".tar.gz")):
        raise UsageError("usage", f"expected a name that ends with .zip or .tar.gz, found {path.name}")


def submit(
    cases: Mapping[str, Path],
    spec: Entry,
    sessions: Sequence[Session],
    task: str,
    out: Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Segment cases and pack their labels into `out`, whole or not at all.

    Args:
        cases: id -> image.
        spec: the entry, or what a run would publish.
        sessions: its loaded networks.
        task: the archive's folder, such as Task04_Hippocampus.
        out: a .zip or .tar.gz.
        progress: called after every case.

    Raises:
        UsageError: another kind of archive. ScanRefused: the entry does not accept a case; it is named.
    """
    check_archive_name(out)
    for case, image in cases.items():  # an archive without one of them is refused: know it before hours of work
        with _named(case):
            check_grid(read_grid(image), spec.name, spec.accepts, spec.geometry)
    make_folder(out.parent)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".submitting-") as work:
        files = []
        for number, (case, image) in enumerate(cases.items(), start=1):
            path = Path(work) / f"{case}.nii.gz"
            _predict(case, image, path, spec, sessions)
            files.append(path)
            progress(number, len(cases))
        with replacing(out) as partial:
            _pack(files, task, partial)
    return out


def _predict(case: str, image: Path, path: Path, spec: Entry, sessions: Sequence[Session]) -> None:
    with _named(case):
        scan = read_nifti(image)
        check_accepts(scan, spec)
        prepared = prepare(scan, spec.preparation)
    result = run(prepared, spec, sessions)
    write_nifti(path, result.labels)


@contextmanager
def _named(case: str) -> Iterator[None]:
    """Put the case's name before a refusal."""
    try:
        yield
    except ScanRefused as refusal:
        raise ScanRefused(refusal.code, f"case {case}: {refusal.message}") from refusal


def _pack(files: Sequence[Path], task: str, archive: Path) -> None:
    """Write files into `task/` of an archive; they are compressed already."""
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as zipped:
            for file in files:
                zipped.writestr(zipfile.ZipInfo(f"{task}/{file.name}", ZIP_EPOCH), file.read_bytes())
        return
    with (
        archive.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for file in files:
            tar.add(file, f"{task}/{file.name}", filter=_anonymous)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return a member of an archive without the time and the user of this machine."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member
