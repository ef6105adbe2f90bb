"""The fields that parts of `appliance.toml` share: absolute paths, AE titles, networks, certificates."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from dints_deploy.catalog.entry import NAME_PATTERN
from dints_deploy.catalog.strict import Strict


def _absolute(path: Path) -> Path:
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError("expected an absolute path without ..")
    return path


def _ae_title(text: str) -> str:
    """Check an AE title: 1 to 16 printable ASCII characters, no backslash, no space around (PS3.5 6.2)."""
    if not 1 <= len(text) <= 16 or not text.isascii() or not text.isprintable() or "\\" in text or text != text.strip():
        raise ValueError("expected an AE title: 1 to 16 printable ASCII characters, no backslash, no space around")
    return text


def _network(text: str) -> str:
    ipaddress.ip_network(text)
    return text


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
AETitle = Annotated[str, AfterValidator(_ae_title)]
Network = Annotated[str, AfterValidator(_network)]
"""An address or a network in CIDR form: 10.1.2.3, 10.1.0.0/16, fd00::/8."""
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Port = Annotated[int, Field(ge=1, le=65535)]


class TLS(Strict):
    """Certificates in PEM form.

    Attributes:
        certificate, key: of this side.
        authority: who must have signed the other side's certificate; a listener without it asks for none.
    """

    certificate: AbsolutePath | None = None
    key: AbsolutePath | None = None
    authority: AbsolutePath | None = None

    @model_validator(mode="after")
    def _pair(self) -> TLS:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("expected certificate and key together, or neither")
        return self


def is_loopback(host: str) -> bool:
    """Say whether a host is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def distinct(what: str, names: Iterable[str]) -> set[str]:
    """Return the set of names; raise `ValueError` where one is there twice."""
    listed = list(names)
    if len(set(listed)) != len(listed):
        raise ValueError(f"{what}: expected distinct names")
    return set(listed)


def known(what: str, names: Iterable[str], allowed: set[str]) -> None:
    """Raise `ValueError` where a name is not allowed."""
    if unknown := sorted(set(names) - allowed):
        raise ValueError(
            f"{what}: expected names of {', '.join(sorted(allowed)) or 'none'}, found {', '.join(unknown)}"
        )
