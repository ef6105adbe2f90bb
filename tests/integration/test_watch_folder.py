"""The folder watch: settled, whole, regular files are taken once; links, junk and half copies are not."""

from __future__ import annotations

import gzip
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydicom.data import get_testdata_file

from dints_deploy.config.intake import Folder
from dints_deploy.service.intake import DurableIntake, Room
from dints_deploy.service.retention import make_folders
from dints_deploy.service.store import Store, open_store
from dints_deploy.service.watch_folder import FolderWatch
from tests.command import values, write_scan
from tests.dicom_phantoms import straight, write
from tests.peers import wait_until

SETTLE = 10.0


@dataclass(frozen=True)
class Watched:
    """A watched folder whose clock the test turns."""

    path: Path
    data_dir: Path
    store: Store
    intake: DurableIntake
    settings: Folder

    def watch(self) -> FolderWatch:
        """Return a watch as after a start of the daemon."""
        return FolderWatch(self.settings, self.intake, self.data_dir)

    def taken(self) -> list[str]:
        """Return the digests of the objects that were taken."""
        return [str(row[0]) for row in self.store._connection.execute("SELECT sha256 FROM instance ORDER BY id")]

    def leftovers(self) -> list[Path]:
        return list((self.data_dir / "incoming").iterdir())


@contextmanager
def watched(folder: Path, *, room: Room | None = None, **settings: Any) -> Iterator[Watched]:
    path, data_dir = folder / "watched", folder / "data"
    path.mkdir()
    make_folders(data_dir)
    store = open_store(data_dir)
    fields = {"path": path, "settle_seconds": SETTLE, "scan_seconds": 0.2} | settings
    one = Watched(path, data_dir, store, DurableIntake(store, data_dir, room or Room()), Folder.model_validate(fields))
    try:
        yield one
    finally:
        store.close()


def look_twice(watch: FolderWatch, start_s: float = 0.0) -> int:
    """Look now and when everything has settled; return what was taken."""
    return watch.look(start_s) + watch.look(start_s + SETTLE)


def test_dicom_and_nifti_are_taken_once_they_have_settled(tmp_path: Path) -> None:
    with watched(tmp_path) as one:
        write(one.path / "deep" / "er", straight(planes=3))
        write_scan(one.path / "scan.nii.gz", values(6, 7, 8))
        watch = one.watch()
        assert (watch.look(0.0), watch.look(SETTLE / 2), watch.look(SETTLE)) == (0, 0, 4)
        assert len(one.taken()) == 4
        assert look_twice(watch, 100.0) == 0
        assert one.leftovers() == []
        assert len(list(one.path.rglob("*.dcm"))) == 3  # left where they are


def test_what_was_taken_is_remembered_over_a_restart_without_its_name(tmp_path: Path) -> None:
    with watched(tmp_path) as one:
        write_scan(one.path / "Jane_Doe.nii.gz", values(6, 7, 8))
        assert look_twice(one.watch()) == 1
        assert look_twice(one.watch()) == 0
        (one.path / "Jane_Doe.nii.gz").rename(one.path / "again.nii.gz")
        watch = one.watch()
        look_twice(watch)
        assert len(one.taken()) == 1  # another name, the same bytes
        remembered = b"".join(path.read_bytes() for path in (one.data_dir / "folders").iterdir())
        assert b"Jane" not in remembered


def test_a_file_that_grows_is_not_taken_until_it_rests(tmp_path: Path) -> None:
    with watched(tmp_path) as one:
        (source,) = write(tmp_path / "source", straight(planes=1, rows=64, columns=64))
        raw = source.read_bytes()
        target, watch = one.path / "slice.dcm", one.watch()
        for step in range(1, 5):
            target.write_bytes(raw[: len(raw) * step // 4])
            assert watch.look(step * SETTLE * 0.9) == 0
        assert watch.look(4 * SETTLE * 0.9 + SETTLE) == 1
        assert len(one.taken()) == 1


def halves(folder: Path) -> dict[str, bytes]:
    """Return files that were copied only in part."""
    (plain,) = write(folder / "plain", straight(planes=1, rows=64, columns=64))
    nifti = write_scan(folder / "scan.nii", values(16, 16, 16)).read_bytes()
    packed = Path(str(get_testdata_file("MR_small_RLE.dcm", download=False))).read_bytes()
    return {
        "half.dcm": plain.read_bytes()[:-2000],
        "rle.dcm": packed[: len(packed) * 2 // 3],
        "half.nii": nifti[:-100],
        "half.nii.gz": gzip.compress(nifti)[:-100],
        "empty.dcm": b"",
        "empty.nii": b"",
    }


def test_half_copied_files_are_not_taken_until_they_are_whole(tmp_path: Path) -> None:
    with watched(tmp_path) as one:
        for name, data in halves(tmp_path).items():
            (one.path / name).write_bytes(data)
        watch = one.watch()
        assert look_twice(watch) == 0
        assert (one.taken(), one.leftovers()) == ([], [])
        (one.path / "half.nii").write_bytes((tmp_path / "scan.nii").read_bytes())
        assert look_twice(watch, 100.0) == 1


def test_links_pipes_and_folders_never_lead_outside(tmp_path: Path) -> None:
    with watched(tmp_path) as one:
        (outside,) = write(tmp_path / "outside", straight(planes=1))
        (one.path / "file.dcm").symlink_to(outside)
        (one.path / "folder").symlink_to(outside.parent)
        (one.path / "loop").symlink_to(one.path)
        (one.path / "gone.dcm").symlink_to(tmp_path / "nowhere")
        os.mkfifo(one.path / "pipe.dcm")
        assert look_twice(one.watch()) == 0
        assert one.taken() == []


def test_a_folder_that_becomes_a_link_after_it_was_looked_at_is_not_followed(tmp_path: Path) -> None:
    with watched(tmp_path) as one:
        (one.path / "study").mkdir()
        write(one.path / "study", straight(planes=1))
        watch = one.watch()
        watch.look(0.0)
        candidates = list(watch._files())
        (one.path / "study").rename(tmp_path / "moved")
        (one.path / "study").symlink_to(tmp_path / "moved")
        assert [watch._attend(candidate) for candidate in candidates] == [False]
        assert one.taken() == []


def test_ten_thousand_junk_files_are_read_once_and_do_no_harm(tmp_path: Path) -> None:
    with watched(tmp_path) as one:
        for number in range(10_000):
            (one.path / f"{number}.txt").write_bytes(b"junk %d" % number)
        write(one.path, straight(planes=2))
        watch = one.watch()
        assert look_twice(watch) == 2
        assert watch._pending == {}
        assert look_twice(watch, 100.0) == 0
        assert watch.problem == ""


@pytest.mark.parametrize("after", ["delete", "move"])
def test_taken_files_are_deleted_or_moved_where_that_is_asked_for(after: str, tmp_path: Path) -> None:
    move_to = tmp_path / "done" if after == "move" else None
    with watched(tmp_path, after=after, move_to=move_to) as one:
        paths = write(one.path, straight(planes=3))
        (one.path / "notes.txt").write_text("not a scan")
        raw = sorted(path.read_bytes() for path in paths)
        assert look_twice(one.watch()) == 3
        assert [path.name for path in one.path.iterdir()] == ["notes.txt"]
        if after == "move":
            assert sorted(path.read_bytes() for path in (tmp_path / "done").iterdir()) == raw


def test_a_full_disk_makes_files_wait_and_loses_none(tmp_path: Path) -> None:
    with watched(tmp_path, room=Room(free_bytes=1 << 60), after="delete") as one:
        write(one.path, straight(planes=3))
        watch = one.watch()
        assert look_twice(watch) == 0
        assert len(list(one.path.iterdir())) == 3
        one.intake.room = Room()
        assert look_twice(watch, 100.0) == 3


def test_a_folder_that_cannot_be_read_is_a_problem_until_it_can(tmp_path: Path) -> None:
    with watched(tmp_path) as one:
        one.path.rmdir()
        watch = one.watch()
        watch.look(0.0)
        assert "cannot be read" in watch.problem
        one.path.mkdir()
        watch.look(1.0)
        assert watch.problem == ""


def test_the_running_watch_takes_what_is_dropped_and_stops_when_told(tmp_path: Path) -> None:
    with watched(tmp_path, settle_seconds=0.2) as one:
        stop = threading.Event()
        thread = threading.Thread(target=one.watch().run, args=(stop,))
        thread.start()
        write(one.path, straight(planes=3))
        wait_until(lambda: len(one.taken()) == 3)
        stop.set()
        thread.join(10)
        assert not thread.is_alive()
