"""What comes in is durable once, counted once, and never silently replaced."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dints_deploy.errors import IntakeRefused, OutputError
from dints_deploy.service.intake import Room, is_content
from dints_deploy.service.model import Received
from dints_deploy.service.objects import object_path
from tests.service import SEG, Bench
from tests.small_disk import fill, small_disk


def incoming(bench: Bench) -> list[Path]:
    return list((bench.folder / "incoming").iterdir())


def test_an_object_lies_under_its_digest_with_a_row_and_nothing_is_left_behind(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    received = bench.received(1)
    content = received.path.read_bytes()
    accepted = bench.intake.accept(received)
    assert accepted.outcome == "new"
    assert object_path(tmp_path, received.sha256).read_bytes() == content
    assert bench.rows("SELECT sha256, size_bytes, role, stored FROM instance") == [
        (received.sha256, len(content), "content", 1)
    ]
    assert incoming(bench) == []


def test_the_same_object_again_changes_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.take(1)
    bench.judge()
    before = bench.rows("SELECT * FROM study"), bench.rows("SELECT * FROM instance"), bench.jobs()
    assert bench.take(1, association="a2").outcome == "duplicate"
    assert (bench.rows("SELECT * FROM study"), bench.rows("SELECT * FROM instance"), bench.jobs()) == before
    assert incoming(bench) == []


def test_another_object_of_the_same_name_is_kept_as_a_conflict_and_the_first_one_counts(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.take(1)
    bench.judge()
    assert bench.take(1, data=b"other pixels").outcome == "conflict"
    roles = dict(bench.rows("SELECT sha256, role FROM instance"))
    assert sorted(roles.values()) == ["conflict", "content"]
    assert all(object_path(tmp_path, digest).is_file() for digest in roles)
    assert "conflict" in bench.actions()
    bench.judge()
    assert bench.jobs() == [(1, "all", "queued")]


def test_a_result_that_comes_back_makes_no_new_revision(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.take(1)
    bench.judge()
    bench.take(2, sop_class=SEG)
    bench.judge()
    assert bench.jobs() == [(1, "all", "queued")]
    assert bench.rows("SELECT role FROM instance ORDER BY id") == [("content",), ("extra",)]
    received = bench.received(3, sop_class="1.2.840.10008.5.1.4.1.1.88.33")
    assert not is_content(received.instance)


def test_callers_at_one_time_share_transactions_and_all_get_their_own_answer(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    received = [bench.received(number) for number in range(64)]
    commits: list[str] = []
    barrier = threading.Barrier(16)

    def take(numbers: range) -> list[str]:
        barrier.wait()
        return [bench.intake.accept(received[number]).outcome for number in numbers]

    bench.store._connection.set_trace_callback(lambda sql: commits.append(sql))
    with ThreadPoolExecutor(16) as pool:
        answers = [one for many in pool.map(take, [range(n, 64, 16) for n in range(16)]) for one in many]
    assert answers == ["new"] * 64
    assert 0 < commits.count("COMMIT") < 64
    assert bench.rows("SELECT count(*), count(DISTINCT uid) FROM instance") == [(64, 64)]
    assert incoming(bench) == []


def test_two_callers_with_the_same_object_give_one_row(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    received = [bench.received(1) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        outcomes = sorted(one.outcome for one in pool.map(bench.intake.accept, received))
    assert outcomes == ["duplicate"] * 7 + ["new"]
    assert len(bench.rows("SELECT 1 FROM instance")) == 1


def test_intake_stops_before_the_disk_is_full_and_beyond_the_quota(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "a", room=Room(free_bytes=1 << 60))
    with pytest.raises(IntakeRefused, match="to stay free") as caught:
        bench.take(1)
    assert caught.value.code == "intake-disk"
    assert incoming(bench) == []
    assert bench.rows("SELECT 1 FROM study") == []
    other = Bench(tmp_path / "b", room=Room(quota_bytes=40))
    for number in range(5):
        other.take(number)  # seven bytes each
    with pytest.raises(IntakeRefused, match="at most 40 bytes"):
        other.take(6)
    other.intake.check_room(5)
    with pytest.raises(IntakeRefused, match="at most 40 bytes"):
        other.intake.check_room(6)
    free = other.intake.free_bytes()
    other.intake.room = Room(free_bytes=free // 2)
    with pytest.raises(IntakeRefused, match="to stay free"):
        other.intake.check_room(free)


def test_a_full_disk_refuses_the_object_and_takes_it_later(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kilobytes=400) as disk:
        bench = Bench(disk)
        with contextlib.closing(bench.store):
            bench.take(1)
            received = bench.received(2)
            filler = fill(disk)
            with pytest.raises(OutputError) as caught:
                bench.intake.accept(received)
            assert caught.value.code == "disk-full"
            assert bench.rows("SELECT count(*) FROM instance") == [(1,)]
            assert len(list((disk / "objects").glob("*/*"))) == 1
            bench.intake.association_closed("a1", clean=True)  # waits until it can be noted
            filler.unlink()
            assert bench.take(2).outcome == "new"
            bench.intake.note_ends()
            assert bench.rows("SELECT state FROM association") == [("released",)]


def test_a_nifti_file_is_a_study_of_its_own_by_name_and_content(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def take(name: str, content: bytes) -> tuple[str, str]:
        one = bench.received(1, data=content)
        path = one.path
        accepted = bench.intake.accept(Received("folder", "/in", path, one.sha256, one.size_bytes, name=name))
        return accepted.outcome, accepted.study

    first = take("a.nii", b"1")
    assert take("a.nii", b"1") == ("duplicate", first[1])
    assert take("b.nii", b"1")[0] == "new"
    assert take("a.nii", b"2")[0] == "new"
    bench.judge()
    assert bench.jobs() == [(1, "all", "queued")] * 3
