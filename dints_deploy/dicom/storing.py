"""C-STORE on an accepted association (PS3.7 9.3.1): every object is spooled while it arrives, then answered."""

from __future__ import annotations

import logging
import struct
from pathlib import Path
from typing import Any, Final

from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import C_STORE_RQ

from dints_deploy.dicom.reception import Reception
from dints_deploy.dicom.spool import Incoming, Spool
from dints_deploy.errors import DintsError

LOGGER: Final = logging.getLogger(__name__)

PROCESSING_FAILURE: Final = 0x0110
"""Status where the fault is ours and unexpected (PS3.7 C.5.10)."""

COMMAND, LAST = 1, 2
"""Bits of a fragment's message control header (PS3.8 E.2)."""


class Storing(DIMSEServiceProvider):  # type: ignore[misc]  # the library has no types
    """Takes C-STORE requests itself: their data sets go to files, and an answer goes out. The rest is the library's."""

    message: Any

    def __init__(self, association: Any, reception: Reception, folder: Path, limit_bytes: int) -> None:
        super().__init__(association)
        self._association, self._reception = association, reception
        self._folder, self._limit = folder, limit_bytes
        self._spool: Spool | None = None

    def receive_primitive(self, primitive: Any) -> None:
        """Take the fragments of one P-DATA in their order."""
        for context_id, data in list(primitive.presentation_data_value_list):
            context = self._association._accepted_cx.get(context_id)
            if isinstance(self.message, C_STORE_RQ) and not data[0] & COMMAND and context is not None:
                self._take(context, data)
            else:
                primitive.presentation_data_value_list = [[context_id, data]]
                super().receive_primitive(primitive)

    def _take(self, context: Any, data: bytes) -> None:
        """Take a fragment of an object; answer the request after the last one."""
        command = self.message.command_set
        uids = (str(command.get("AffectedSOPClassUID", "")), str(command.get("AffectedSOPInstanceUID", "")))
        if self._spool is None:
            self._spool = Spool(self._folder, *uids, context.transfer_syntax[0], limit_bytes=self._limit)
        self._spool.write(memoryview(data)[1:])
        if not data[0] & LAST:
            return
        status = self._store(self._spool)
        self._spool = self.message = None
        self._association.dul.socket.send(store_answer(context.context_id, *uids, command.MessageID, status))

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
        if self._spool is not None:
            self._spool.discard()


def store_answer(context_id: int, sop_class: str, sop_instance: str, message_id: int, status: int) -> bytes:
    """Return the P-DATA-TF PDU (PS3.8 9.3.5) of a C-STORE response (PS3.7 9.3.1.2).

    Written out here, as the library's way costs as much as reading the header of the object.
    """
    command = b"".join(
        (
            _element(0x0002, sop_class.encode()),
            _element(0x0100, struct.pack("<H", 0x8001)),
            _element(0x0120, struct.pack("<H", message_id)),
            _element(0x0800, struct.pack("<H", 0x0101)),  # no data set follows
            _element(0x0900, struct.pack("<H", status)),
            _element(0x1000, sop_instance.encode()),
        )
    )
    command = _element(0x0000, struct.pack("<L", len(command))) + command
    value = struct.pack(">LBB", len(command) + 2, context_id, COMMAND | LAST) + command
    return struct.pack(">BBL", 4, 0, len(value)) + value


def _element(element: int, value: bytes) -> bytes:
    """Return an element of a command set: Implicit VR Little Endian, padded to even length (PS3.7 6.3.1)."""
    value += b"\0" * (len(value) % 2)
    return struct.pack("<HHL", 0, element, len(value)) + value
