"""A DICOM listener (PS3.7 C-STORE, C-ECHO SCP) on pynetdicom that spools objects to files, within bounds.

What this adds to the library: objects go to disk while they arrive and never lie in memory; a PDU, an object, the
number of connections and the time of silence are bounded; TLS shakes hands outside the accepting thread; who may send
is asked before anything is negotiated; and the end of every association is told, with whether it was clean.
"""

from __future__ import annotations

import logging
import secrets
import socket
import ssl
import threading
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, evt
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.presentation import build_context
from pynetdicom.service_class import StorageServiceClass
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification, uid_to_service_class
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from dints_deploy.dicom.network import ClosingSocket, reported, settle_library
from dints_deploy.dicom.spool import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, Incoming, Spool
from dints_deploy.errors import DintsError

LOGGER: Final = logging.getLogger(__name__)

NEGOTIATION_SECONDS: Final = 15.0
"""From the connection to the association (the ARTIM timer of PS3.8 9.1.5)."""

NEGOTIATION_BYTES: Final = 1 << 20
"""Largest PDU of a negotiation: 128 presentation contexts with many transfer syntaxes each."""

SPARE_CONNECTIONS: Final = 8
"""Connections over the limit that are still told so; more are closed without a word."""

CANNOT_UNDERSTAND: Final = 0xC000
"""Status of C-STORE for a request without a data set (PS3.4 B.2.3)."""

COMMAND, LAST = 1, 2
"""Bits of a fragment's message control header (PS3.8 E.2)."""


@dataclass(frozen=True)
class Bounds:
    """What a peer may ask of a listener; see `config.intake.Listener`."""

    associations: int
    pdu_bytes: int
    object_bytes: int
    idle_seconds: float


@dataclass(frozen=True)
class Peer:
    """The other side of one association.

    Attributes:
        association: a name of its own.
        address: of the other side.
        certified: whether it presented a certificate that was verified.
    """

    association: str
    address: str
    calling: str = ""
    called: str = ""
    certified: bool = False


@dataclass(frozen=True)
class Rejection:
    """Why an association is refused, as A-ASSOCIATE-RJ says it (PS3.8 9.3.4)."""

    result: int
    source: int
    diagnostic: int


class Reception(Protocol):
    """Who decides about what comes in. Called from the threads of the associations."""

    def welcome(self, address: str) -> bool:
        """Say whether a connection from an address is answered at all."""

    def admit(self, peer: Peer) -> Rejection | None:
        """Let an association be negotiated, or say why not."""

    def store(self, peer: Peer, incoming: Incoming | DintsError) -> int:
        """Take an object, or the reason why it could not be spooled; return the status of C-STORE (PS3.4 B.2.3)."""

    def committed(self, transaction: str, instances: frozenset[str]) -> None:
        """Take a report of storage commitment: the transaction and the instances that are safe (PS3.4 J.3.3)."""

    def closed(self, peer: Peer, *, clean: bool) -> None:
        """Take note that an association is over; clean where the peer released it."""


class Listening:
    """An open port."""

    def __init__(self, server: _Server, thread: threading.Thread) -> None:
        self._server, self._thread = server, thread

    @property
    def port(self) -> int:
        """Return the port that is listened on."""
        return int(self._server.server_address[1])

    @property
    def alive(self) -> bool:
        """Say whether connections are still accepted."""
        return self._thread.is_alive()

    @property
    def associations(self) -> int:
        """Return how many connections are open."""
        return len(self._server.active_associations)

    def stop(self, *, seconds: float) -> None:
        """Accept no more, give the open associations some time to finish, then abort them."""
        self._server.shutdown()
        open_ones = self._server.active_associations
        for association in open_ones:
            association.join(seconds / len(open_ones))
        for association in self._server.active_associations:
            association.abort()


def listen(
    address: tuple[str, int], reception: Reception, folder: Path, bounds: Bounds, *, tls: ssl.SSLContext | None = None
) -> Listening:
    """Open a port and receive objects into files of `folder`.

    Raises:
        OSError: the port cannot be opened.
    """
    settle_library()
    entity = AE()
    entity.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    entity.maximum_pdu_size = bounds.pdu_bytes
    entity.maximum_associations = bounds.associations
    entity.acse_timeout, entity.network_timeout = NEGOTIATION_SECONDS, bounds.idle_seconds
    server = _Server(entity, address, reception, folder, bounds, tls)
    name = f"dicom-port-{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name=name, daemon=True)
    thread.start()
    entity._servers.append(server)
    return Listening(server, thread)


class _Server(ThreadedAssociationServer):  # type: ignore[misc]  # the library has no types
    """Accepts connections within bounds."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        entity: AE,
        address: tuple[str, int],
        reception: Reception,
        folder: Path,
        bounds: Bounds,
        tls: ssl.SSLContext | None,
    ) -> None:
        self.reception, self.folder, self.bounds, self.tls = reception, folder, bounds, tls
        handlers = [
            (evt.EVT_REQUESTED, _negotiate),
            (evt.EVT_C_STORE, _store),
            (evt.EVT_N_EVENT_REPORT, _report),
        ]
        super().__init__(entity, address, "DINTS_DEPLOY", [], None, handlers, _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; its TLS handshake is left to its own thread."""
        connection, address = self.socket.accept()
        connection.settimeout(self.bounds.idle_seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection, address

    def verify_request(self, request: socket.socket, client_address: Any) -> bool:
        """Say whether a connection is answered."""
        full = len(self.active_associations) >= self.bounds.associations + SPARE_CONNECTIONS
        return not full and self.reception.welcome(client_address[0])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note a connection that failed before it became an association: a wrong certificate, a port scan."""
        LOGGER.warning("a connection failed", exc_info=True, extra={"action": "connection_failed"})


class _Handler(RequestHandler):  # type: ignore[misc]
    """Turns a connection into an association."""

    request: socket.socket
    server: _Server

    def setup(self) -> None:
        """Shake hands, where the port speaks TLS."""
        if self.server.tls is not None:
            self.request.settimeout(NEGOTIATION_SECONDS)
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
            self.request.settimeout(self.server.bounds.idle_seconds)

    def _create_association(self) -> Association:
        association = _Accepted(self.ae, self.server, self.request, self.client_address[0])
        association.acceptor.maximum_length = self.ae.maximum_pdu_size
        association.acceptor.ae_title = self.server.ae_title
        association.acceptor.address_info = self.local
        association.acceptor.implementation_class_uid = self.ae.implementation_class_uid
        association.acceptor.implementation_version_name = self.ae.implementation_version_name
        association.requestor.address_info = self.remote
        for event, handler in self.server._handlers.items():
            for function, arguments in [handler] if event.is_intervention else handler:
                association.bind(event, function, arguments)
        return association


class _Accepted(Association):  # type: ignore[misc]
    """An association that a peer asked for."""

    def __init__(self, entity: AE, server: _Server, connection: socket.socket, address: str) -> None:
        super().__init__(entity, "acceptor")
        self.name = f"AcceptorThread@{self.native_id or secrets.token_hex(4)}"  # the library finds its threads by it
        self._server, self._connection = server, connection
        self.reception = server.reception
        certified = isinstance(connection, ssl.SSLSocket) and bool(connection.getpeercert())
        self.peer = Peer(secrets.token_hex(8), address, certified=certified)
        self.dimse = self.spooling = _Spooling(self, server.folder, server.bounds.object_bytes)
        self.dul.daemon = True  # an open association must not keep a process alive that was told to end
        self.set_socket(_BoundedSocket(self, connection, max(server.bounds.pdu_bytes, NEGOTIATION_BYTES)))

    def run_reactor(self) -> None:
        """Serve the association, and tell its end whatever that is."""
        try:
            super().run_reactor()
        finally:
            self._connection.close()
            self.spooling.discard()
            if self.peer.calling:
                self.reception.closed(self.peer, clean=self.is_released)


class _BoundedSocket(ClosingSocket):
    """Reads whole PDUs, and no larger ones than allowed: a header may claim 4 GiB."""

    def __init__(self, association: Association, connection: socket.socket, limit_bytes: int) -> None:
        super().__init__(association, client_socket=connection)
        self._limit = limit_bytes

    def recv(self, nr_bytes: int) -> bytearray:
        """Read `nr_bytes`, less where the peer closes; raise `OSError` where that is more than allowed."""
        if nr_bytes > self._limit:
            raise OSError(f"expected a PDU of at most {self._limit} bytes, found {nr_bytes}")
        data = bytearray(nr_bytes)
        view, done = memoryview(data), 0
        while done < nr_bytes:
            count = self.socket.recv_into(view[done:])
            if not count:
                return data[:done]
            done += count
        return data


class _Spooling(DIMSEServiceProvider):  # type: ignore[misc]
    """Diverts the data sets of C-STORE requests into files; the library sees them empty."""

    def __init__(self, association: Association, folder: Path, limit_bytes: int) -> None:
        super().__init__(association)
        self._folder, self._limit = folder, limit_bytes
        self._current: Spool | None = None
        self._whole: dict[int, Spool] = {}
        self._lock = threading.Lock()

    def receive_primitive(self, primitive: Any) -> None:
        """Take the fragments of one P-DATA in their order."""
        for context_id, data in list(primitive.presentation_data_value_list):
            header = data[0]
            if not header & COMMAND and isinstance(self.message, C_STORE_RQ):
                self._divert(context_id, data, last=bool(header & LAST))
                data = data[:1]
            primitive.presentation_data_value_list = [[context_id, data]]
            super().receive_primitive(primitive)

    def _divert(self, context_id: int, data: bytes, *, last: bool) -> None:
        command = self.message.command_set
        if self._current is None:
            context = self.assoc._accepted_cx[context_id]  # without one the library aborts the association
            uids = (str(command.get("AffectedSOPClassUID", "")), str(command.get("AffectedSOPInstanceUID", "")))
            self._current = Spool(self._folder, *uids, context.transfer_syntax[0], limit_bytes=self._limit)
        self._current.write(memoryview(data)[1:])
        if last:
            with self._lock:
                replaced = self._whole.pop(command.MessageID, None)
                self._whole[command.MessageID] = self._current
            self._current = None
            if replaced is not None:
                replaced.discard()

    def take(self, message_id: int) -> Spool | None:
        """Return the object of a request, once."""
        with self._lock:
            return self._whole.pop(message_id, None)

    def discard(self) -> None:
        """Remove the objects that no request took."""
        with self._lock:
            left = [*self._whole.values(), *([self._current] if self._current else [])]
            self._whole.clear()
            self._current = None
        for spool in left:
            spool.discard()


def _negotiate(event: evt.Event) -> None:
    """Ask whether the peer may send; offer the known classes that it asked for, in its own order of syntaxes."""
    association = event.assoc
    request = association.requestor.primitive
    association.peer = replace(
        association.peer, calling=request.calling_ae_title.strip(), called=request.called_ae_title.strip()
    )
    if (rejection := association.reception.admit(association.peer)) is not None:
        association.peer = replace(association.peer, calling="")  # nothing of it is over that ever began
        association.acse.send_reject(*astuple(rejection))
        association.kill()
        return
    syntaxes: dict[str, list[str]] = {}
    for context in request.presentation_context_definition_list:
        known = [syntax for syntax in context.transfer_syntax if syntax in ALL_TRANSFER_SYNTAXES]
        if known and _is_offered(context.abstract_syntax):
            syntaxes.setdefault(context.abstract_syntax, []).extend(known)
    association.acceptor.supported_contexts = list(_contexts(syntaxes))


def _is_offered(abstract_syntax: str) -> bool:
    if abstract_syntax in (Verification, StorageCommitmentPushModel):
        return True
    return uid_to_service_class(abstract_syntax) is StorageServiceClass


def _contexts(syntaxes: dict[str, list[str]]) -> Iterable[Any]:
    for abstract_syntax, known in syntaxes.items():
        context = build_context(abstract_syntax, list(dict.fromkeys(known)))
        if abstract_syntax == StorageCommitmentPushModel:  # its reports come to us as the user of the service
            context.scu_role, context.scp_role = True, True
        yield context


def _store(event: evt.Event) -> int:
    """Answer C-STORE with what the reception says about the object."""
    spool = event.assoc.spooling.take(event.request.MessageID)
    if spool is None:
        return CANNOT_UNDERSTAND
    try:
        incoming: Incoming | DintsError = spool.finish()
    except DintsError as fault:
        incoming = fault
    try:
        return int(event.assoc.reception.store(event.assoc.peer, incoming))
    except Exception:
        LOGGER.exception("an object could not be taken", extra={"action": "store_failed"})
        raise
    finally:
        spool.discard()


def _report(event: evt.Event) -> tuple[int, None]:
    """Take a report of storage commitment."""
    event.assoc.reception.committed(*reported(event))
    return 0x0000, None
