"""Read `appliance.toml`, and refuse it where others could change it, or read a key or token that it names."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from dints_deploy.catalog.strict import read_toml
from dints_deploy.config.appliance import Config
from dints_deploy.config.delivery import FolderDestination, StowDestination
from dints_deploy.config.fields import TLS
from dints_deploy.errors import UsageError


def load_config(path: Path) -> Config:
    """Read and check `appliance.toml`, and the rights of every file that it names.

    Raises:
        UsageError: `config-invalid` with the dotted path of each fault; `config-rights` where others could change the
            file, or read a key or token.
    """
    _check_rights(path, secret=False)
    config = read_toml(path, Config, UsageError, "config-invalid")
    for secret in _secrets(config):
        _check_rights(secret, secret=True)
    return config


def read_token(path: Path) -> str:
    """Return the token that a file holds; raise `UsageError` where others could read it, or it is empty."""
    _check_rights(path, secret=True)
    token = path.read_text(encoding="utf-8").strip()
    if not token or not token.isascii() or not token.isprintable():
        raise UsageError("config-invalid", f"expected a token of printable ASCII in {path}, found none: write one")
    return token


def _secrets(config: Config) -> Iterable[Path]:
    """Yield the keys and token files that a configuration names."""
    sides: list[TLS | None] = [listener.tls for listener in config.listeners]
    sides += [query.tls for query in config.completeness.queries]
    for one in config.destinations:
        if not isinstance(one, FolderDestination):
            sides.append(one.tls)
        if isinstance(one, StowDestination) and one.token_file is not None:
            yield one.token_file
    if config.http is not None:
        sides.append(config.http.tls)
        if config.http.token_file is not None:
            yield config.http.token_file
    yield from (side.key for side in sides if side is not None and side.key is not None)


def _check_rights(path: Path, *, secret: bool) -> None:
    """Refuse a file that others may change, or, where it is a secret, read."""
    try:
        status = os.stat(path)  # noqa: PTH116  the file that is used, links followed
    except OSError as error:
        raise UsageError("config-invalid", f"expected a readable file at {path}, found: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UsageError("config-invalid", f"expected a regular file at {path}, found something else: name a file")
    forbidden = stat.S_IWOTH | (stat.S_IROTH | stat.S_IWGRP if secret else 0)
    if status.st_mode & forbidden:
        what, mode = ("a secret of its owner", "600") if secret else ("a file that only its owner may change", "644")
        found = f"found mode {stat.S_IMODE(status.st_mode):o}"
        raise UsageError("config-rights", f"expected {what} at {path}, {found}: chmod {mode} {path}")
