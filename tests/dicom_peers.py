"""Real programs that judge written objects: dciodvfy, Orthanc with dcmtk's storescu, and Pillow as a rasteriser."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tests.peers import free_port


def needs(*programs: str) -> None:
    """Skip where a program of Debian's packages is not installed."""
    if missing := [name for name in programs if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian packages dicom3tools, dcmtk, orthanc)")


def errors_of(path: Path) -> list[str]:
    found = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, timeout=60, check=False)
    lines = (found.stdout + found.stderr).splitlines()
    assert lines, "dciodvfy says at least which IOD it checks"
    return [line for line in lines if line.startswith("Error")]


@contextmanager
def orthanc(folder: Path) -> Iterator[tuple[str, int]]:
    """Start a real Orthanc on 127.0.0.1 with its data in `folder`; yield its REST address and DICOM port."""
    needs("Orthanc", "storescu")
    http, dicom = free_port(), free_port()
    settings_file = folder / "orthanc.json"
    settings_file.write_text(
        json.dumps(
            {
                "StorageDirectory": str(folder / "db"),
                "IndexDirectory": str(folder / "db"),
                "HttpPort": http,
                "DicomPort": dicom,
                "DicomAet": "ORTHANC",
                "RemoteAccessAllowed": False,
                "HttpBindAddresses": ["127.0.0.1"],
                "AuthenticationEnabled": True,
                "RegisteredUsers": {"test": "test"},
                "DicomAlwaysAllowStore": True,
                "Plugins": [],
            }
        )
    )
    address = f"http://127.0.0.1:{http}"
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(["Orthanc", str(settings_file)], stdout=log, stderr=log) as server,
    ):
        try:
            wait_for(address)
            yield address, dicom
        finally:
            server.terminate()
            server.wait(timeout=30)


def store(port: int, paths: Sequence[Path]) -> None:
    """Send objects by C-STORE."""
    sent = subprocess.run(
        ["storescu", "-R", "-aec", "ORTHANC", "127.0.0.1", str(port), *map(str, paths)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert sent.returncode == 0, sent.stderr


def instance(address: str, uid: str) -> str:
    (stored,) = json.loads(ask(f"{address}/tools/lookup", uid.encode()))
    return str(stored["ID"])


def wait_for(address: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            ask(f"{address}/system")
            return
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def ask(url: str, data: bytes | None = None) -> bytes:
    token = base64.b64encode(b"test:test").decode()
    request = urllib.request.Request(url, data=data, headers={"Authorization": f"Basic {token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


def filled(points: Sequence[Sequence[float]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Fill a polygon with Pillow, a reader of its own."""
    picture = Image.new("L", (shape[1] * 8, shape[0] * 8))
    ImageDraw.Draw(picture).polygon([((x + 0.5) * 8, (y + 0.5) * 8) for x, y in points], fill=1)
    return np.asarray(picture)[4::8, 4::8].astype(bool)
