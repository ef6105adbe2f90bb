"""Real DICOM peers, started for one test: DCMTK's storescp and Orthanc with its DICOMweb plug-in; and certificates."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

DICOMWEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


def free_port() -> int:
    """Return a port that nobody listens on.

    It lies below those that the system gives to connections, which could take it before its server does; it is drawn by
    chance, as other tests draw theirs at the same time.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) != 0:
                return port


def wait_until(true: Callable[[], bool], *, seconds: float = 20.0, what: str = "it") -> None:
    """Wait for a condition; fail the test when it does not come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def needs(*programs: str) -> None:
    """Skip the test where a program is not installed."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian packages dcmtk, orthanc)")


@contextmanager
def running(*command: object, port: int) -> Iterator[subprocess.Popen[str]]:
    """Run a server until the end of the block, once it listens."""
    words = [str(word) for word in command]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            wait_until(lambda: listens(port), what=words[0])
            yield process
        finally:
            process.kill()


@dataclass(frozen=True)
class Orthanc:
    """A running Orthanc."""

    dicom_port: int
    http_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def get(self, path: str) -> Any:
        """Return a document of the REST interface."""
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=10) as answer:
            return json.load(answer)

    def instances(self) -> dict[str, dict[str, Any]]:
        """Return the main tags of every instance, by SOPInstanceUID."""
        listed = self.get("instances?expand")
        return {one["MainDicomTags"]["SOPInstanceUID"]: one for one in listed}

    def file(self, uid: str) -> bytes:
        """Return an instance as a file."""
        identifier = self.instances()[uid]["ID"]
        with urllib.request.urlopen(f"{self.url}/instances/{identifier}/file", timeout=10) as answer:
            data: bytes = answer.read()
            return data


@contextmanager
def orthanc(folder: Path, *, modalities: Mapping[str, tuple[str, int]] | None = None, **more: Any) -> Iterator[Orthanc]:
    """Run an Orthanc whose data lies in `folder`.

    Args:
        modalities: AE title -> host and port of nodes that it knows.
        more: options of its configuration.
    """
    needs("Orthanc")
    folder.mkdir(parents=True, exist_ok=True)
    one = Orthanc(free_port(), free_port())
    configuration = {
        "Name": "test", "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"),
        "HttpPort": one.http_port, "DicomPort": one.dicom_port, "DicomAet": "ORTHANC", "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False, "DicomAlwaysAllowStore": True, "DicomCheckCalledAet": False,
        "DicomAlwaysAllowFind": True, "SynchronousCMove": True, "OverwriteInstances": False,
        "DicomModalities": {title: [title, host, port] for title, (host, port) in (modalities or {}).items()},
        "Plugins": [str(DICOMWEB)] if DICOMWEB.exists() else [],
        **more,
    }  # fmt: skip
    path = folder / "orthanc.json"
    path.write_text(json.dumps(configuration))
    with running("Orthanc", path, port=one.http_port):
        wait_until(lambda: listens(one.dicom_port), what="Orthanc's DICOM port")
        yield one


@dataclass(frozen=True)
class Certificates:
    """An authority, and certificates of 127.0.0.1 that it signed; and a stranger's that it did not."""

    authority: Path
    server: tuple[Path, Path]
    client: tuple[Path, Path]
    stranger: tuple[Path, Path]


def certificates(folder: Path) -> Certificates:
    """Make certificates with openssl."""
    needs("openssl")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("authority", "other"):
        _openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                 "-subj", f"/CN={name}", "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem")  # fmt: skip
    pairs = {"server": "authority", "client": "authority", "stranger": "other"}
    made = {name: _signed(folder, name, authority) for name, authority in pairs.items()}
    return Certificates(folder / "authority.pem", **made)


def _signed(folder: Path, name: str, authority: str) -> tuple[Path, Path]:
    key, request, certificate = (folder / f"{name}.{suffix}" for suffix in ("key", "csr", "pem"))
    _openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}",
             "-keyout", key, "-out", request)  # fmt: skip
    extension = folder / f"{name}.ext"
    extension.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    _openssl("x509", "-req", "-in", request, "-CA", folder / f"{authority}.pem", "-CAkey", folder / f"{authority}.key",
             "-CAcreateserial", "-days", "2", "-extfile", extension, "-out", certificate)  # fmt: skip
    key.chmod(0o600)
    return certificate, key


def _openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
