"""Where studies come from: ports with AE titles, watched folders, and when a study counts as complete."""

from __future__ import annotations

import ipaddress
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from dints_deploy.catalog.strict import Strict
from dints_deploy.config.fields import TLS, AbsolutePath, AETitle, Name, Network, Port, distinct


class Title(Strict):
    """An AE title under which studies are received.

    Attributes:
        callers: AE titles that may send; "*" for every one.
        addresses: where they may send from; empty for everywhere.
        routes: names of the routes that its studies may take; empty for all.
    """

    ae_title: AETitle
    callers: tuple[AETitle, ...] = Field(min_length=1)
    addresses: tuple[Network, ...] = ()
    routes: tuple[Name, ...] = ()


class Listener(Strict):
    """A port on which DICOM objects are received (C-STORE, C-ECHO).

    Attributes:
        associations: open at one time.
        pdu_bytes: largest PDU that is accepted.
        object_bytes: largest object that is accepted.
        idle_seconds: silence after which an association is aborted.
    """

    address: str = "0.0.0.0"
    port: Port = 11112
    titles: tuple[Title, ...] = Field(min_length=1)
    tls: TLS | None = None
    associations: PositiveInt = 25
    pdu_bytes: int = Field(default=256 << 10, ge=4096, le=16 << 20)
    object_bytes: PositiveInt = 4 << 30
    idle_seconds: PositiveFloat = 60.0

    @model_validator(mode="after")
    def _sound(self) -> Listener:
        ipaddress.ip_address(self.address)
        distinct("titles", (title.ae_title for title in self.titles))
        if self.tls is not None and self.tls.certificate is None:
            raise ValueError("tls: expected a certificate and a key")
        return self


class Folder(Strict):
    """A folder that is watched for NIfTI and DICOM files.

    Attributes:
        scan_seconds: between two looks at everything: network shares announce nothing.
        settle_seconds: how long size and time of a file must stay as they are before it is taken.
        after: what happens to a file that is safely stored; `move` needs `move_to`, on the same file system.
    """

    path: AbsolutePath
    routes: tuple[Name, ...] = ()
    scan_seconds: PositiveFloat = 30.0
    settle_seconds: PositiveFloat = 10.0
    after: Literal["leave", "move", "delete"] = "leave"
    move_to: AbsolutePath | None = None

    @model_validator(mode="after")
    def _target(self) -> Folder:
        if (self.after == "move") != (self.move_to is not None):
            raise ValueError("move_to: expected with after = 'move', and only then")
        if self.move_to is not None and self.move_to.is_relative_to(self.path):
            raise ValueError("move_to: expected outside the watched folder")
        return self


class Query(Strict):
    """Where a sender can be asked how many instances a series has (C-FIND, PS3.4 C)."""

    sender: AETitle
    host: str = Field(min_length=1)
    port: Port
    ae_title: AETitle
    calling_ae_title: AETitle
    tls: TLS | None = None
    timeout_seconds: PositiveFloat = 10.0


class Completeness(Strict):
    """When a study counts as complete.

    Attributes:
        settled_seconds: silence that a study must keep whose instances are counted, by the sender or in headers.
        released_seconds: the same where nobody counts, but associations were released and slices show no gap: a tail
            that is still to come does not show. Never more than `quiet_seconds`.
        quiet_seconds: silence after which a study without evidence is taken as it is.
        queries: senders that can be asked.
    """

    settled_seconds: NonNegativeFloat = 2.0
    released_seconds: NonNegativeFloat = 10.0
    quiet_seconds: PositiveFloat = 60.0
    queries: tuple[Query, ...] = ()

    @model_validator(mode="after")
    def _sound(self) -> Completeness:
        if self.settled_seconds > self.quiet_seconds:
            raise ValueError("expected settled_seconds <= quiet_seconds")
        distinct("queries", (query.sender for query in self.queries))
        return self
