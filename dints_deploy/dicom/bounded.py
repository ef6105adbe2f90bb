"""Open and read DICOM files within bounds: regular files only, limited headers and inflation, no crash on damage."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final

from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_dataset, read_preamble
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from dints_deploy.errors import ScanRefused

PIXEL_TAGS: Final = (0x7FE00008, 0x7FE00009, 0x7FE00010)
"""Float, double float and integer pixel data: where the header ends."""

UNDEFINED_LENGTH: Final = 0xFFFFFFFF
"""The length of encapsulated pixel data (PS3.5 A.4)."""

INVALID_FILE: Final = (
    ArithmeticError, AttributeError, BytesLengthException, EOFError, InvalidDicomError, LookupError, MemoryError,
    NotImplementedError, OSError, RecursionError, TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip
"""What pydicom raises on damaged bytes (it promises no single type). Their texts quote values, which may identify a
patient: they are neither repeated nor chained."""


@dataclass(frozen=True)
class Limits:
    """What a file, an archive or a header may claim.

    Attributes:
        files: regular files under one source.
        header_bytes: bytes before the pixel data.
        archive_bytes: unpacked size of a zip.
        archive_ratio: unpacked over packed size of a zip member.
        rows_columns: rows or columns of an image plane.
        frames: planes of one file.
        stack_bytes: decoded float32 values of one series.
        frame_seconds: time to decode one compressed frame.
        decoder_bytes: address space of one decoding process, over the frame itself.
    """

    files: int = 100_000
    header_bytes: int = 64 << 20
    archive_bytes: int = 16 << 30
    archive_ratio: int = 1000
    rows_columns: int = 8192
    frames: int = 65_536
    stack_bytes: int = 8 << 30
    frame_seconds: float = 60.0
    decoder_bytes: int = 2 << 30


DEFAULT_LIMITS: Final = Limits()


@dataclass(frozen=True)
class RawHeader:
    """A file's data set up to its pixel data.

    Attributes:
        dataset: the elements before the pixel data.
        meta: the file meta information (PS3.10 7.1).
        TransferSyntaxUID: of the data set (PS3.10 7.1).
        pixel_tag: tag of the pixel element, 0 where there is none.
        pixel_offset: where the value of the pixel element starts, in the file or in the inflated data set.
        pixel_length: its length as the header says, `UNDEFINED_LENGTH` where it is encapsulated.
        pixel_vr: its value representation.
        available: bytes from `pixel_offset` to the end of the file; unknown (-1) in a deflated data set.
    """

    dataset: Dataset
    meta: Dataset
    TransferSyntaxUID: str
    pixel_tag: int = 0
    pixel_offset: int = 0
    pixel_length: int = 0
    pixel_vr: str = ""
    available: int = 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom's warnings and log: they quote odd values, which may identify a patient."""
    logger = logging.getLogger("pydicom")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def too_many_voxels(count: int, limits: Limits) -> ScanRefused:
    """Return the refusal of a series that takes `count` bytes when decoded."""
    expected = f"expected at most {limits.stack_bytes} bytes of voxels"
    return ScanRefused("dicom-too-large", f"{expected}, found {count}: choose a smaller series")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading without following a link and without waiting on a pipe.

    Raises:
        ScanRefused: `dicom-not-a-file` for anything else, `scan-missing` where it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise ScanRefused(
                "dicom-not-a-file", "expected a regular file, found a link: name the file itself"
            ) from error
        reason = error.strerror or type(error).__name__
        raise ScanRefused("scan-missing", f"expected a readable file, found: {reason}: check its rights") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ScanRefused("dicom-not-a-file", "expected a regular file, found a folder, device or pipe: leave it out")
    return os.fdopen(descriptor, "rb")


def read_header(path: Path, *, limits: Limits = DEFAULT_LIMITS) -> RawHeader:
    """Read a file's data set up to its pixel data, in windows that grow until the pixel data is found.

    Raises:
        ScanRefused: `dicom-not-dicom`, `dicom-corrupt`, `dicom-truncated`, `dicom-too-large`, `dicom-not-a-file`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        for window in (32 << 10, 1 << 20, limits.header_bytes):
            file.seek(0)
            start = file.read(min(window, limits.header_bytes))
            whole = len(start) == size
            try:
                header = _parse(start, size=size, window=window)
            except INVALID_FILE as error:
                if whole or window >= limits.header_bytes:
                    raise _named(error, start) from None
                continue
            if header.pixel_tag or whole:
                return header
    raise ScanRefused(
        "dicom-too-large",
        f"expected a header of at most {limits.header_bytes} bytes, found a longer one: check the file",
    )


def _named(error: BaseException, start: bytes) -> ScanRefused:
    """Name what is wrong with a file that pydicom cannot parse, without any of its content."""
    if len(start) == 0:
        return ScanRefused("scan-empty", "expected a DICOM file, found an empty one: send it again")
    if isinstance(error, InvalidDicomError):
        return ScanRefused("dicom-not-dicom", "expected a DICOM file (PS3.10 7.1), found another: leave it out")
    if isinstance(error, EOFError):
        return ScanRefused("dicom-truncated", "expected a whole header, found the end of the file: send it again")
    kind = type(error).__name__
    return ScanRefused("dicom-corrupt", f"expected a readable header, found damage ({kind}): send the file again")


def _parse(start: bytes, *, size: int, window: int) -> RawHeader:
    """Parse the first bytes of a file of `size` bytes; inflate at most `window` bytes."""
    buffer = io.BytesIO(start)
    read_preamble(buffer, False)
    meta = read_dataset(buffer, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    syntax = str(meta.get("TransferSyntaxUID") or "")
    if not syntax:
        raise ScanRefused("dicom-syntax", "expected a TransferSyntaxUID (PS3.10 7.1), found none: send the file again")
    if syntax == DeflatedExplicitVRLittleEndian:  # PS3.5 A.5
        buffer = io.BytesIO(zlib.decompressobj(-zlib.MAX_WBITS).decompress(buffer.read(), window))
        size = -1
    little = syntax != ExplicitVRBigEndian
    dataset = read_dataset(buffer, syntax == ImplicitVRLittleEndian, little, stop_when=_is_pixel_data)
    implicit = bool(dataset.original_encoding[0])  # what the bytes are, where the meta information lies about it
    header = RawHeader(dataset, meta, syntax)
    return _pixel_element(header, buffer, implicit=implicit, order="<" if little else ">", size=size)


def _is_pixel_data(tag: BaseTag, vr: str | None, length: int) -> bool:
    return tag in PIXEL_TAGS


def _pixel_element(header: RawHeader, buffer: io.BytesIO, *, implicit: bool, order: str, size: int) -> RawHeader:
    """Add the tag, VR and length that `buffer` stands at (PS3.5 7.1); none of them where it is at its end."""
    lead = buffer.read(8 if implicit else 12)
    if len(lead) < (8 if implicit else 12):
        return header
    group, element = struct.unpack(f"{order}HH", lead[:4])
    tag = (group << 16) | element
    if tag not in PIXEL_TAGS:
        return header
    (length,) = struct.unpack(f"{order}L", lead[-4:])
    offset = buffer.tell()
    return replace(
        header,
        pixel_tag=tag,
        pixel_offset=offset,
        pixel_length=length,
        pixel_vr="OW" if implicit else lead[4:6].decode("ascii", "replace"),
        available=size - offset if size >= 0 else -1,
    )


def inflate(path: Path, count: int) -> bytes:
    """Return the first `count` bytes of a deflated data set (PS3.5 A.5), never unpacking more.

    Raises:
        ScanRefused: `dicom-truncated` or `dicom-corrupt`.
    """
    try:
        with open_regular(path) as file:
            read_preamble(file, False)
            read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(), count)
    except INVALID_FILE:
        raise ScanRefused("dicom-corrupt", "expected a deflated data set, found damage: send the file again") from None
    if len(data) < count:
        found = f"found {len(data)}"
        raise ScanRefused("dicom-truncated", f"expected {count} inflated bytes, {found}: send the file again")
    return data
