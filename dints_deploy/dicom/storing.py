"""C-STORE on an accepted association (PS3.7 9.3.1): every object is spooled while it arrives, then answered."""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.pdu_primitives import P_DATA

from dints_deploy.dicom.reception import Reception
from dints_deploy.dicom.spool import Incoming, Spool
from dints_deploy.errors import DintsError

LOGGER: Final = logging.getLogger(__name__)

PROCESSING_FAILURE: Final = 0x0110
"""Status where the fault is ours and unexpected (PS3.7 C.5.10)."""

COMMAND, LAST = 1, 2
"""Bits of a fragment's message control header (PS3.8 E.2)."""

COMMAND_BYTES: Final = 64 << 10
"""Of a command set; a C-STORE request has less than two hundred."""

ELEMENT: Final = struct.Struct("<HHL")
STORE_RQ, NO_DATA_SET = b"\x01\x00", b"\x01\x01"
"""Values of CommandField and CommandDataSetType (PS3.7 E.1)."""


@dataclass(frozen=True)
class Request:
    """A C-STORE request (PS3.7 9.3.1.1)."""

    SOPClassUID: str
    SOPInstanceUID: str
    MessageID: int


class Storing(DIMSEServiceProvider):  # type: ignore[misc]  # the library has no types
    """Takes C-STORE requests itself: their data sets go to files, and an answer goes out. The rest is the library's."""

    def __init__(self, association: Any, reception: Reception, folder: Path, limit_bytes: int) -> None:
        super().__init__(association)
        self._association, self._reception = association, reception
        self._folder, self._limit = folder, limit_bytes
        self._command = bytearray()
        self._request: tuple[int, Request, Spool] | None = None

    def receive_primitive(self, primitive: Any) -> None:
        """Take the fragments of one P-DATA that the library read, in their order."""
        for context_id, data in list(primitive.presentation_data_value_list):
            self.take(context_id, memoryview(data))

    def take(self, context_id: int, fragment: memoryview) -> None:
        """Take a fragment: its message control header (PS3.8 E.2), then a piece of a command or of a data set.

        Raises:
            ValueError: it does not belong to what came before.
        """
        control, value = fragment[0], fragment[1:]
        if self._request is not None:
            of_request, request, spool = self._request
            if control & COMMAND or context_id != of_request:
                raise ValueError("expected the data set of the request, found another fragment")
            spool.write(value)
            if control & LAST:
                self._answer(context_id, request, spool)
        elif control & COMMAND:
            self._take_command(context_id, value, last=bool(control & LAST))
        else:
            self._pass_on(context_id, control, value)

    def _take_command(self, context_id: int, value: memoryview, *, last: bool) -> None:
        """Gather a command set; begin with a request to store, leave other commands to the library."""
        self._command += value
        if len(self._command) > COMMAND_BYTES:
            raise ValueError(f"expected a command set of at most {COMMAND_BYTES} bytes, found a larger one")
        if not last:
            return
        command, self._command = bytes(self._command), bytearray()
        context = self._association._accepted_cx.get(context_id)
        request = store_request(command)
        if context is None or request is None:
            self._pass_on(context_id, COMMAND | LAST, command)
            return
        syntax = context.transfer_syntax[0]
        uids = (request.SOPClassUID, request.SOPInstanceUID, syntax)
        self._request = (context_id, request, Spool(self._folder, *uids, limit_bytes=self._limit, fault=self._fault()))

    def _fault(self) -> DintsError | None:
        """Return why an object would not be taken: then its bytes are not even written."""
        try:
            self._reception.check_room()
        except DintsError as fault:
            return fault
        return None

    def _pass_on(self, context_id: int, control: int, value: bytes | memoryview) -> None:
        primitive = P_DATA()
        primitive.presentation_data_value_list = [[context_id, bytes((control,)) + value]]
        super().receive_primitive(primitive)

    def _answer(self, context_id: int, request: Request, spool: Spool) -> None:
        status = self._store(spool)
        self._request = None
        self._association.dul.socket.send(store_answer(context_id, request, status))

    def _store(self, spool: Spool) -> int:
        """Return the status that the reception gives to an object."""
        try:
            try:
                incoming: Incoming | DintsError = spool.finish()
            except DintsError as fault:
                incoming = fault
            return self._reception.store(self._association.peer, incoming)
        except Exception:
            LOGGER.exception("an object could not be taken", extra={"action": "store_failed"})
            return PROCESSING_FAILURE
        finally:
            spool.discard()

    def discard(self) -> None:
        """Remove what came in of an object that will not be whole."""
        if self._request is not None:
            self._request[2].discard()


def store_request(command: bytes) -> Request | None:
    """Return what a command set (PS3.7 6.3.1) asks for where it is a C-STORE request with a data set, else None."""
    elements: dict[int, bytes] = {}
    offset = 0
    while offset + ELEMENT.size <= len(command):
        group, element, length = ELEMENT.unpack_from(command, offset)
        offset += ELEMENT.size + length
        if group == 0:
            elements[element] = command[offset - length : offset]
    whole = offset == len(command) and all(len(elements.get(one, b"")) == 2 for one in (0x0100, 0x0110, 0x0800))
    if not whole or elements[0x0100] != STORE_RQ or elements[0x0800] == NO_DATA_SET:
        return None
    uids = [elements.get(one, b"").decode("ascii", "replace").rstrip("\0 ") for one in (0x0002, 0x1000)]
    return Request(uids[0], uids[1], int.from_bytes(elements[0x0110], "little"))


def store_answer(context_id: int, request: Request, status: int) -> bytes:
    """Return the P-DATA-TF PDU (PS3.8 9.3.5) of a C-STORE response (PS3.7 9.3.1.2).

    Written out here, as the library's way costs as much as reading the header of the object.
    """
    command = b"".join(
        (
            _element(0x0002, request.SOPClassUID.encode("ascii", "replace")),
            _element(0x0100, struct.pack("<H", 0x8001)),
            _element(0x0120, struct.pack("<H", request.MessageID)),
            _element(0x0800, NO_DATA_SET),
            _element(0x0900, struct.pack("<H", status)),
            _element(0x1000, request.SOPInstanceUID.encode("ascii", "replace")),
        )
    )
    command = _element(0x0000, struct.pack("<L", len(command))) + command
    value = struct.pack(">LBB", len(command) + 2, context_id, COMMAND | LAST) + command
    return struct.pack(">BBL", 4, 0, len(value)) + value


def _element(element: int, value: bytes) -> bytes:
    """Return an element of a command set: Implicit VR Little Endian, padded to even length (PS3.7 6.3.1)."""
    value += b"\0" * (len(value) % 2)
    return ELEMENT.pack(0, element, len(value)) + value
