"""The DICOM port against real senders: what it takes, what it answers, whom it refuses, what it survives."""

from __future__ import annotations

import os
import random
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import UID
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.sop_class import CTImageStorage

from dints_deploy.config.fields import TLS
from dints_deploy.config.tls import client_context
from dints_deploy.dicom.bounded import read_header
from dints_deploy.dicom.network import echo, send
from dints_deploy.errors import DeliveryError
from dints_deploy.service.intake import Room
from dints_deploy.service.model import Accepted, Received
from tests.dicom_phantoms import MARK, straight, write
from tests.peers import Certificates, certificates, needs, wait_until
from tests.receiving import OURS, Appliance, association, dcmtk, receiving

SYNTAXES = {
    "CT_small.dcm": "1.2.840.10008.1.2.1",
    "MR_small_implicit.dcm": "1.2.840.10008.1.2",
    "MR_small_bigendian.dcm": "1.2.840.10008.1.2.2",
    "image_dfl.dcm": "1.2.840.10008.1.2.1.99",
    "MR_small_RLE.dcm": "1.2.840.10008.1.2.5",
    "JPEG-lossy.dcm": "1.2.840.10008.1.2.4.51",
    "SC_rgb_jpeg_gdcm.dcm": "1.2.840.10008.1.2.4.70",
    "MR_small_jpeg_ls_lossless.dcm": "1.2.840.10008.1.2.4.80",
    "MR_small_jp2klossless.dcm": "1.2.840.10008.1.2.4.90",
    "JPEG2000.dcm": "1.2.840.10008.1.2.4.91",
    "reportsi.dcm": "1.2.840.10008.1.2.1",
}
"""pydicom's own files, of eleven kinds."""


def sample(name: str) -> Path:
    found = get_testdata_file(name, download=False)
    assert isinstance(found, str)
    return Path(found)


def data_set(path: Path) -> bytes:
    """Return the bytes after the file meta information (PS3.10 7.1)."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<L", raw[140:144])
    return raw[144 + length :]


def test_what_dcmtk_sends_is_stored_durably_before_it_is_told_so(tmp_path: Path) -> None:
    paths = write(tmp_path / "scan", straight(planes=4))
    with receiving(tmp_path) as appliance:
        assert dcmtk("echoscu", appliance.port)[0] == 0
        assert dcmtk("dcmsend", appliance.port, *paths)[0] == 0
        assert set(appliance.instances()) == {str(dcmread(path).SOPInstanceUID) for path in paths}
        for path in appliance.instances().values():
            assert dcmread(path).PixelData in {dcmread(one).PixelData for one in paths}
        assert appliance.leftovers() == []
        wait_until(lambda: appliance.rows("SELECT state FROM association") == [("released",)])


@pytest.mark.parametrize("name", sorted(SYNTAXES))
def test_every_syntax_is_stored_byte_for_byte(name: str, tmp_path: Path) -> None:
    with receiving(tmp_path) as appliance:
        (uid,) = send(appliance.remote(), [sample(name)])
        stored = appliance.instances()[uid]
        assert str(read_header(stored).TransferSyntaxUID) == SYNTAXES[name]
        assert data_set(stored) == data_set(sample(name))
        assert dcmread(stored).file_meta.MediaStorageSOPInstanceUID == uid


def test_dcmtk_sends_compressed_files_as_they_are(tmp_path: Path) -> None:
    names = ["MR_small_jpeg_ls_lossless.dcm", "JPEG2000.dcm", "SC_rgb_jpeg_gdcm.dcm"]
    with receiving(tmp_path) as appliance:
        for name in names:
            assert dcmtk("dcmsend", appliance.port, "--decompress-never", sample(name))[0] == 0
        stored = [str(read_header(path).TransferSyntaxUID) for path in appliance.instances().values()]
        assert stored == [SYNTAXES[name] for name in names]


def test_the_same_object_from_another_sender_is_the_same_file(tmp_path: Path) -> None:
    path = sample("CT_small.dcm")
    with receiving(tmp_path) as appliance:
        send(appliance.remote(), [path])
        send(appliance.remote(calling_ae_title="MR2"), [path])
        assert len(appliance.rows("SELECT id FROM instance")) == 1
        assert len(list((appliance.data_dir / "objects").glob("*/*"))) == 1


class Gate:
    """An intake that waits to be opened."""

    def __init__(self) -> None:
        self.open, self.came = threading.Event(), threading.Event()
        self.closed: list[bool] = []

    def check_room(self, size_bytes: int = 0) -> None:
        """There is always room."""

    def accept(self, received: Received) -> Accepted:
        self.came.set()
        assert self.open.wait(20)
        return Accepted("new", "study")

    def association_closed(self, association: str, *, clean: bool) -> None:
        self.closed.append(clean)


def test_success_is_answered_only_after_the_intake_has_it(tmp_path: Path) -> None:
    gate = Gate()
    with receiving(tmp_path, intake=gate) as appliance, ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send, appliance.remote(timeout_seconds=20.0), [sample("CT_small.dcm")])
        assert gate.came.wait(10)
        assert not sending.done()
        gate.open.set()
        assert len(sending.result(10)) == 1
        wait_until(lambda: gate.closed == [True])


def test_eight_senders_at_once_lose_nothing(tmp_path: Path) -> None:
    needs("dcmsend")
    folders = [tmp_path / f"scan-{number}" for number in range(8)]
    for folder in folders:
        write(folder, straight(planes=6), name=folder.name)
    with receiving(tmp_path) as appliance:
        with ThreadPoolExecutor(8) as pool:
            codes = list(pool.map(lambda folder: dcmtk("dcmsend", appliance.port, "+sd", folder)[0], folders))
        assert codes == [0] * 8
        assert len(appliance.instances()) == 48
        assert all(path.is_file() for path in appliance.instances().values())


TITLES = [
    {"ae_title": OURS, "callers": ["MR1"]},
    {"ae_title": "OTHER", "callers": ["MR2"]},
    {"ae_title": "FAR", "callers": ["*"], "addresses": ["10.1.0.0/16"]},
]


@pytest.mark.parametrize(
    ("calling", "called", "expected"),
    [
        ("MR1", OURS, "Success"),
        ("MR2", "OTHER", "Success"),
        ("MR2", OURS, "Calling AE Title Not Recognized"),
        ("MR1", "OTHER", "Calling AE Title Not Recognized"),
        ("MR1", "NOBODY", "Called AE Title Not Recognized"),
        ("MR1", "FAR", "Calling AE Title Not Recognized"),
    ],
)
def test_only_known_callers_from_known_places_are_let_in(
    calling: str, called: str, expected: str, tmp_path: Path
) -> None:
    with receiving(tmp_path, titles=TITLES) as appliance:
        code, said = dcmtk("echoscu", appliance.port, calling=calling, called=called)
        assert expected in said
        assert (code == 0) == (expected == "Success")


def test_an_address_that_no_title_knows_is_not_answered(tmp_path: Path) -> None:
    with (
        receiving(tmp_path, titles=[{"ae_title": OURS, "callers": ["*"], "addresses": ["10.1.0.0/16"]}]) as appliance,
        socket.create_connection(("127.0.0.1", appliance.port), 5) as connection,
    ):
        assert connection.recv(1) == b""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("tls"))


def tls_of(pair: tuple[Path, Path], authority: Path) -> dict[str, str]:
    return {"certificate": str(pair[0]), "key": str(pair[1]), "authority": str(authority)}


def test_tls_lets_in_whom_the_authority_signed_and_nobody_else(made: Certificates, tmp_path: Path) -> None:
    path = sample("CT_small.dcm")
    with receiving(tmp_path, tls=tls_of(made.server, made.authority)) as appliance:

        def context(pair: tuple[Path, Path] | None) -> ssl.SSLContext:
            certificate, key = pair or (None, None)
            return client_context(TLS(certificate=certificate, key=key, authority=made.authority))

        assert len(send(appliance.remote(tls=context(made.client)), [path])) == 1
        for wrong in (made.stranger, None):
            with pytest.raises(DeliveryError) as refused:
                send(appliance.remote(tls=context(wrong), timeout_seconds=3.0), [path])
            assert refused.value.code in ("delivery-tls", "delivery-aborted", "delivery-unreachable")
        with pytest.raises(DeliveryError):
            echo(appliance.remote(timeout_seconds=2.0))
        words = ["+tls", made.client[1], made.client[0], "+cf", made.authority]
        assert dcmtk("storescu", appliance.port, *words, path)[0] == 0
        wrong_words = ["+tls", made.stranger[1], made.stranger[0], "+cf", made.authority]
        assert dcmtk("storescu", appliance.port, *wrong_words, path)[0] != 0
        assert len(appliance.instances()) == 1


def test_we_do_not_talk_to_a_server_that_the_authority_did_not_sign(made: Certificates, tmp_path: Path) -> None:
    context = client_context(TLS(authority=made.authority))
    with receiving(tmp_path, tls=tls_of(made.stranger, made.authority)) as appliance:
        with pytest.raises(DeliveryError, match="certificate") as refused:
            echo(appliance.remote(tls=context, timeout_seconds=3.0))
        assert refused.value.code == "delivery-tls"


def test_silent_connections_keep_nobody_out(made: Certificates, tmp_path: Path) -> None:
    """Neither before the handshake of TLS nor before the association."""
    with receiving(tmp_path, tls=tls_of(made.server, made.authority)) as appliance:
        silent = [socket.create_connection(("127.0.0.1", appliance.port)) for _ in range(5)]
        context = client_context(TLS(certificate=made.client[0], key=made.client[1], authority=made.authority))
        echo(appliance.remote(tls=context))
        for one in silent:
            one.close()


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.0\r\n\r\n", b"\1\0", b"\1\0\0\0\1\0abc", os.urandom(300)])
def test_who_only_looks_whether_the_port_is_open_takes_nobodys_place(said: bytes, tmp_path: Path) -> None:
    with receiving(tmp_path, associations=4) as appliance:
        for _ in range(12):
            with socket.create_connection(("127.0.0.1", appliance.port), 5) as connection:
                connection.sendall(said)
        wait_until(lambda: appliance.receiver.associations == 0, seconds=3.0)
        echo(appliance.remote())


def test_a_connection_too_many_is_told_to_come_later(tmp_path: Path) -> None:
    with receiving(tmp_path, associations=2) as appliance:
        with association(appliance.port), association(appliance.port):
            with pytest.raises(DeliveryError) as refused:
                echo(appliance.remote())
            assert refused.value.code == "delivery-rejected"
        wait_until(lambda: appliance.receiver.associations == 0)
        echo(appliance.remote())


def test_an_object_too_large_is_refused_and_the_next_one_taken(tmp_path: Path) -> None:
    small, large = (
        sample("CT_small.dcm"),
        write(tmp_path / "scan", straight(planes=1, pixels=np.zeros((1, 300, 300), dtype=np.uint16)))[0],
    )
    with receiving(tmp_path, object_bytes=100_000) as appliance:
        code, said = dcmtk("dcmsend", appliance.port, "--no-halt", large, small)
        assert "with status SUCCESS  : 1" in said
        assert "with status REFUSED  : 1" in said
        assert code == 0
        assert list(appliance.instances()) == [str(dcmread(small).SOPInstanceUID)]
        assert appliance.leftovers() == []
        assert appliance.receiver.refused == {"intake-too-large": 1}


def test_a_full_disk_is_answered_as_out_of_resources(tmp_path: Path) -> None:
    with receiving(tmp_path, room=Room(free_bytes=1 << 60)) as appliance:
        code, said = dcmtk("storescu", appliance.port, sample("CT_small.dcm"))
        assert code != 0
        assert "Refused: OutOfResources" in said
        assert (appliance.instances(), appliance.leftovers()) == ({}, [])


def test_a_full_disk_is_not_filled_further_while_objects_are_refused(tmp_path: Path) -> None:
    ds = dcmread(sample("CT_small.dcm"))
    with receiving(tmp_path, room=Room(free_bytes=1 << 60)) as appliance, association(appliance.port) as sender:
        connection, context = sender.dul.socket.socket, sender.accepted_contexts[0].context_id
        connection.sendall(_p_data(context, 3, _store_command(str(ds.SOPClassUID), "1.2.3.4")))
        for _ in range(20):
            connection.sendall(_p_data(context, 0, bytes(10_000)))
            assert appliance.leftovers() == []


def test_an_object_of_another_name_than_the_request_says_is_refused(tmp_path: Path) -> None:
    """rtplan.dcm has one SOPInstanceUID in its file meta information, which the request takes, and one in its data."""
    with receiving(tmp_path) as appliance:
        with pytest.raises(DeliveryError, match="0xA900"):
            send(appliance.remote(), [sample("rtplan.dcm")])
        assert (appliance.instances(), appliance.leftovers()) == ({}, [])
        assert appliance.receiver.refused == {"intake-mismatch": 1}


def raw_store(appliance: Appliance, encoded: bytes, *, uid: str = "1.2.3.4.5") -> int:
    """Send bytes as the data set of a C-STORE request; return the status of the answer."""
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = CTImageStorage, UID(uid)
    request.DataSet = BytesIO(encoded)
    with association(appliance.port) as sender:
        sender._reactor_checkpoint.clear()
        wait_until(lambda: bool(sender._is_paused))
        sender.dimse.send_msg(request, sender.accepted_contexts[0].context_id)
        _, answer = sender.dimse.get_msg(block=True)
        sender._reactor_checkpoint.set()
        return int(answer.Status)


@pytest.mark.parametrize("seed", range(6))
def test_hostile_data_sets_are_refused_and_the_port_goes_on(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    encoded = bytearray(data_set(sample("CT_small.dcm")))
    if seed:
        for _ in range(40):
            encoded[chance.randrange(600)] = chance.randrange(256)
    else:
        encoded = bytearray(os.urandom(5000))
    with receiving(tmp_path) as appliance:
        assert raw_store(appliance, bytes(encoded)) in (0xC000, 0xA900)
        assert (appliance.instances(), appliance.leftovers()) == ({}, [])
        echo(appliance.remote())


def test_a_header_that_claims_four_gigabytes_is_not_believed(tmp_path: Path) -> None:
    with receiving(tmp_path) as appliance:
        with socket.create_connection(("127.0.0.1", appliance.port), 5) as connection:
            connection.sendall(struct.pack(">BBL", 1, 0, 0xFFFFFFFF))
            connection.settimeout(5)
            assert connection.recv(4096) == b""
        echo(appliance.remote())


def test_a_transfer_that_breaks_off_leaves_nothing_and_is_no_clean_end(tmp_path: Path) -> None:
    ds = dcmread(sample("CT_small.dcm"))
    with receiving(tmp_path) as appliance:
        with association(appliance.port) as sender:
            assert sender.send_c_store(ds).Status == 0
            connection, context = sender.dul.socket.socket, sender.accepted_contexts[0].context_id
            command = _store_command(str(ds.SOPClassUID), "1.2.3.4")
            connection.sendall(_p_data(context, 3, command) + _p_data(context, 0, bytes(1000)) + b"\4\0\0\0")
            wait_until(lambda: len(appliance.leftovers()) == 1)
            connection.shutdown(socket.SHUT_RDWR)
            wait_until(lambda: appliance.rows("SELECT state FROM association") == [("aborted",)])
        assert appliance.leftovers() == []
        assert len(appliance.instances()) == 1


def test_fragments_of_any_size_and_several_in_one_pdu_make_the_same_object(tmp_path: Path) -> None:
    ds, encoded = dcmread(sample("CT_small.dcm")), data_set(sample("CT_small.dcm"))
    uid = str(ds.SOPInstanceUID)
    with receiving(tmp_path) as appliance, association(appliance.port) as sender:
        connection, context = sender.dul.socket.socket, sender.accepted_contexts[0].context_id
        command = _store_command(str(ds.SOPClassUID), uid)
        pieces = [(1, command[:50]), (3, command[50:]), (0, encoded[:1]), (0, encoded[1:20000]), (2, encoded[20000:])]
        connection.sendall(_pdu(*(_item(context, *piece) for piece in pieces)))
        wait_until(lambda: uid in appliance.instances())
        assert data_set(appliance.instances()[uid]) == encoded


@pytest.mark.parametrize("what", ["a command within the data", "another context", "lengths", "a long command"])
def test_fragments_that_make_no_sense_end_the_association_and_leave_nothing(what: str, tmp_path: Path) -> None:
    ds = dcmread(sample("CT_small.dcm"))
    with receiving(tmp_path) as appliance:
        with association(appliance.port) as sender:
            connection, context = sender.dul.socket.socket, sender.accepted_contexts[0].context_id
            command = _store_command(str(ds.SOPClassUID), "1.2.3.4")
            wrong = {
                "a command within the data": _p_data(context, 3, command),
                "another context": _p_data(context + 2, 0, bytes(10)),
                "lengths": struct.pack(">BBLLBB", 4, 0, 6, 1000, context, 0),
                "a long command": _p_data(context, 1, bytes(70_000)),
            }[what]
            begin = b"" if what == "a long command" else _p_data(context, 3, command) + _p_data(context, 0, bytes(1000))
            connection.sendall(begin + wrong)
            wait_until(lambda: appliance.receiver.associations == 0)
        assert (appliance.instances(), appliance.leftovers()) == ({}, [])
        echo(appliance.remote())


def _p_data(context: int, control: int, value: bytes) -> bytes:
    """Return a P-DATA-TF PDU of one fragment (PS3.8 9.3.5)."""
    return _pdu(_item(context, control, value))


def _item(context: int, control: int, value: bytes) -> bytes:
    return struct.pack(">LBB", len(value) + 2, context, control) + value


def _pdu(*items: bytes) -> bytes:
    return struct.pack(">BBL", 4, 0, len(b"".join(items))) + b"".join(items)


def _store_command(sop_class: str, uid: str) -> bytes:
    """Return the command set of a C-STORE request (PS3.7 9.3.1)."""

    def element(number: int, value: bytes) -> bytes:
        value += b"\0" * (len(value) % 2)
        return struct.pack("<HHL", 0, number, len(value)) + value

    rest = element(0x0002, sop_class.encode()) + element(0x0100, struct.pack("<H", 1))
    rest += element(0x0110, struct.pack("<H", 7)) + element(0x0700, struct.pack("<H", 2))
    rest += element(0x0800, struct.pack("<H", 1)) + element(0x1000, uid.encode())
    return element(0x0000, struct.pack("<L", len(rest))) + rest


def test_a_silent_association_is_ended(tmp_path: Path) -> None:
    with receiving(tmp_path, idle_seconds=0.5) as appliance, association(appliance.port) as sender:
        wait_until(lambda: not sender.is_established, seconds=10)


def test_who_sends_without_a_pause_is_not_silent(tmp_path: Path) -> None:
    ds, encoded = dcmread(sample("CT_small.dcm")), data_set(sample("CT_small.dcm"))
    uid = str(ds.SOPInstanceUID)
    with receiving(tmp_path, idle_seconds=0.5) as appliance, association(appliance.port) as sender:
        connection, context = sender.dul.socket.socket, sender.accepted_contexts[0].context_id
        connection.sendall(_p_data(context, 3, _store_command(str(ds.SOPClassUID), uid)))
        begin, sent = time.monotonic(), 0
        while time.monotonic() - begin < 2.0:
            connection.sendall(_p_data(context, 0, encoded[sent : sent + 10]))
            sent += 10
            time.sleep(0.002)
        assert sent < len(encoded)
        connection.sendall(_p_data(context, 2, encoded[sent:]))
        wait_until(lambda: uid in appliance.instances())
        assert data_set(appliance.instances()[uid]) == encoded


def test_nothing_that_identifies_a_patient_is_logged(tmp_path: Path) -> None:
    log = tmp_path / "log.json"
    script = f"""
from pathlib import Path
from dints_deploy.config.appliance import Log
from dints_deploy.service.log import configure
from tests.receiving import receiving, dcmtk
from tests.dicom_phantoms import MARK, straight, write
configure(Log(level="debug", file=Path({str(log)!r})))
paths = write(Path({str(tmp_path / "scan")!r}), straight(planes=2))
cut = Path({str(tmp_path / "cut.dcm")!r})
cut.write_bytes(paths[0].read_bytes()[:900])
with receiving(Path({str(tmp_path)!r}), titles=[{{"ae_title": "DINTS", "callers": ["MR1"]}}]) as appliance:
    dcmtk("dcmsend", appliance.port, *paths)
    dcmtk("dcmsend", appliance.port, paths[0], calling={MARK!r})
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    text = log.read_text() + ran.stdout + ran.stderr
    assert '"action": "unknown_caller"' in text
    assert '"action": "closed"' in text
    assert MARK not in text
    assert "19870605" not in text
