"""One object while it comes in over the network: its bytes go to a file as they are, digested as they pass."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dints_deploy.dicom.uid import derived_uid
from dints_deploy.errors import DintsError, IntakeRefused
from dints_deploy.files import output_error

IMPLEMENTATION_CLASS_UID: Final = derived_uid("dints-deploy", "implementation class")
IMPLEMENTATION_VERSION_NAME: Final = "DINTS_DEPLOY"
"""Both without a version: the same object received by another version must give the same bytes, and so digest."""

VALID_UID: Final = re.compile(r"[0-9.]{1,64}")


@dataclass(frozen=True)
class Incoming:
    """An object that has been received; its file is written, not yet durable.

    Attributes:
        path: a file of its own, with the file meta information (PS3.10 7.1) before the data set as it was sent.
        sha256, size_bytes: of the whole file.
        SOPClassUID, SOPInstanceUID: as the request said them, which the data set may contradict.
    """

    path: Path
    sha256: str
    size_bytes: int
    SOPClassUID: str
    SOPInstanceUID: str
    TransferSyntaxUID: str


class Spool:
    """The file of one object while its fragments come in. Used by one thread."""

    def __init__(
        self,
        folder: Path,
        sop_class: str,
        sop_instance: str,
        syntax: str,
        *,
        limit_bytes: int,
        fault: DintsError | None = None,
    ) -> None:
        self._uids = (sop_class, sop_instance, syntax)
        self._path = folder / f"{secrets.token_hex(16)}.part"
        self._limit = limit_bytes
        self._digest = hashlib.sha256()
        self._size = 0
        self._file: int | None = None
        self._fault = fault  # nothing is written then
        if not all(VALID_UID.fullmatch(uid) for uid in self._uids):
            self._fault = IntakeRefused("intake-unreadable", "expected UIDs of digits and dots, found other characters")
            return
        self.write(file_head(*self._uids))

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes; after a fault they are dropped, so that the sender can be told at the end."""
        if self._fault is not None:
            return
        self._size += len(data)
        if self._size > self._limit:
            found = "found a larger one: send it in parts, or raise object_bytes of the listener"
            self._fail(IntakeRefused("intake-too-large", f"expected an object of at most {self._limit} bytes, {found}"))
            return
        self._digest.update(data)
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            left = memoryview(data)
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            self._fail(output_error(self._path, error))

    def finish(self) -> Incoming:
        """Return the whole object; its file belongs to the caller from now on.

        Raises:
            IntakeRefused: `intake-too-large`, `intake-unreadable`.
            OutputError: `disk-full`, `output-unwritable`. No file is left.
        """
        self._close()
        if self._fault is not None:
            raise self._fault
        sop_class, sop_instance, syntax = self._uids
        return Incoming(self._path, self._digest.hexdigest(), self._size, sop_class, sop_instance, syntax)

    def discard(self) -> None:
        """Remove what has come in."""
        self._close()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _fail(self, fault: DintsError) -> None:
        self._fault = fault
        self.discard()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def file_head(sop_class: str, sop_instance: str, syntax: str) -> bytes:
    """Return the preamble, prefix and file meta information of a data set (PS3.10 7.1).

    Written out here, as the library's way costs more than all else that is done for an object.
    """
    elements = b"".join(
        (
            struct.pack("<HH2sHL2s", 2, 0x0001, b"OB", 0, 2, b"\0\1"),
            _short(0x0002, b"UI", sop_class),
            _short(0x0003, b"UI", sop_instance),
            _short(0x0010, b"UI", syntax),
            _short(0x0012, b"UI", IMPLEMENTATION_CLASS_UID),
            _short(0x0013, b"SH", IMPLEMENTATION_VERSION_NAME),
        )
    )
    return bytes(128) + b"DICM" + struct.pack("<HH2sHL", 2, 0x0000, b"UL", 4, len(elements)) + elements


def _short(element: int, vr: bytes, text: str) -> bytes:
    """Return an element of group 0002 in Explicit VR Little Endian, padded to even length (PS3.5 7.1.2)."""
    value = text.encode("ascii")
    value += (b"\0" if vr == b"UI" else b" ") * (len(value) % 2)
    return struct.pack("<HH2sH", 2, element, vr, len(value)) + value
