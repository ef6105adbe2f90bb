"""P-DATA of an accepted association (PS3.8 9.3.5): read into one buffer, and handed on from there without a copy.

The library copies every PDU five times, queues it between its layers, and rests a millisecond where its queue of events
is empty. Of half a megabyte that costs more than all else that is done for it. Everything but P-DATA stays its own.
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from select import select
from typing import Any, Final

from pynetdicom.association import Association
from pynetdicom.dul import DULServiceProvider

from dints_deploy.dicom.network import ClosingSocket

POLL_SECONDS: Final = 0.01
"""How long an association rests before it looks again whether there is something to do; data wakes it at once."""

DATA_TRANSFER: Final = "Sta6"
"""The state in which an association is established (PS3.8 9.2.1)."""

CLOSED: Final = "Evt17"
INVALID: Final = "Evt19"
"""Events of the library: the transport connection is closed; a PDU is invalid (PS3.8 9.2.2)."""

HEAD: Final = struct.Struct(">BxL")
ITEM: Final = struct.Struct(">LB")
P_DATA_TF: Final = 4

Take = Callable[[int, memoryview], None]
"""Takes the context's id and a fragment with its message control header; raises `ValueError` where it makes no sense.
The fragment is only good until it returns."""


class BoundedSocket(ClosingSocket):
    """Reads whole PDUs, and no larger ones than allowed: a header may claim 4 GiB.

    Attributes:
        limit_bytes: of a PDU.
    """

    def __init__(self, association: Association, connection: socket.socket, limit_bytes: int) -> None:
        super().__init__(association, client_socket=connection)
        self.limit_bytes = limit_bytes
        self._unread = b""

    @property
    def ready(self) -> bool:
        """Wait a little for something to read; the library asks all the time."""
        if self.socket is None or not self._is_connected:
            return False
        if self._unread or (isinstance(self.socket, ssl.SSLSocket) and self.socket.pending()):
            return True
        try:
            return bool(select([self.socket], [], [], POLL_SECONDS)[0])
        except (OSError, ValueError):
            self.event_queue.put(CLOSED)
            return False

    def unread(self, data: bytes) -> None:
        """Have the next `recv` begin with `data`."""
        self._unread = data

    def recv(self, nr_bytes: int) -> bytearray:
        """Read `nr_bytes`, less where the peer closes; raise `OSError` where that is more than allowed."""
        if nr_bytes > self.limit_bytes:
            raise OSError(f"expected a PDU of at most {self.limit_bytes} bytes, found {nr_bytes}")
        data = bytearray(nr_bytes)
        return data[: self.fill(memoryview(data))]

    def fill(self, view: memoryview) -> int:
        """Read into `view`; return how many bytes came before the peer closed."""
        done = len(self._unread)
        view[:done], self._unread = self._unread, b""
        while done < len(view):
            # A sender that waits for our acknowledgement of a small PDU (Nagle) would wait 40 ms for it; the kernel
            # forgets the wish after each time.
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            count = self.socket.recv_into(view[done:])
            if not count:
                break
            done += count
        return done


class Reader(DULServiceProvider):  # type: ignore[misc]  # the library has no types
    """The library's upper layer with a way of its own for P-DATA."""

    socket: Any

    def __init__(self, association: Association, take: Take) -> None:
        super().__init__(association)
        self.daemon = True  # an open association must not keep a process alive that was told to end
        self._take = take
        self._buffer = bytearray()

    def _read_pdu_data(self) -> None:
        """Read a PDU; where it is P-DATA, also those that follow at once."""
        try:
            while self.state_machine.current_state == DATA_TRANSFER:
                head = bytes(self.socket.recv(HEAD.size))
                if len(head) < HEAD.size or head[0] != P_DATA_TF:
                    self.socket.unread(head)
                    break
                for context_id, fragment in fragments(self._body(HEAD.unpack(head)[1])):
                    self._take(context_id, fragment)
                self._idle_timer.restart()  # whoever sends without a pause is not idle
                if self._kill_thread or not self.to_provider_queue.empty() or not self.socket.ready:
                    return
        except (OSError, EOFError):
            self.event_queue.put(CLOSED)
        except ValueError:
            self.event_queue.put(INVALID)
        else:
            super()._read_pdu_data()

    def _body(self, length: int) -> memoryview:
        """Read the rest of a PDU; it is good until the next one is read."""
        if length > self.socket.limit_bytes:
            raise OSError("expected a smaller PDU")
        if length > len(self._buffer):
            self._buffer = bytearray(length)
        view = memoryview(self._buffer)[:length]
        if self.socket.fill(view) < length:
            raise EOFError
        return view


def fragments(body: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield context id and fragment of each presentation data value of a P-DATA-TF PDU.

    Raises:
        ValueError: the lengths do not add up.
    """
    offset = 0
    while offset < len(body):
        if offset + ITEM.size + 1 > len(body):
            raise ValueError("expected a presentation data value, found the end of the PDU")
        length, context_id = ITEM.unpack_from(body, offset)
        end = offset + 4 + length
        if length < 2 or end > len(body):
            raise ValueError("expected a presentation data value within its PDU, found another length")
        yield context_id, body[offset + ITEM.size : end]
        offset = end
