"""Health and metrics over HTTP: /healthz (the process works), /readyz (it can take studies), /metrics (Prometheus)."""

from __future__ import annotations

import hmac
import json
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from dints_deploy.config.appliance import Http
from dints_deploy.config.load import read_token
from dints_deploy.config.tls import server_context
from dints_deploy.errors import UsageError
from dints_deploy.service.model import Snapshot

LOGGER: Final = logging.getLogger(__name__)

REQUEST_SECONDS: Final = 10.0
"""For a request to arrive, and for an answer to be taken."""

CONNECTIONS: Final = 32
"""Answered at one time; more wait or are closed."""


class HealthServer:
    """An open HTTP port."""

    def __init__(self, server: _Server, thread: threading.Thread) -> None:
        self._server, self._thread = server, thread

    @property
    def port(self) -> int:
        """Return the port that is listened on."""
        return int(self._server.server_address[1])

    @property
    def alive(self) -> bool:
        """Say whether requests are answered."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()


def serve(http: Http, snapshot: Callable[[], Snapshot]) -> HealthServer:
    """Open the port.

    Args:
        http: address, token and TLS; the configuration asks for both where others can reach it.
        snapshot: how the daemon is at the moment; called for every request, from any thread.

    Raises:
        UsageError: `config-invalid`, `config-rights`.
    """
    token = None if http.token_file is None else read_token(http.token_file)
    tls = None if http.tls is None else server_context(http.tls)
    try:
        server = _Server((http.address, http.port), snapshot, token, tls)
    except OSError as error:
        found = error.strerror or type(error).__name__
        message = f"expected to open port {http.port} at {http.address}, found: {found}: choose another"
        raise UsageError("config-invalid", message) from error
    thread = threading.Thread(target=server.serve_forever, args=(0.2,), name="health", daemon=True)
    thread.start()
    return HealthServer(server, thread)


def metrics(snapshot: Snapshot) -> bytes:
    """Return a snapshot in Prometheus' text form."""
    registry = CollectorRegistry()
    registry.register(_Collector(snapshot))
    return generate_latest(registry)


class _Collector:
    """Names the metrics of a snapshot."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        now = self._snapshot
        yield _gauge("ready", "1 where the daemon can take studies", float(not now.problems))
        yield _gauge("oldest_queued_seconds", "age of the oldest job that waits for a worker", now.oldest_queued_s)
        yield _gauge("free_bytes", "room on the disk of the data folder", float(now.free_bytes))
        yield _family(GaugeMetricFamily, "studies", "studies that are coming in", ("state",), now.studies)
        yield _family(GaugeMetricFamily, "jobs", "jobs", ("state",), now.jobs)
        yield _family(GaugeMetricFamily, "deliveries", "deliveries", ("destination", "state"), now.deliveries)
        yield _family(CounterMetricFamily, "intake_objects", "objects that came in", ("outcome",), now.intake)
        yield _family(CounterMetricFamily, "intake_bytes", "bytes that came in", (), {(): now.intake_bytes})
        yield _family(CounterMetricFamily, "refusals", "studies and objects that were refused", ("code",), now.refusals)
        yield _family(CounterMetricFamily, "failures", "attempts that failed", ("code",), now.failures)
        stages = SummaryMetricFamily("dints_deploy_stage_seconds", "time spent in each stage", labels=("stage",))
        for stage, (count, seconds) in now.stages.items():
            stages.add_metric((stage,), count, seconds)
        yield stages


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"dints_deploy_{name}", about, value=value)


def _family(kind: Any, name: str, about: str, labels: tuple[str, ...], values: Any) -> Metric:
    family: Metric = kind(f"dints_deploy_{name}", about, labels=labels)
    for key, value in values.items():
        family.add_metric(key if isinstance(key, tuple) else (key,), value)  # type: ignore[attr-defined]
    return family


class _Server(ThreadingHTTPServer):
    """Answers within bounds."""

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], snapshot: Callable[[], Snapshot], token: str | None, tls: ssl.SSLContext | None
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.snapshot, self.token, self.tls = snapshot, token, tls
        self._slots = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, where there is one to spare."""
        if not self._slots.acquire(timeout=1.0):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Shake hands, answer, and give the thread back."""
        try:
            request.settimeout(REQUEST_SECONDS)
            if self.tls is not None:
                request = self.tls.wrap_socket(request, server_side=True)
            super().process_request_thread(request, client_address)
        except OSError:  # a handshake that failed, a peer that went away
            self.shutdown_request(request)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note an answer that failed."""
        LOGGER.warning("a request failed", exc_info=True, extra={"action": "request_failed"})


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: _Server
    server_version = "dints-deploy"
    sys_version = ""
    timeout = REQUEST_SECONDS

    def do_GET(self) -> None:
        """Answer a request."""
        if not self._is_allowed():
            self._answer(401, b"a token is needed\n", "text/plain", {"WWW-Authenticate": "Bearer"})
            return
        page = PAGES.get(self.path.partition("?")[0])
        if page is None:
            self._answer(404, b"there are /healthz, /readyz and /metrics\n", "text/plain", {})
            return
        status, body, kind = page(self.server.snapshot())
        self._answer(status, body, kind, {})

    def _is_allowed(self) -> bool:
        if self.server.token is None:
            return True
        said = self.headers.get("Authorization", "")
        return hmac.compare_digest(said.encode(), f"Bearer {self.server.token}".encode())

    def _answer(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the library's name
        """Write nothing: monitoring asks all the time."""


def _healthz(snapshot: Snapshot) -> tuple[int, bytes, str]:
    return 200, b"ok\n", "text/plain"


def _readyz(snapshot: Snapshot) -> tuple[int, bytes, str]:
    body = json.dumps({"ready": not snapshot.problems, "problems": list(snapshot.problems)}) + "\n"
    return 503 if snapshot.problems else 200, body.encode(), "application/json"


def _metrics(snapshot: Snapshot) -> tuple[int, bytes, str]:
    return 200, metrics(snapshot), CONTENT_TYPE_LATEST


PAGES: Final[dict[str, Callable[[Snapshot], tuple[int, bytes, str]]]] = {
    "/healthz": _healthz,
    "/readyz": _readyz,
    "/metrics": _metrics,
}
