"""What the daemon of a configuration needs of this machine and its peers: a table of checks like the runtime's.

Nothing is changed and no study is sent; destinations and senders are asked whether they answer (C-ECHO).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from dints_deploy.catalog.catalog import load_entry
from dints_deploy.config.appliance import Config
from dints_deploy.config.delivery import Destination, StowDestination
from dints_deploy.config.intake import Query
from dints_deploy.config.load import load_config
from dints_deploy.dicom.network import echo
from dints_deploy.errors import DeliveryError, DintsError
from dints_deploy.runtime.doctor import Check, Finding
from dints_deploy.service.daemon import LOCK
from dints_deploy.service.deliver import probe
from dints_deploy.service.query import remote_of_query
from dints_deploy.service.route import check_routes


def daemon_checks(path: Path) -> tuple[Check, ...]:
    """Return the checks of a configuration file; only that of the file itself where it is not sound."""
    try:
        config = load_config(path)
        check_routes(config)
    except DintsError as error:
        problem = Finding(f"configuration {path.name}", "problem", str(error), "mend the file as it says")
        return (lambda: iter((problem,)),)
    sound = Finding(f"configuration {path.name}", "ok", f"{len(config.routes)} routes, its rights are right")
    return (lambda: iter((sound,)), *(partial(check, config) for check in CHECKS))


def routes(config: Config) -> Iterator[Finding]:
    """Say whether each route's entry has weights."""
    for route in config.routes:
        try:
            members = len(load_entry(route.entry).spec.members)
        except DintsError as error:
            yield Finding(f"route {route.name}", "problem", str(error), f"dints-deploy zoo verify {route.entry}")
            continue
        fix = "" if members else "name an entry with weights: dints-deploy zoo list"
        yield Finding(f"route {route.name}", "ok" if members else "problem", f"{route.entry}, {members} networks", fix)


def folders(config: Config) -> Iterator[Finding]:
    """Look at the folders that the daemon reads and writes."""
    yield _folder("data folder", config.data_dir, os.W_OK, private=True)
    if config.audit_anchor is not None:
        yield _folder("audit anchor's folder", config.audit_anchor.parent, os.W_OK)
    for folder in config.folders:
        rights = os.R_OK if folder.after == "leave" else os.R_OK | os.W_OK
        yield _folder(f"watched folder {folder.path.name}", folder.path, rights)
        if folder.move_to is not None:
            yield _folder(f"folder {folder.move_to.name}", folder.move_to, os.W_OK)


def room(config: Config) -> Iterator[Finding]:
    """Compare the room on the data folder's disk with what intake keeps free."""
    free = shutil.disk_usage(_present(config.data_dir)).free
    enough = free > config.disk.free_bytes
    fix = "" if enough else "free some space, or lower retention: intake answers 'out of resources' until then"
    found = f"{free / 2**30:.1f} GiB free, intake stops below {config.disk.free_bytes / 2**30:.1f} GiB"
    yield Finding("room for studies", "ok" if enough else "problem", found, fix)


def ports(config: Config) -> Iterator[Finding]:
    """Say whether each port is free, or held by this daemon."""
    running = _is_running(config.data_dir)
    wanted = [(listener.address, listener.port) for listener in config.listeners]
    wanted += [] if config.http is None else [(config.http.address, config.http.port)]
    for address, port in wanted:
        fault = _port_fault(address, port)
        if not fault:
            yield Finding(f"port {port}", "ok", f"free at {address}")
        elif running:
            yield Finding(f"port {port}", "ok", f"at {address}, the daemon runs")
        else:
            fix = f"ss -ltnp 'sport = :{port}' shows who holds it; name another port, or stop that program"
            yield Finding(f"port {port}", "problem", f"at {address}: {fault}", fix)


def peers(config: Config) -> Iterator[Finding]:
    """Ask every destination, and every sender that is asked for counts, whether it answers."""
    calls: list[tuple[str, Callable[[], None]]] = []
    calls += [(f"destination {one.name}", partial(_reach, one)) for one in config.destinations]
    calls += [(f"sender {one.sender}", partial(_ask, one)) for one in config.completeness.queries]
    for subject, call in calls:
        try:
            call()
        except DintsError as error:
            yield Finding(subject, "problem", str(error), "check host, port, AE titles and certificates on both sides")
        else:
            yield Finding(subject, "ok", "answers")


def _reach(destination: Destination) -> None:
    """Ask a destination; of a DICOMweb server only the connection, as there is no request without data."""
    if not isinstance(destination, StowDestination):
        probe(destination)
        return
    parts = urlsplit(destination.url)
    place = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    try:
        with socket.create_connection(place, timeout=destination.timeout_seconds):
            return
    except OSError as error:
        found = error.strerror or type(error).__name__
        message = f"expected a server at {destination.url}, found: {found}"
        raise DeliveryError("delivery-unreachable", message, retryable=True) from error


def _ask(query: Query) -> None:
    echo(remote_of_query(query))


def _folder(subject: str, path: Path, rights: int, *, private: bool = False) -> Finding:
    """Say whether this user may do with a folder what the daemon does."""
    user = os.geteuid()
    if not path.exists():
        able = os.access(_present(path), os.W_OK)
        fix = "" if able else f"install -d -m 700 -o {user} {path}"
        return Finding(subject, "ok" if able else "problem", f"{path} is made when it is needed", fix)
    mode = stat.S_IMODE(path.stat().st_mode)
    found = f"{path}, mode {mode:o}"
    if not path.is_dir() or not os.access(path, rights | os.X_OK):
        return Finding(subject, "problem", f"{found}, not usable by user {user}", f"chown {user} {path}")
    if private and mode & 0o077:
        return Finding(subject, "problem", f"{found}: others can look into it", f"chmod 700 {path}")
    return Finding(subject, "ok", found)


def _present(path: Path) -> Path:
    return next(one for one in (path, *path.parents) if one.exists())


def _port_fault(address: str, port: int) -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((address, port))
        except OSError as error:
            return error.strerror or type(error).__name__
    return ""


def _is_running(data_dir: Path) -> bool:
    """Say whether a daemon holds the lock of the data folder."""
    try:
        descriptor = os.open(data_dir / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


CHECKS: Final = (routes, folders, room, ports, peers)
"""The daemon's checks, in the order of the report."""
