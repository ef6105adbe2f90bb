"""What a DICOM listener asks its owner, and what it tells about the other side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dints_deploy.dicom.spool import Incoming
from dints_deploy.errors import DintsError


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

    def check_room(self) -> None:
        """Return where an object would be taken at present; raise the error that its sender is told of otherwise."""

    def store(self, peer: Peer, incoming: Incoming | DintsError) -> int:
        """Take an object, or the reason why it could not be spooled; return the status of C-STORE (PS3.4 B.2.3)."""

    def committed(self, transaction: str, instances: frozenset[str]) -> None:
        """Take a report of storage commitment: the transaction and the instances that are safe (PS3.4 J.3.3)."""

    def closed(self, peer: Peer, *, clean: bool) -> None:
        """Take note that an association is over; clean where the peer released it."""
