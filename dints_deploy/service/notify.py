"""Tell systemd how the daemon is (sd_notify(3)); without systemd it does nothing."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

MICRO: Final = 1e-6

EXTEND_SECONDS: Final = 60.0
"""Asked for at a time while the daemon starts: more than a slow disk holds it up between two requests."""


def notify(*states: str) -> bool:
    """Send states like "READY=1", "STOPPING=1", "WATCHDOG=1", "STATUS=text"; say whether somebody was told.

    Raises:
        OSError: the socket that the environment names cannot be reached.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):  # Linux's abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as one:
        one.sendto("\n".join(states).encode(), address)
    return True


def watchdog_seconds() -> float | None:
    """Return how often systemd must hear "WATCHDOG=1", None where it does not wait for it; tell it twice as often."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) * MICRO if microseconds.isdigit() and int(microseconds) else None


@contextmanager
def starting(*, every_s: float = EXTEND_SECONDS / 4) -> Iterator[None]:
    """Ask for more time to start, again and again until the end of the block: a large database is read page by page."""
    over = threading.Event()

    def ask() -> None:
        while notify(f"EXTEND_TIMEOUT_USEC={round(EXTEND_SECONDS / MICRO)}") and not over.wait(every_s):
            pass

    thread = threading.Thread(target=ask, name="starting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
