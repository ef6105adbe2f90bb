"""Delivery to real peers: Orthanc by C-STORE, with storage commitment, by STOW-RS; peers that fail in every way."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from pydicom import dcmread
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import A_ASSOCIATE

from dints_deploy.config.delivery import DicomDestination, FolderDestination, StowDestination
from dints_deploy.config.fields import TLS
from dints_deploy.config.intake import Completeness
from dints_deploy.dicom.network import NOT_RECOGNISED, Commitments, Remote, _not_established
from dints_deploy.errors import DeliveryError
from dints_deploy.service.deliver import send
from dints_deploy.service.intake import Room
from dints_deploy.service.query import ask_sender
from tests.dicom_phantoms import straight, write
from tests.peers import DICOMWEB, Orthanc, certificates, free_port, needs, orthanc, running
from tests.receiving import Appliance, receiving


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    with receiving(tmp_path_factory.mktemp("appliance")) as one:
        yield one


@pytest.fixture(scope="module")
def pacs(appliance: Appliance, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    known = {"DINTS": ("127.0.0.1", appliance.port)}
    with orthanc(tmp_path_factory.mktemp("orthanc"), modalities=known) as one:
        yield one


def dicom(port: int, **changes: object) -> DicomDestination:
    fields = {"kind": "dicom", "name": "pacs", "host": "127.0.0.1", "port": port, "ae_title": "ORTHANC"}
    return DicomDestination.model_validate(fields | {"calling_ae_title": "DINTS", "timeout_seconds": 3} | changes)


def uids(paths: list[Path]) -> set[str]:
    return {str(dcmread(path).SOPInstanceUID) for path in paths}


def code_of(deliver: Callable[[], object]) -> tuple[str, bool]:
    with pytest.raises(DeliveryError) as failed:
        deliver()
    assert failed.value.message.startswith("expected ")
    return failed.value.code, failed.value.retryable


def test_orthanc_gets_the_stored_bytes_and_the_same_once_more_changes_nothing(pacs: Orthanc, tmp_path: Path) -> None:
    paths = write(tmp_path, straight(planes=3), name="bytes")
    for _ in range(2):
        receipt = send(dicom(pacs.dicom_port), paths, name="job")
        assert set(receipt.stored) == uids(paths)
        assert not receipt.committed
    before = len(pacs.instances())
    assert uids(paths) <= set(pacs.instances())
    for path in paths:
        held = pacs.file(str(dcmread(path).SOPInstanceUID))
        assert held[-100_000:].endswith(path.read_bytes()[-80:])
    assert len(pacs.instances()) == before


def test_orthanc_commits_to_keep_what_it_got(pacs: Orthanc, appliance: Appliance, tmp_path: Path) -> None:
    paths = write(tmp_path, straight(planes=2), name="committed")
    asked = dicom(pacs.dicom_port, commitment=True, commitment_seconds=20)
    receipt = send(asked, paths, name="job", commitments=appliance.receiver.commitments)
    assert receipt.committed


def test_a_commitment_that_nobody_reports_is_tried_again(pacs: Orthanc, tmp_path: Path) -> None:
    paths = write(tmp_path, straight(planes=1), name="unreported")
    asked = dicom(pacs.dicom_port, commitment=True, commitment_seconds=0.2)
    assert code_of(lambda: send(asked, paths, name="job", commitments=Commitments())) == ("delivery-uncommitted", True)


def test_orthanc_counts_the_instances_of_a_study(pacs: Orthanc, tmp_path: Path) -> None:
    paths = write(tmp_path, straight(planes=5), name="counted")
    send(dicom(pacs.dicom_port), paths, name="job")
    one = dcmread(paths[0])
    query = {"sender": "MR1", "host": "127.0.0.1", "port": pacs.dicom_port, "ae_title": "ORTHANC"}
    rules = Completeness.model_validate({"queries": [query | {"calling_ae_title": "DINTS"}]})
    assert ask_sender(rules, ["MR1"], str(one.StudyInstanceUID)) == {one.SeriesInstanceUID: 5}
    assert ask_sender(rules, ["MR2"], str(one.StudyInstanceUID)) == {}


def test_stow_stores_in_orthanc_and_the_same_once_more_changes_nothing(pacs: Orthanc, tmp_path: Path) -> None:
    if not DICOMWEB.exists():
        pytest.skip("Orthanc's DICOMweb plug-in is not installed (Debian package orthanc-dicomweb)")
    paths = write(tmp_path, straight(planes=3), name="stowed")
    service = StowDestination(kind="stow", name="web", url=f"{pacs.url}/dicom-web")
    for _ in range(2):
        assert set(send(service, paths, name="job").stored) == uids(paths)
    assert uids(paths) <= set(pacs.instances())


def test_a_rejection_that_closed_the_connection_before_anybody_looked_is_still_a_rejection() -> None:
    remote = Remote("127.0.0.1", 11112, "PACS", "DINTS", timeout_seconds=5)
    found = []
    for answers in ([], [1]):
        association = Association(AE(), "requestor")  # as the library leaves it when the socket is closed that early
        for result in answers:
            rejection = A_ASSOCIATE()
            rejection.result, rejection.result_source, rejection.diagnostic = result, 1, 7
            association.dul.to_user_queue.put(rejection)
        found.append(_not_established(association, remote, time.monotonic(), opened=True))
    assert [fault.code for fault in found] == ["delivery-aborted", "delivery-rejected"]
    assert NOT_RECOGNISED[7] in found[1].message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--refuse"], ("delivery-rejected", True)),
        (["--abort-after"], ("delivery-aborted", True)),
        (["--abort-during"], ("delivery-aborted", True)),
        (["--sleep-during", "20"], ("delivery-timeout", True)),
    ],
)
def test_a_pacs_that_fails_is_named_by_how_it_fails(
    words: list[str], expected: tuple[str, bool], tmp_path: Path
) -> None:
    needs("storescp")
    paths = write(tmp_path / "scan", straight(planes=1, rows=300, columns=300))
    port = free_port()
    (tmp_path / "out").mkdir()
    with running("storescp", *words, "--output-directory", tmp_path / "out", port, port=port):
        assert code_of(lambda: send(dicom(port, timeout_seconds=1.5), paths, name="job")) == expected
    assert code_of(lambda: send(dicom(port), paths, name="job")) == ("delivery-unreachable", True)


def test_a_full_pacs_is_tried_again(tmp_path: Path) -> None:
    paths = write(tmp_path / "scan", straight(planes=1))
    with receiving(tmp_path, room=Room(free_bytes=1 << 60)) as full:
        there = dicom(full.port, ae_title="DINTS")
        assert code_of(lambda: send(there, paths, name="job")) == ("delivery-refused", True)


def test_a_peer_that_accepts_the_connection_and_says_nothing_is_given_up(tmp_path: Path) -> None:
    paths = write(tmp_path, straight(planes=1))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        there = dicom(silent.getsockname()[1], timeout_seconds=1)
        assert code_of(lambda: send(there, paths, name="job")) == ("delivery-timeout", True)


def test_a_commitment_is_asked_only_of_who_offers_it(tmp_path: Path) -> None:
    needs("storescp")
    paths = write(tmp_path / "scan", straight(planes=1))
    port = free_port()
    (tmp_path / "out").mkdir()
    with running("storescp", "--output-directory", tmp_path / "out", port, port=port):
        asked = dicom(port, commitment=True)
        assert code_of(lambda: send(asked, paths, name="job")) == ("delivery-uncommitted", False)


class _Answers(BaseHTTPRequestHandler):
    """Answers what the server was told to."""

    def do_POST(self) -> None:
        self.server.seen.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))  # type: ignore[attr-defined]
        status, headers, body = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the library's name
        pass


@contextmanager
def web_server(
    status: int, body: bytes = b"{}", tls: ssl.SSLContext | None = None, **headers: str
) -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), _Answers)
    server.answer, server.seen = (status, headers, body), []  # type: ignore[attr-defined]
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


FAILED = b'{"00081198": {"vr": "SQ", "Value": [{"00081155": {"Value": ["%s"]}, "00081197": {"Value": [%d]}}]}}'


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (302, b"", ("delivery-rejected", False)),
        (401, b"", ("delivery-rejected", True)),
        (503, b"", ("delivery-refused", True)),
        (400, b"", ("delivery-refused", False)),
        (415, b"", ("delivery-unsupported", False)),
        (409, b"", ("delivery-refused", False)),
        (200, FAILED % (b"1.2.3", 0xA700), ("delivery-refused", True)),
        (202, FAILED % (b"1.2.3", 0xC000), ("delivery-refused", False)),
        (409, FAILED % (b"1.2.3", 0x0111), None),  # there already
    ],
)
def test_what_a_dicomweb_server_answers_is_understood(
    status: int, body: bytes, expected: tuple[str, bool] | None, tmp_path: Path
) -> None:
    paths = write(tmp_path, straight(planes=1))
    with web_server(status, body, Location="https://example.org/elsewhere") as server:
        service = StowDestination(kind="stow", name="web", url=f"http://127.0.0.1:{server.server_port}")
        if expected is None:
            assert set(send(service, paths, name="job").stored) == uids(paths)
        else:
            assert code_of(lambda: send(service, paths, name="job")) == expected
        assert len(server.seen) == 1  # type: ignore[attr-defined]  # no redirect was followed, nothing repeated


def test_stow_speaks_tls_with_a_token_and_refuses_a_wrong_certificate(tmp_path: Path) -> None:
    made = certificates(tmp_path / "tls")
    paths = write(tmp_path / "scan", straight(planes=2))
    token = tmp_path / "token"
    token.write_text("secret\n")
    token.chmod(0o600)
    with web_server(200, tls=tls_of(made.server)) as server:
        send(stow(server, token, made.authority), paths, name="job")
        ((headers, body),) = server.seen  # type: ignore[attr-defined]
        assert headers["Authorization"] == "Bearer secret"
        assert all(path.read_bytes() in body for path in paths)
    with web_server(200, tls=tls_of(made.stranger)) as server:
        wrong = stow(server, token, made.authority)
        assert code_of(lambda: send(wrong, paths, name="job"))[0] == "delivery-tls"
        assert server.seen == []  # type: ignore[attr-defined]


def tls_of(pair: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    return context


def stow(server: HTTPServer, token: Path, authority: Path) -> StowDestination:
    url = f"https://127.0.0.1:{server.server_port}"
    return StowDestination(kind="stow", name="web", url=url, token_file=token, tls=TLS(authority=authority))


def test_a_folder_gets_whole_files_and_keeps_another_of_the_same_name(tmp_path: Path) -> None:
    paths = write(tmp_path / "scan", straight(planes=2))
    there = FolderDestination(kind="folder", name="results", path=tmp_path / "results")
    for _ in range(2):
        assert set(send(there, paths, name="job").stored) == uids(paths)
    assert {path.name: path.read_bytes() for path in (tmp_path / "results" / "job").iterdir()} == {
        path.name: path.read_bytes() for path in paths
    }
    (tmp_path / "results" / "job" / paths[0].name).write_bytes(b"another")
    assert code_of(lambda: send(there, paths, name="job")) == ("delivery-conflict", False)
    assert (tmp_path / "results" / "job" / paths[0].name).read_bytes() == b"another"
