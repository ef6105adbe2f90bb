"""A DICOM listener (PS3.7 C-STORE, C-ECHO SCP) on pynetdicom that spools objects to files, within bounds.

What this adds to the library: objects go to disk while they arrive and never lie in memory; a PDU, an object, the
number of connections and the time of silence are bounded; TLS shakes hands outside the accepting thread; who may send
is asked before anything is negotiated; and the end of every association is told, with whether it was clean. C-STORE is
answered in the thread that reads the connection: the library would pass each request to another one and back, each of
which looks a thousand times a second whether there is something to do.
"""

from __future__ import annotations

import logging
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, Final

from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, evt
from pynetdicom.association import Association
from pynetdicom.presentation import build_context
from pynetdicom.service_class import StorageServiceClass
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification, uid_to_service_class
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from dints_deploy.dicom.network import reported, settle_library
from dints_deploy.dicom.pdata import POLL_SECONDS, BoundedSocket, Reader
from dints_deploy.dicom.reception import Bounds, Peer, Reception
from dints_deploy.dicom.spool import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dints_deploy.dicom.storing import Storing

LOGGER: Final = logging.getLogger(__name__)

NEGOTIATION_SECONDS: Final = 15.0
"""From the connection to the association (the ARTIM timer of PS3.8 9.1.5)."""

NEGOTIATION_BYTES: Final = 1 << 20
"""Largest PDU of a negotiation: 128 presentation contexts with many transfer syntaxes each."""

SPARE_CONNECTIONS: Final = 8
"""Connections over the limit that are still told so; more are closed without a word."""


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
    thread = threading.Thread(target=server.serve_forever, args=(0.5,), name=name, daemon=True)
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
            (evt.EVT_CONN_CLOSE, _wake),
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
        self.dimse = self.storing = Storing(self, server.reception, server.folder, server.bounds.object_bytes)
        self.dul = Reader(self, self.storing.take)
        self.acse_timeout, self.network_timeout = entity.acse_timeout, entity.network_timeout  # its timers are new
        self._reactor_checkpoint = _Rest()
        self.set_socket(BoundedSocket(self, connection, max(server.bounds.pdu_bytes, NEGOTIATION_BYTES)))

    def run_reactor(self) -> None:
        """Serve the association, and tell its end whatever that is."""
        try:
            super().run_reactor()
        finally:
            self._connection.close()
            self.storing.discard()
            if self.peer.calling:
                self.reception.closed(self.peer, clean=self.is_released)


class _Rest(threading.Event):
    """Where the library's association pauses in every turn: long enough not to turn a thousand times a second."""

    def __init__(self) -> None:
        super().__init__()
        self.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, and a little longer."""
        going = super().wait(timeout)
        time.sleep(POLL_SECONDS)
        return going


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


def _wake(event: evt.Event) -> None:
    """Let an association end at once whose connection closed before it asked for anything: a port scan, a look whether
    the port is open. The library would wait for its request, and hold a place that others need."""
    association = event.assoc
    if association.requestor.primitive is None and association.dul.to_user_queue.empty():
        association.dul.to_user_queue.put(None)


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


def _report(event: evt.Event) -> tuple[int, None]:
    """Take a report of storage commitment."""
    event.assoc.reception.committed(*reported(event))
    return 0x0000, None
