"""Unpack a zip within bounds: no links, no nested archives, no path outside, names of ours instead of the archive's."""

from __future__ import annotations

import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final

from dints_deploy.dicom.bounded import DEFAULT_LIMITS, Limits, open_regular
from dints_deploy.errors import ScanRefused

ARCHIVE_STARTS: Final = (
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ",
    b"7z\xbc\xaf",
    b"Rar!",
    b"\x28\xb5\x2f\xfd",
)
"""How zip, gzip, bzip2, xz, 7z, rar and zstandard files begin."""

TAR_MAGIC_AT: Final = 257
"""Where a tar file has the letters "ustar"."""

CHUNK_BYTES: Final = 1 << 20
ENCRYPTED: Final = 0x1
DAMAGE: Final = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError)
"""What zipfile raises on damaged or unsupported archives."""


def is_zip(path: Path) -> bool:
    """Say whether a regular file begins as a zip does."""
    with open_regular(path) as file:
        return file.read(4) in ARCHIVE_STARTS[:2]


def unpack(archive: Path, folder: Path, *, limits: Limits = DEFAULT_LIMITS) -> tuple[Path, ...]:
    """Write the files of a zip into `folder` as 000000, 000001, ... in the archive's order.

    Raises:
        ScanRefused: `dicom-archive` for damage, encryption, links, nested archives and paths outside;
            `dicom-too-large` when it holds, or unpacks to, more than the limits.
    """
    try:
        with open_regular(archive) as file, zipfile.ZipFile(file) as opened:
            members = [info for info in opened.infolist() if not info.is_dir()]
            _check(members, limits)
            left = limits.archive_bytes
            written = []
            for number, info in enumerate(members):
                path = folder / f"{number:06d}"
                with opened.open(info) as member:
                    left -= _copy(member, path, left)  # type: ignore[arg-type]
                written.append(path)
            return tuple(written)
    except DAMAGE as error:
        kind = type(error).__name__
        raise ScanRefused("dicom-archive", f"expected a readable zip, found damage ({kind}): pack it again") from error


def _check(members: list[zipfile.ZipInfo], limits: Limits) -> None:
    """Refuse an archive by what its directory claims, before anything is unpacked."""
    if len(members) > limits.files:
        found = f"found {len(members)}: pack one study"
        raise ScanRefused("dicom-too-large", f"expected at most {limits.files} files in the zip, {found}")
    for info in members:
        parts = PurePosixPath(info.filename.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]:
            raise ScanRefused("dicom-archive", "expected paths inside the zip, found one that leads outside: refused")
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise ScanRefused("dicom-archive", "expected regular files in the zip, found a link or device: refused")
        if info.flag_bits & ENCRYPTED:
            raise ScanRefused("dicom-archive", "expected a zip without a password, found an encrypted one: unpack it")
        if info.file_size > limits.archive_ratio * max(info.compress_size, 1024):
            expected = f"expected to unpack at most {limits.archive_ratio} times"
            raise ScanRefused("dicom-too-large", f"{expected}, found more: unpack the zip yourself")
    total = sum(info.file_size for info in members)
    if total > limits.archive_bytes:
        found = f"found {total}: pack one study"
        raise ScanRefused("dicom-too-large", f"expected at most {limits.archive_bytes} bytes unpacked, {found}")


def _copy(member: BinaryIO, path: Path, left: int) -> int:
    """Write a member to `path`; return its size, at most `left` bytes whatever the directory claimed."""
    size = 0
    with path.open("xb") as out:
        for chunk in _chunks(member):
            if size == 0 and _is_archive(chunk):
                raise ScanRefused("dicom-archive", "expected DICOM files in the zip, found an archive in it: unpack it")
            size += len(chunk)
            if size > left:
                raise ScanRefused(
                    "dicom-too-large", "expected the zip to unpack to its stated size, found more: refused"
                )
            out.write(chunk)
    return size


def _chunks(member: BinaryIO) -> Iterator[bytes]:
    while chunk := member.read(CHUNK_BYTES):
        yield chunk


def _is_archive(start: bytes) -> bool:
    return start.startswith(ARCHIVE_STARTS) or start[TAR_MAGIC_AT : TAR_MAGIC_AT + 5] == b"ustar"
