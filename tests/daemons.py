"""A real daemon in a process of its own, with a zoo of one quick entry, for tests and for the scripts that kill it."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import AE, StoragePresentationContexts, evt
from pynetdicom.sop_class import Comprehensive3DSRStorage, EnhancedSRStorage, SegmentationStorage, Verification

from dints_deploy.dicom.network import Remote, send
from tests.command import threshold_entry
from tests.dicom_phantoms import straight, write
from tests.peers import free_port, listens, wait_until
from tests.tiny_entry import threshold_network, write_entry

ENTRY = "bright"
LEVEL = 2000.0
"""Above it a pixel of a phantom is labelled."""


@dataclass
class Site:
    """A folder with a zoo, a configuration and a data folder, and the daemon that may run on them.

    Attributes:
        fields: of `appliance.toml`.
        environment: variables for the daemon, over the usual ones.
    """

    folder: Path
    port: int
    http_port: int
    fields: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    @property
    def config(self) -> Path:
        return self.folder / "appliance.toml"

    @property
    def log(self) -> Path:
        return self.folder / "daemon.log"

    def variables(self) -> dict[str, str]:
        own = {"DINTS_ZOO": str(self.folder / "zoo"), "DINTS_STATE": str(self.folder / "state")}
        return os.environ | own | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | self.environment

    def configure(self, **changes: Any) -> None:
        """Write the configuration with some fields changed."""
        self.fields |= changes
        self.config.write_text(tomli_w.dumps(self.fields), encoding="utf-8")
        self.config.chmod(0o600)

    def start(self, *, wait: bool = True, **environment: str) -> subprocess.Popen[bytes]:
        """Start the daemon; wait until its port is open, or it has ended."""
        command = [sys.executable, "-m", "dints_deploy", "watch", "--config", str(self.config)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stderr=log, stdout=log, env=self.variables() | environment, start_new_session=True
            )
        process = self.process
        if wait:
            wait_until(lambda: listens(self.port) or process.poll() is not None, seconds=60, what="the daemon")
        return process

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(timeout=60)
        self.process = None
        return status

    def workers(self) -> list[int]:
        """Return the processes of the daemon's workers."""
        if self.process is None:
            return []
        found = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for path in found for pid in _read(path).split()]

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run another command on the same configuration."""
        command = [sys.executable, "-m", "dints_deploy", *map(str, words), "--config", str(self.config)]
        return subprocess.run(command, env=self.variables(), capture_output=True, text=True, timeout=60, check=False)

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a query on the database."""
        path = self.data_dir / "appliance.sqlite"
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30) as connection:
            found = connection.execute(query, values).fetchall()
        connection.close()
        return found

    def states(self) -> dict[str, int]:
        """Return how many jobs are in each state, and studies that are coming in."""
        counts = dict(self.rows("SELECT state, count(*) FROM job GROUP BY state"))
        receiving = self.rows("SELECT count(*) FROM study WHERE state = 'receiving'")[0][0]
        return counts | ({"receiving": receiving} if receiving else {})

    def send(self, files: Sequence[Path], *, calling: str = "MR1", seconds: float = 20.0) -> None:
        """Send files to the daemon in one association."""
        send(Remote("127.0.0.1", self.port, "DINTS", calling, timeout_seconds=seconds), files)

    def wait_done(self, count: int, *, seconds: float = 120.0) -> None:
        """Wait until so many jobs are done and none is under way."""

        def done() -> bool:
            states = self.states()
            return states.pop("done", 0) == count and not states.keys() - {"superseded"}

        try:
            wait_until(done, seconds=seconds, what=f"{count} jobs")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.states()}\n{self.log.read_text()[-3000:]}") from error

    def delivered(self, name: str = "results") -> dict[str, list[Path]]:
        """Return job -> files in a folder destination."""
        found: dict[str, list[Path]] = {}
        for path in sorted((self.folder / name).glob("*/*")):
            if not path.name.startswith("."):
                found.setdefault(path.parent.name, []).append(path)
        return found


def site(folder: Path, *, outputs: Sequence[str] = ("dicom-seg",), **changes: Any) -> Site:
    """Return a site whose one route sends everything to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    accepts = {"modality": ["CT", "MR"]}
    channels = [{"name": "CT", "modality": "CT", "intensity": {"scheme": "identity"}}]
    entry = threshold_entry(ENTRY, accepts=accepts, channels=channels)
    write_entry(folder / "zoo" / ENTRY, entry, [threshold_network(LEVEL).onnx()])
    (folder / "results").mkdir()
    port, http_port = free_port(), free_port()
    title = {"ae_title": "DINTS", "callers": ["*"]}
    route = {"name": "all", "entry": ENTRY, "outputs": list(outputs), "destinations": ["results"]}
    fields: dict[str, Any] = {
        "schema_version": 1,
        "data_dir": str(folder / "data"),
        "audit_anchor": str(folder / "anchor.json"),
        "listeners": [{"address": "127.0.0.1", "port": port, "titles": [title]}],
        "completeness": {"settled_seconds": 0.3, "released_seconds": 0.3, "quiet_seconds": 2.0},
        "routes": [route],
        "destinations": [{"kind": "folder", "name": "results", "path": str(folder / "results")}],
        "worker": {"engine": "onnx", "threads": 1, "retry_seconds": 0.2, "attempts": 5},
        "disk": {"free_bytes": 0},
        "http": {"port": http_port},
    }
    made = Site(folder, port, http_port, fields)
    made.configure(**changes)
    return made


@contextmanager
def daemon(folder: Path, *, environment: Mapping[str, str] | None = None, **options: Any) -> Iterator[Site]:
    """Run a daemon until the end of the block."""
    one = site(folder, **options)
    one.environment = dict(environment or {})
    one.start()
    try:
        yield one
    finally:
        if one.process is not None:
            one.process.kill()
            one.process.wait()


def study(folder: Path, number: int, *, planes: int = 4, size: int = 12) -> list[Path]:
    """Write a study of its own and return its files."""

    def marked(ds: Dataset, index: int) -> None:
        ds.Modality = "CT"

    return write(
        folder, straight(planes=planes, rows=size, columns=size, seed=number), name=f"s{number}", change=marked
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


class Archive:
    """A DICOM port that keeps the digest of the data set of everything that comes.

    Attributes:
        answer: status of C-STORE that it gives, 0 for success.
        delay_s: before it answers.
    """

    def __init__(self) -> None:
        self.port = 0
        self.answer, self.delay_s = 0x0000, 0.0
        self._lock = threading.Lock()
        self._came: dict[str, list[str]] = {}

    def take(self, uid: str, digest: str) -> int:
        """Take an object and return the status."""
        time.sleep(self.delay_s)
        if self.answer == 0:
            with self._lock:
                self._came.setdefault(uid, []).append(digest)
        return self.answer

    def uids(self) -> set[str]:
        """Return the SOPInstanceUID of everything that came."""
        with self._lock:
            return set(self._came)

    def has(self, file: Path) -> bool:
        """Say whether a file came, with the same data set."""
        read = dcmread(file)
        with self._lock:
            return digest_of(file) in self._came.get(str(read.SOPInstanceUID), ())

    def repeated(self) -> int:
        """Return how often something came that was there."""
        with self._lock:
            return sum(len(digests) - 1 for digests in self._came.values())

    def contradictions(self) -> list[str]:
        """Return what came with different data sets under one UID."""
        with self._lock:
            return [uid for uid, digests in self._came.items() if len(set(digests)) > 1]


@contextmanager
def archive(folder: Path, *, port: int | None = None, into: Archive | None = None) -> Iterator[Archive]:
    """Run an archive until the end of the block; `into` goes on with what an earlier one got."""
    one = into or Archive()
    one.port = port or free_port()
    entity = AE("PACS")
    entity.supported_contexts = StoragePresentationContexts
    for context in (SegmentationStorage, EnhancedSRStorage, Comprehensive3DSRStorage):
        entity.add_supported_context(context)
    entity.add_supported_context(Verification)

    def store(event: evt.Event) -> int:
        data = event.request.DataSet.getvalue()
        return one.take(str(event.request.AffectedSOPInstanceUID), hashlib.sha256(data).hexdigest())

    server = entity.start_server(("127.0.0.1", one.port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    try:
        yield one
    finally:
        server.shutdown()


def digest_of(file: Path) -> str:
    """Return the SHA-256 of a file's data set, without the file meta information."""
    data = file.read_bytes()
    (length,) = struct.unpack("<L", data[140:144])
    return hashlib.sha256(data[144 + length :]).hexdigest()
