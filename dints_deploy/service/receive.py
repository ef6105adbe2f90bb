"""Receive DICOM objects: who may send, under which of our AE titles, and what each answer means.

C-STORE is answered with success only after the intake has made file and row durable.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from dints_deploy.config.intake import Listener, Title
from dints_deploy.config.tls import server_context
from dints_deploy.dicom.instance import identify
from dints_deploy.dicom.listen import Listening, listen
from dints_deploy.dicom.network import Commitments
from dints_deploy.dicom.reception import Bounds, Peer, Rejection
from dints_deploy.dicom.spool import Incoming
from dints_deploy.errors import DintsError, IntakeRefused, ScanRefused, UsageError
from dints_deploy.service.model import Intake, Received

LOGGER: Final = logging.getLogger(__name__)

SUCCESS: Final = 0x0000
OUT_OF_RESOURCES: Final = 0xA700
CANNOT_UNDERSTAND: Final = 0xC000
STATUS: Final[dict[str, int]] = {
    "intake-disk": OUT_OF_RESOURCES,
    "intake-too-large": OUT_OF_RESOURCES,
    "intake-mismatch": 0xA900,
}
"""Reason code -> status of C-STORE (PS3.4 B.2.3), where the fault is not simply the object's or ours."""

CALLING_UNKNOWN: Final = Rejection(1, 1, 3)
CALLED_UNKNOWN: Final = Rejection(1, 1, 7)
"""Permanent, by the service user (PS3.8 9.3.4)."""

STOP_SECONDS: Final = 20.0
"""For open associations to finish when the daemon stops."""


class Receiver:
    """The open ports of a configuration.

    Attributes:
        commitments: where reports of storage commitment arrive.
    """

    def __init__(self, intake: Intake, incoming: Path, commitments: Commitments) -> None:
        self.commitments = commitments
        self._intake, self._incoming = intake, incoming
        self._open: list[Listening] = []
        self._refused: Counter[str] = Counter()
        self._lock, self._failed = threading.Lock(), threading.Event()

    def start(self, listeners: Sequence[Listener]) -> None:
        """Open every port.

        Raises:
            UsageError: `config-invalid` where one cannot be opened; none is open then.
        """
        with ExitStack() as opened:
            for listener in listeners:
                listening = self._listen(listener)
                opened.callback(listening.stop, seconds=0.0)
                self._open.append(listening)
            opened.pop_all()

    def _listen(self, listener: Listener) -> Listening:
        bounds = Bounds(listener.associations, listener.pdu_bytes, listener.object_bytes, listener.idle_seconds)
        tls = None if listener.tls is None else server_context(listener.tls)
        port = Port(listener, self)
        try:
            return listen((listener.address, listener.port), port, self._incoming, bounds, tls=tls)
        except OSError as error:
            found = error.strerror or type(error).__name__
            message = f"expected to open port {listener.port} at {listener.address}, found: {found}: choose another"
            raise UsageError("config-invalid", message) from error

    @property
    def ports(self) -> tuple[int, ...]:
        """Return the open ports, in the order of the configuration."""
        return tuple(listening.port for listening in self._open)

    @property
    def alive(self) -> bool:
        """Say whether every port still accepts connections, and what happens on them is kept."""
        return not self._failed.is_set() and all(listening.alive for listening in self._open)

    @property
    def associations(self) -> int:
        """Return how many connections are open."""
        return sum(listening.associations for listening in self._open)

    @property
    def refused(self) -> dict[str, int]:
        """Return reason code -> objects that were not taken."""
        with self._lock:
            return dict(self._refused)

    def stop(self, *, seconds: float = STOP_SECONDS) -> None:
        """Accept no more connections, let the open ones finish for some time, then abort them."""
        for listening in self._open:
            listening.stop(seconds=seconds)
        self._open.clear()

    def check_room(self) -> None:
        """Raise `IntakeRefused` where no object is taken at present."""
        self._intake.check_room()

    def store(self, peer: Peer, incoming: Incoming | DintsError) -> int:
        """Make an object durable and return the status that says so, or why not."""
        try:
            self._take(peer, incoming)
        except DintsError as refusal:
            with self._lock:
                self._refused[refusal.code] += 1
            fields = {"action": "object_refused", "code": refusal.code, "association": peer.association}
            LOGGER.warning("refused an object", extra=fields)
            ours = not isinstance(refusal, ScanRefused | IntakeRefused)
            return STATUS.get(refusal.code, OUT_OF_RESOURCES if ours else CANNOT_UNDERSTAND)
        return SUCCESS

    def _take(self, peer: Peer, incoming: Incoming | DintsError) -> None:
        if isinstance(incoming, DintsError):
            raise incoming
        instance = identify(incoming.path)
        said = (incoming.SOPClassUID, incoming.SOPInstanceUID)
        if (instance.SOPClassUID, instance.SOPInstanceUID) != said:
            message = "expected the class and instance that the request names, found others in the data set"
            raise IntakeRefused("intake-mismatch", f"{message}: repair the sender")
        received = Received(
            source="dicom",
            door=peer.called,
            path=incoming.path,
            sha256=incoming.sha256,
            size_bytes=incoming.size_bytes,
            instance=instance,
            calling=peer.calling,
            address=peer.address,
            association=peer.association,
        )
        self._intake.accept(received)

    def closed(self, peer: Peer, *, clean: bool) -> None:
        """Tell the intake that an association is over."""
        LOGGER.info("association over", extra={"action": "closed", "association": peer.association, "clean": clean})
        try:
            self._intake.association_closed(peer.association, clean=clean)
        except DintsError:  # unknown to the database it would stay open for ever: better to start again
            LOGGER.exception("the end of an association could not be kept", extra={"action": "close_failed"})
            self._failed.set()


class Port:
    """The rules of one port: its AE titles, who may call them and from where."""

    def __init__(self, listener: Listener, receiver: Receiver) -> None:
        self._titles = {title.ae_title: title for title in listener.titles}
        self._receiver = receiver

    def welcome(self, address: str) -> bool:
        """Say whether an address may call any of the titles."""
        return any(may_come_from(title, address) for title in self._titles.values())

    def admit(self, peer: Peer) -> Rejection | None:
        """Say why an association is not let in."""
        title = self._titles.get(peer.called)
        if title is None:
            return self._refuse(peer, CALLED_UNKNOWN, "called", "no title of this port was called")
        if not may_come_from(title, peer.address):
            return self._refuse(peer, CALLING_UNKNOWN, "caller", "the title is not called from this address")
        if not may_call(title, peer.calling):
            return self._refuse(peer, CALLING_UNKNOWN, "caller", "its AE title is not among the callers")
        return None

    def _refuse(self, peer: Peer, rejection: Rejection, what: str, why: str) -> Rejection:
        """Log a caller that is not let in, by its address: it may send any text as its AE title."""
        fields = {"action": f"unknown_{what}", "address": peer.address, "why": why}
        LOGGER.warning("refused an association", extra=fields)
        return rejection

    def check_room(self) -> None:
        """Refuse an object before it is spooled where the disk has no room for it."""
        self._receiver.check_room()

    def store(self, peer: Peer, incoming: Incoming | DintsError) -> int:
        """Take an object."""
        return self._receiver.store(peer, incoming)

    def committed(self, transaction: str, instances: frozenset[str]) -> None:
        """Pass a report of storage commitment on."""
        self._receiver.commitments.report(transaction, instances)

    def closed(self, peer: Peer, *, clean: bool) -> None:
        """Take note of the end of an association."""
        self._receiver.closed(peer, clean=clean)


def may_call(title: Title, calling: str) -> bool:
    """Say whether a title may be called by a calling AE title."""
    return "*" in title.callers or calling in title.callers


def may_come_from(title: Title, address: str) -> bool:
    """Say whether a title may be called from an address; IPv4 in IPv6 counts as IPv4."""
    if not title.addresses:
        return True
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return any(found in ipaddress.ip_network(network) for network in title.addresses)
