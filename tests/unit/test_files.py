"""A file is its old bytes or its new bytes, never a part: when writers fail, disks fill, or the process is killed."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dints_deploy.errors import OutputError
from dints_deploy.files import (
    CHUNK_BYTES,
    make_folder,
    output_error,
    replacing,
    sha256_file,
    state_folder,
    write_bytes,
    write_text,
)
from tests.small_disk import fill, small_disk


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("old", [None, b"old"])
def test_the_file_is_old_until_the_block_ends_and_new_after_it(old: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "labels.nii.gz"
    if old is not None:
        path.write_bytes(old)
    with replacing(path) as partial:
        partial.write_bytes(b"new")
        assert partial.parent == tmp_path  # a rename stays on one disk
        assert partial.name.endswith("labels.nii.gz")  # writers choose the format by the suffix
        assert (path.read_bytes() if path.exists() else None) == old
    assert contents(tmp_path) == {"labels.nii.gz": b"new"}


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_writer_that_raises_leaves_what_was_there(
    error: type[BaseException], old: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "labels.nii.gz"
    before = {} if old is None else {path.name: old}
    if old is not None:
        path.write_bytes(old)

    def write() -> None:
        with replacing(path) as partial:
            partial.write_bytes(b"half of the ne")
            raise error

    with pytest.raises(error):
        write()
    assert contents(tmp_path) == before


def test_a_writer_that_writes_nothing_is_an_output_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"old")
    with pytest.raises(OutputError), replacing(tmp_path / "a"):
        pass
    assert contents(tmp_path) == {"a": b"old"}


KILLED = """
import os, signal, sys
from pathlib import Path
from dints_deploy.files import replacing
with replacing(Path(sys.argv[1])) as partial:
    partial.write_bytes(b"half of the ne")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.nii.gz"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.nii.gz"
    versions = [bytes([n]) * 50_000 for n in range(8)]
    seen: set[bytes] = set()

    def write(data: bytes) -> None:
        for _ in range(5):
            write_bytes(path, data)
            seen.add(path.read_bytes())

    threads = [threading.Thread(target=write, args=(data,)) for data in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen <= set(versions)
    assert len(contents(tmp_path)) == 1


def test_a_link_is_replaced_and_what_it_points_to_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_bytes(tmp_path / "link", b"new")
    assert contents(tmp_path) == {"target": b"precious", "link": b"new"}
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("place", ["none/a", "file/a", "folder", "x" * 300])
def test_a_place_that_cannot_be_written_is_named_with_what_to_do(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="choose another place") as failure:
        write_bytes(tmp_path / place, b"new")
    assert failure.value.code == "output-unwritable"
    assert str(tmp_path / place) in failure.value.message
    assert contents(tmp_path) == {"file": b""}


def test_a_folder_without_the_right_to_write_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        with small_disk(tmp_path / "disk", kilobytes=64, options=",ro") as folder:
            assert_unwritable(folder)
    else:
        folder = tmp_path / "locked"
        folder.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
        assert_unwritable(folder)


def assert_unwritable(folder: Path) -> None:
    for action in (lambda: write_bytes(folder / "a", b"new"), lambda: make_folder(folder / "b")):
        with pytest.raises(OutputError) as failure:
            action()
        assert failure.value.code == "output-unwritable"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_full_disk_is_named_and_leaves_the_old_file(old: bytes | None, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kilobytes=64) as folder:
        if old is not None:
            write_bytes(folder / "a", old)
        before = contents(folder)
        with pytest.raises(OutputError, match="disk full: free some space") as failure:
            write_bytes(folder / "a", bytes(1 << 20))
        assert failure.value.code == "disk-full"
        assert contents(folder) == before
        filler = fill(folder)
        with pytest.raises(OutputError) as failure:
            write_bytes(folder / "b", b"x")
        assert failure.value.code == "disk-full"
        filler.unlink()
        write_bytes(folder / "a", b"new")
        assert contents(folder) == {"a": b"new"}


LIMITED = """
import resource, sys
from pathlib import Path
from dints_deploy.errors import OutputError
from dints_deploy.files import write_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes(Path(sys.argv[1]), bytes(2000))
except OutputError as error:
    sys.stdout.write(error.code)
"""


def test_a_file_size_limit_is_named_as_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "a")], check=True, capture_output=True, text=True
    )
    assert done.stdout == "disk-full"
    assert contents(tmp_path) == {"a": b"old"}


def test_text_is_utf_8(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "Grüße, 海馬\n")
    assert (tmp_path / "a").read_bytes() == "Grüße, 海馬\n".encode()


def test_a_folder_is_made_with_its_parents_and_may_be_there_already(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b") == make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError) as failure:
        make_folder(tmp_path / "file")
    assert failure.value.code == "output-unwritable"


def test_an_error_without_a_system_message_is_named_by_its_type(tmp_path: Path) -> None:
    assert "TimeoutError" in output_error(tmp_path, TimeoutError()).message


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_a_digest_is_that_of_all_bytes(size: int, tmp_path: Path) -> None:
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DINTS_STATE": "/one", "XDG_STATE_HOME": "/two"}, "/one"),
        ({"XDG_STATE_HOME": "/two"}, "/two/dints-deploy"),
        ({"HOME": "/three"}, "/three/.local/state/dints-deploy"),
    ],
)
def test_the_state_folder_is_the_configured_one_then_the_users(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DINTS_STATE", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert state_folder() == Path(expected)
