"""A real browser for tests: headless chromium driven over WebDriver's plain HTTP, and a server that counts visits."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest

from tests.peers import free_port

FLAGS: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1100,1400",
)
START_SECONDS: Final = 60
PNG_1X1: Final = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360000002000001e221bc330000000049454e44ae426082"
)


@dataclass(frozen=True)
class Browser:
    """An open browser."""

    session: str

    def open(self, page: Path) -> None:
        """Load a file and wait for it."""
        call(f"{self.session}/url", {"url": page.resolve().as_uri()})

    def ask(self, script: str) -> Any:
        """Run the body of a JavaScript function in the page and return its value."""
        return call(f"{self.session}/execute/sync", {"script": script, "args": []})

    def requests(self) -> list[str]:
        """Return the addresses that the browser has asked for since the last call."""
        entries = call(f"{self.session}/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Start a browser with a fresh profile in `folder`; skip the test where there is none."""
    driver, binary = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or binary is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    port = free_port()
    with (folder / "driver.log").open("wb") as log:
        process = subprocess.Popen([driver, f"--port={port}"], stdout=log, stderr=log)
        try:
            yield from _session(f"http://127.0.0.1:{port}", binary, folder / "profile")
        finally:
            process.terminate()
            process.wait(timeout=START_SECONDS)


def _session(server: str, binary: str, profile: Path) -> Iterator[Browser]:
    _wait_for(server)
    options = {"binary": binary, "args": [*FLAGS, f"--user-data-dir={profile}"]}
    wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL"}}
    created = call(f"{server}/session", {"capabilities": {"alwaysMatch": wanted}})
    session = f"{server}/session/{created['sessionId']}"
    try:
        yield Browser(session)
    finally:
        call(session, None, method="DELETE")


def _wait_for(server: str) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            call(f"{server}/status", None, method="GET")
            return
        except urllib.error.URLError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def call(address: str, body: Any, *, method: str = "POST") -> Any:
    """Make one WebDriver call and return its value; an error raises with the driver's words."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data=data, method=method, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        with error:
            raise RuntimeError(f"{address}: {json.load(error)['value']['message']}") from error


class _Counter(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.visits.append(self.path)  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(len(PNG_1X1)))
        self.end_headers()
        self.wfile.write(PNG_1X1)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class names it
        """Say nothing on standard error."""


@contextmanager
def counting_server() -> Iterator[tuple[str, list[str]]]:
    """Yield the address of a server on this machine and the growing list of paths that it was asked for."""
    visits: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), _Counter) as server:
        server.visits = visits  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", visits
        finally:
            server.shutdown()
            thread.join()
