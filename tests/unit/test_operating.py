"""Health, metrics, logs and systemd's socket: what they say, to whom, and what they never say."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dints_deploy.config.appliance import Http, Log
from dints_deploy.config.fields import TLS
from dints_deploy.config.tls import client_context
from dints_deploy.errors import ScanRefused
from dints_deploy.service.health import serve
from dints_deploy.service.log import JsonLines, configure
from dints_deploy.service.model import Snapshot
from dints_deploy.service.notify import notify, starting, watchdog_seconds
from tests.peers import certificates, free_port

NOW = Snapshot(
    jobs={"queued": 3, "running": 1},
    deliveries={("pacs", "pending"): 2},
    oldest_queued_s=12.5,
    intake={"new": 40, "refused": 2},
    intake_bytes=1024,
    refusals={"scan-modality": 1},
    stages={"segment": (4, 20.0)},
    free_bytes=1 << 30,
)


@contextmanager
def serving(snapshot: Snapshot = NOW, **http: object) -> Iterator[str]:
    server = serve(Http.model_validate({"port": free_port()} | http), lambda: snapshot)
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        server.stop()


def get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_health_readiness_and_metrics_say_how_the_daemon_is() -> None:
    with serving() as place:
        assert get(f"http://{place}/healthz") == (200, "ok\n")
        assert get(f"http://{place}/readyz") == (200, '{"ready": true, "problems": []}\n')
        assert get(f"http://{place}/etc/passwd")[0] == 404
        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(get(f"http://{place}/metrics")[1])
            for sample in family.samples
        }
    assert samples["dints_deploy_jobs", (("state", "queued"),)] == 3
    assert samples["dints_deploy_deliveries", (("destination", "pacs"), ("state", "pending"))] == 2
    assert samples["dints_deploy_oldest_queued_seconds", ()] == 12.5
    assert samples["dints_deploy_intake_bytes_total", ()] == 1024
    assert samples["dints_deploy_refusals_total", (("code", "scan-modality"),)] == 1
    assert samples["dints_deploy_stage_seconds_sum", (("stage", "segment"),)] == 20.0
    assert samples["dints_deploy_stage_seconds_count", (("stage", "segment"),)] == 4


def test_a_daemon_with_problems_is_alive_and_not_ready() -> None:
    with serving(replace(NOW, problems=("disk full",))) as place:
        assert get(f"http://{place}/healthz")[0] == 200
        code, body = get(f"http://{place}/readyz")
        assert (code, json.loads(body)["problems"]) == (503, ["disk full"])


def test_with_a_token_nobody_else_is_answered(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o600)
    with serving(token_file=str(token)) as place:
        for path in ("healthz", "readyz", "metrics"):
            assert get(f"http://{place}/{path}")[0] == 401
            assert get(f"http://{place}/{path}", Authorization="Bearer wrong")[0] == 401
            assert get(f"http://{place}/{path}", Authorization="Bearer secret")[0] == 200


def test_metrics_over_tls(tmp_path: Path) -> None:
    made = certificates(tmp_path)
    tls = {"certificate": str(made.server[0]), "key": str(made.server[1])}
    with serving(tls=tls) as place:
        context = client_context(TLS(authority=made.authority))
        with urllib.request.urlopen(f"https://{place}/healthz", timeout=5, context=context) as answer:
            assert answer.status == 200
        with socket.create_connection(tuple(place.split(":")), timeout=5) as silent:  # type: ignore[arg-type]
            with urllib.request.urlopen(f"https://{place}/healthz", timeout=5, context=context) as answer:
                assert answer.status == 200
            silent.close()


def test_a_log_line_is_json_and_an_exception_is_its_kind_and_place() -> None:
    try:
        raise ScanRefused("scan-modality", "expected MR, found JANE DOE")
    except ScanRefused:
        record = logging.LogRecord(
            "dints_deploy.service.x", logging.ERROR, __file__, 1, "it failed", (), sys.exc_info()
        )
    record.__dict__.update(action="fail", job="j1", seconds=1.5)
    line = JsonLines().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["message"], found["action"], found["job"], found["seconds"]) == ("it failed", "fail", "j1", 1.5)
    assert found["exception"]["kind"] == "ScanRefused"
    assert found["exception"]["code"] == "scan-modality"
    assert "JANE" not in line


def test_only_this_package_is_logged(tmp_path: Path) -> None:
    ours = logging.getLogger("dints_deploy")
    before = (ours.level, ours.propagate)
    try:
        configure(Log(level="info", file=tmp_path / "log"))
        logging.getLogger("pydicom").warning("Invalid value for VR PN: 'DOE^JANE'")
        logging.getLogger("dints_deploy.service.daemon").info("it works", extra={"action": "works"})
        logging.getLogger("dints_deploy.service.daemon").debug("not at this level")
        (line,) = (tmp_path / "log").read_text().splitlines()
        assert json.loads(line)["where"] == "service.daemon"
    finally:
        for handler in list(ours.handlers):
            ours.removeHandler(handler)
            handler.close()
        ours.setLevel(before[0])
        ours.propagate = before[1]


@pytest.mark.parametrize("address", ["file", "abstract"])
def test_systemd_hears_what_it_is_told(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(tmp_path / "socket") if address == "file" else f"@dints-{free_port()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hearing:
        hearing.bind("\0" + name[1:] if name.startswith("@") else name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        assert notify("READY=1", "STATUS=works")
        assert hearing.recv(100) == b"READY=1\nSTATUS=works"
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert not notify("READY=1")


def test_systemd_is_asked_for_more_time_for_as_long_as_the_start_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hearing:
        hearing.bind(str(tmp_path / "socket"))
        hearing.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "socket"))
        with starting(every_s=0.01):
            heard = {hearing.recv(100) for _ in range(3)}
        assert heard == {b"EXTEND_TIMEOUT_USEC=60000000"}
        hearing.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                hearing.recv(100)
        time.sleep(0.05)
        with pytest.raises(BlockingIOError):
            hearing.recv(100)


def test_the_watchdog_is_told_only_where_it_waits_for_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert watchdog_seconds() == 30.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert watchdog_seconds() is None
    monkeypatch.delenv("WATCHDOG_PID")
    monkeypatch.delenv("WATCHDOG_USEC")
    assert watchdog_seconds() is None
