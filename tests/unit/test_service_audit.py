"""The audit trail: every change of a line, a cut and a swap shows; what a crash tore off is written again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dints_deploy.errors import ServiceError
from dints_deploy.service.audit import Head, Trail, record, verify_trail
from tests.service import Bench

LINES = 12


def written(folder: Path, lines: int = LINES) -> tuple[Bench, Trail]:
    """Return a bench whose trail has so many lines, exported and anchored beside the data folder."""
    bench = Bench(folder / "data")
    trail = Trail(folder / "data", folder / "anchor.json")
    trail.open(bench.store)
    more(bench, lines)
    trail.export(bench.store)
    return bench, trail


def more(bench: Bench, lines: int) -> None:
    for number in range(lines):
        with bench.store.transaction():
            record(bench.store, "test", job=f"job{number}", number=number)


def verify(folder: Path) -> Head:
    return verify_trail(folder / "data", folder / "anchor.json")


def change_a_word(lines: list[str]) -> list[str]:
    return [line.replace('"number":3', '"number":4') for line in lines]


def change_the_last_line(lines: list[str]) -> list[str]:
    return [*lines[:-1], lines[-1].replace('"test"', '"toast"')]


def swap_two(lines: list[str]) -> list[str]:
    return [lines[1], lines[0], *lines[2:]]


TAMPERED: list[Callable[[list[str]], list[str]]] = [
    change_a_word,
    change_the_last_line,
    swap_two,
    lambda lines: lines[:-1],
    lambda lines: lines[1:],
    lambda lines: [*lines[:4], *lines[5:]],
    lambda lines: [*lines[:4], "not json", *lines[5:]],
    lambda lines: [],
]


@pytest.mark.parametrize("tamper", TAMPERED)
def test_every_change_and_every_cut_shows(tamper: Callable[[list[str]], list[str]], tmp_path: Path) -> None:
    bench, trail = written(tmp_path)
    assert verify(tmp_path) == trail.head
    lines = trail.path.read_text().splitlines()
    assert len(lines) == LINES
    trail.path.write_text("".join(f"{line}\n" for line in tamper(lines)))
    with pytest.raises(ServiceError) as caught:
        verify(tmp_path)
    assert caught.value.code == "audit-broken"
    bench.store.close()


def test_a_whole_trail_that_was_written_anew_does_not_fit_the_anchor(tmp_path: Path) -> None:
    _, trail = written(tmp_path / "a")
    _, other = written(tmp_path / "b")
    trail.path.write_bytes(other.path.read_bytes())
    with pytest.raises(ServiceError, match="anchored"):
        verify(tmp_path / "a")


def test_a_daemon_does_not_start_on_a_trail_that_was_cut(tmp_path: Path) -> None:
    bench, trail = written(tmp_path)
    trail.path.write_text("\n".join(trail.path.read_text().splitlines()[:5]) + "\n")
    with pytest.raises(ServiceError, match="line 12 was anchored"):
        Trail(tmp_path / "data", tmp_path / "anchor.json").open(bench.store)


def test_a_trail_that_the_database_does_not_know_is_refused(tmp_path: Path) -> None:
    _, trail = written(tmp_path)
    empty = Bench(tmp_path / "other")
    with pytest.raises(ServiceError, match="does not know"):
        Trail(tmp_path / "data", tmp_path / "anchor.json").open(empty.store)
    assert len(trail.path.read_text().splitlines()) == LINES


@pytest.mark.parametrize("keep", [0, 1, 20])
def test_a_line_that_a_crash_tore_is_cut_off_and_written_again(keep: int, tmp_path: Path) -> None:
    bench, trail = written(tmp_path)
    more(bench, 3)
    whole = bench.rows("SELECT line FROM event WHERE seq = 13")[0][0].encode()
    with trail.path.open("ab") as file:
        file.write(whole[:keep])
    again = Trail(tmp_path / "data", tmp_path / "anchor.json")
    again.open(bench.store)
    assert again.export(bench.store) == 3
    assert [json.loads(line)["seq"] for line in trail.path.read_text().splitlines()] == list(range(1, LINES + 4))
    assert verify(tmp_path) == again.head


def test_a_crash_between_file_and_anchor_costs_nothing(tmp_path: Path) -> None:
    bench, trail = written(tmp_path)
    anchor = (tmp_path / "anchor.json").read_bytes()
    more(bench, 2)
    trail.export(bench.store)
    (tmp_path / "anchor.json").write_bytes(anchor)
    assert verify(tmp_path).seq == LINES + 2
    again = Trail(tmp_path / "data", tmp_path / "anchor.json")
    again.open(bench.store)
    more(bench, 1)
    again.export(bench.store)
    assert verify(tmp_path).seq == LINES + 3


def test_events_that_were_exported_may_be_forgotten_and_the_chain_goes_on(tmp_path: Path) -> None:
    bench, trail = written(tmp_path)
    bench.store.run("forget_events", {"exported": trail.head.seq})
    assert bench.rows("SELECT count(*) FROM event") == [(1,)]
    more(bench, 2)
    trail.export(bench.store)
    bench.reopen()
    Trail(tmp_path / "data", tmp_path / "anchor.json").open(bench.store)
    assert verify(tmp_path).seq == LINES + 2


def test_an_event_is_undone_with_its_transaction(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def half() -> None:
        with bench.store.transaction():
            record(bench.store, "test")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert bench.actions() == []
