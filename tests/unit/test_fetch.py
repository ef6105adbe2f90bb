"""A fetched task is the published one or nothing: checksum, archive and network failures leave no folder behind."""

from __future__ import annotations

import hashlib
import io
import socket
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dints_deploy.catalog.dataset import read_dataset
from dints_deploy.errors import DatasetError, DintsError, UsageError
from dints_search.fetch import Source, fetch, find_task, msd_sources
from tests.tiny_entry import full_disk, run_cli
from tests.tiny_task import write_task

TASK = "Task11_Balls"


class Quiet(SimpleHTTPRequestHandler):
    """Hands out files; of `task.tar` parts too, as MSD's server does, and not all of it where `breaks_at` says so."""

    breaks_at: ClassVar[int | None] = None
    asked: ClassVar[list[str | None]] = []
    whole_only: ClassVar[bool] = False

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer with a file or a part of it."""
        self.asked.append(self.headers.get("Range"))
        path = Path(self.directory) / self.path.strip("/")
        if not path.is_file():
            super().do_GET()
            return
        data, start = path.read_bytes(), 0
        if self.headers.get("Range") and not self.whole_only:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(data):
            self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            return
        self.send_response(HTTPStatus.PARTIAL_CONTENT if start else HTTPStatus.OK)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : self.breaks_at])


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder that a local server hands out, and its address."""
    Quiet.breaks_at, Quiet.whole_only = None, False
    Quiet.asked.clear()
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}/task.tar"
    server.shutdown()
    thread.join()
    server.server_close()


def source(served: tuple[Path, str], archive: bytes, md5: str | None = None) -> dict[str, Source]:
    """Put an archive where the server hands it out and return its entry in a list of tasks."""
    (served[0] / "task.tar").write_bytes(archive)
    return {TASK: Source(served[1], md5 or hashlib.md5(archive, usedforsecurity=False).hexdigest())}


def packed(folder: Path, *more: tarfile.TarInfo) -> bytes:
    """Return a task as a tar archive with further members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(folder, TASK)
        for member in more:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return buffer.getvalue()


def member(name: str, **changes: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = 0 if changes else 3
    for key, value in changes.items():
        setattr(info, key, value)
    return info


def refused(tmp_path: Path, sources: dict[str, Source], code: str, *said: str) -> None:
    with pytest.raises(DintsError) as caught:
        fetch("balls", tmp_path / "out", sources=sources)
    assert caught.value.code == code
    assert all(word in caught.value.message for word in said), caught.value.message
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_task_is_downloaded_verified_and_unpacked(served: tuple[Path, str], tmp_path: Path) -> None:
    archive = packed(write_task(tmp_path / "task", 3), member(f"{TASK}/imagesTr/._ball_000.nii.gz"))
    told: list[tuple[int, int]] = []
    folder = fetch(
        "11", tmp_path / "out", sources=source(served, archive), progress=lambda done, total: told.append((done, total))
    )
    assert folder == tmp_path / "out" / TASK
    assert len(read_dataset(folder).cases) == 3
    assert told[-1] == (len(archive), len(archive))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [TASK]
    assert not list(folder.rglob("._*"))
    with pytest.raises(UsageError, match="there already"):
        fetch("balls", tmp_path / "out", sources=source(served, archive))


@pytest.mark.parametrize("whole_only", [False, True])
def test_a_download_goes_on_where_the_connection_broke(
    whole_only: bool, served: tuple[Path, str], tmp_path: Path
) -> None:
    archive = packed(write_task(tmp_path / "task", 3))
    sources, out = source(served, archive), tmp_path / "out"
    for cut in (5000, 9000):
        Quiet.breaks_at = cut
        with pytest.raises(DatasetError, match=f"ended after {cut} of {len(archive)} bytes, call again") as caught:
            fetch("balls", out, sources=sources)
        assert caught.value.code == "fetch-failed"
        assert [(path.name, path.stat().st_size) for path in out.iterdir()] == [(f".{TASK}.tar.part", cut)]
    Quiet.breaks_at, Quiet.whole_only = None, whole_only
    told: list[tuple[int, int]] = []
    fetch("balls", out, sources=sources, progress=lambda done, total: told.append((done, total)))
    assert Quiet.asked == [None, "bytes=5000-", "bytes=9000-"]
    assert told[-1] == (len(archive), len(archive))
    assert len(read_dataset(out / TASK).cases) == 3
    assert [path.name for path in out.iterdir()] == [TASK]


def test_an_archive_that_came_whole_before_the_program_was_killed_is_not_fetched_again(
    served: tuple[Path, str], tmp_path: Path
) -> None:
    archive = packed(write_task(tmp_path / "task", 3))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".{TASK}.tar.part").write_bytes(archive)
    assert len(read_dataset(fetch("balls", tmp_path / "out", sources=source(served, archive))).cases) == 3


def test_other_bytes_than_the_published_ones_are_refused(served: tuple[Path, str], tmp_path: Path) -> None:
    archive = packed(write_task(tmp_path / "task", 1))
    digest = hashlib.md5(archive, usedforsecurity=False).hexdigest()
    refused(tmp_path, source(served, archive[:-512], digest), "fetch-failed", digest, "fetch it again")


def test_an_archive_cannot_write_outside_its_folder(served: tuple[Path, str], tmp_path: Path) -> None:
    task = write_task(tmp_path / "task", 1)
    for name in ("../outside", f"{TASK}/../../outside", "/tmp/outside-of-everything"):
        archive = packed(task, member(name))
        if name.startswith("/"):  # taken as a path inside
            fetch("balls", tmp_path / "absolute", sources=source(served, archive))
            assert not Path(name).exists()
        else:
            refused(tmp_path, source(served, archive), "fetch-failed", "outside")
    assert not (tmp_path / "outside").exists()
    linked = packed(task, member(f"{TASK}/link", type=tarfile.SYMTYPE, linkname="/etc"))
    folder = fetch("balls", tmp_path / "links", sources=source(served, linked))
    assert not (folder / "link").exists()


def test_what_is_no_archive_or_no_task_is_refused(served: tuple[Path, str], tmp_path: Path) -> None:
    refused(tmp_path, source(served, b"no archive" * 100), "fetch-failed", "tar")
    (tmp_path / "empty").mkdir()
    refused(tmp_path, source(served, packed(tmp_path / "empty")), "dataset-invalid")


def test_a_missing_server_and_a_missing_file_are_named(served: tuple[Path, str], tmp_path: Path) -> None:
    refused(tmp_path, {TASK: Source(served[1] + "x", "")}, "fetch-failed", "ot found", "where there is a network")
    refused(tmp_path, {TASK: Source("http://127.0.0.1:1/task.tar", "")}, "fetch-failed", "refused")


def test_the_ten_tasks_are_found_by_number_and_name() -> None:
    sources = msd_sources()
    assert len(sources) == 10
    assert all(len(source.md5) == 32 and source.url.endswith(f"{name}.tar") for name, source in sources.items())
    for words in (("4", "04", "hippocampus", "Task04_Hippocampus"), ("1", "brain", "Task01_BrainTumour")):
        assert len({find_task(word, sources) for word in words}) == 1
    for wrong in ("kidney", "h", ""):  # two tasks begin with h
        with pytest.raises(UsageError, match="Task09_Spleen"):
            find_task(wrong, sources)
    assert run_cli("data", "fetch", "kidney").code == 2


def test_a_full_disk_is_named_and_keeps_what_came(served: tuple[Path, str], tmp_path: Path) -> None:
    sources = source(served, packed(write_task(tmp_path / "task", 1)))
    with full_disk(4096), pytest.raises(DintsError) as caught:
        fetch("balls", tmp_path / "out", sources=sources)
    assert caught.value.code == "disk-full"
    assert not isinstance(caught.value, DatasetError)
    assert [(path.name, path.stat().st_size) for path in (tmp_path / "out").iterdir()] == [(f".{TASK}.tar.part", 4096)]
    assert fetch("balls", tmp_path / "out", sources=sources).is_dir()
    assert Quiet.asked[-1] == "bytes=4096-"
    with pytest.raises(DintsError) as caught:
        fetch("balls", Path("/proc"), sources=sources)
    assert caught.value.code == "output-unwritable"


def test_a_network_that_fails_in_a_way_of_its_own_costs_nothing_that_came(tmp_path: Path) -> None:
    """A server that speaks no HTTP after some bytes: not a broken connection, but no answer either."""
    (tmp_path / "out").mkdir()
    part = tmp_path / "out" / f".{TASK}.tar.part"
    part.write_bytes(b"what came before")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.listen()

        def babble() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"\0" * 70_000)

        answer = threading.Thread(target=babble)
        answer.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/task.tar"
        with pytest.raises(DatasetError) as caught:
            fetch("balls", tmp_path / "out", sources={TASK: Source(url, "")})
        answer.join()
    assert caught.value.code == "fetch-failed"
    assert part.read_bytes() == b"what came before"
