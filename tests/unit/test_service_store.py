"""The database: transitions as the tables say, migration in one step, damage named, a clock that cannot jump."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dints_deploy.errors import ServiceError
from dints_deploy.service.clock import Clock, continued
from dints_deploy.service.states import TABLES
from dints_deploy.service.store import DATABASE, HERE, open_store, queries, statements
from tests.service import Bench, Time

ROWS = {
    "study": "INSERT INTO study (id, key, kind, state, revision, changes, arrived_s, due_s, reason)"
    " VALUES (1, 'k', 'dicom', ?, 0, 0, 0, 0, '')",
    "job": "INSERT INTO job (id, study_id, revision, route, entry, outputs, send_refusals, priority, state, created_s,"
    " created_at, due_s) VALUES ('j', 1, 1, 'r', 'e', '[]', 0, 0, ?, 0, '', 0)",
    "delivery": "INSERT INTO delivery (job_id, destination, state) VALUES ('j', 'd', ?)",
}
PAIRS = [(table, a, b) for table, (states, _) in TABLES.items() for a, b in product(states, states)]


def transition_is_accepted(bench: Bench, table: str, before: str, after: str) -> bool:
    execute = bench.store._connection.execute
    execute("BEGIN")
    try:
        for name, insert in ROWS.items():
            execute(insert, (before if name == table else next(iter(TABLES[name][0])),))
        execute(f"UPDATE {table} SET state = ?", (after,))
    except sqlite3.IntegrityError:
        return False
    finally:
        execute("ROLLBACK")
    return True


def test_the_database_makes_exactly_the_transitions_of_the_tables(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    accepted = {pair for pair in PAIRS if transition_is_accepted(bench, *pair)}
    same = {(table, state, state) for table, (states, _) in TABLES.items() for state in states}
    assert accepted == same | {(table, a, b) for table, (_, allowed) in TABLES.items() for a, b in allowed}


def test_every_state_can_be_reached_and_every_transition_joins_known_states() -> None:
    for states, transitions in TABLES.values():
        assert {state for pair in transitions for state in pair} <= set(states)
        first = next(iter(states))
        reached = {first}
        while more := {b for a, b in transitions if a in reached} - reached:
            reached |= more
        assert reached == set(states)


def test_every_named_query_is_one_statement_that_the_schema_knows(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    names: dict[str, object] = {}
    for query in queries().values():
        assert len(list(statements(query))) == 1
        values = {word.strip(",;()"): None for word in query.replace("(:", " :").split() if word.startswith(":")}
        names |= {key[1:].partition(",")[0].partition(")")[0]: None for key in values}
    for query in queries().values():
        bench.store._connection.execute(f"EXPLAIN {query}", names)


def old_database(path: Path, version: int) -> None:
    """Write a database as an earlier program did, with a study in it."""
    connection = sqlite3.connect(path)
    for step in sorted((HERE / "migrations").glob("*.sql"))[:version]:
        connection.executescript(step.read_text())
    connection.execute(ROWS["study"], ("complete",))
    connection.execute(ROWS["job"], ("done",))
    connection.execute(f"PRAGMA user_version = {version}")
    connection.commit()
    connection.close()


def schema(path: Path) -> set[str]:
    connection = sqlite3.connect(path)
    found = {row[0] for row in connection.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")}
    connection.close()
    return found


def test_an_old_database_is_migrated_with_its_rows_to_the_schema_of_a_new_one(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    old_database(tmp_path / "old" / DATABASE, 1)
    old, new = open_store(tmp_path / "old"), open_store(tmp_path / "new")
    assert [tuple(row) for row in old.rows("jobs_of_study", {"study": 1})] == [("j", "done")]
    row = old.row("study", {"id": 1})
    assert row is not None
    assert row["purge"] == 0
    old.close()
    new.close()
    assert schema(tmp_path / "old" / DATABASE) == schema(tmp_path / "new" / DATABASE)


def test_a_migration_that_fails_leaves_the_old_database_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / DATABASE
    old_database(path, 1)
    connection = sqlite3.connect(path)
    connection.execute("ALTER TABLE study ADD COLUMN purge TEXT")  # the second statement of the next step fails
    connection.commit()
    connection.close()
    before = schema(path)
    with pytest.raises(ServiceError, match="duplicate column") as caught:
        open_store(tmp_path)
    assert caught.value.code == "store-failed"
    assert schema(path) == before


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    connection = sqlite3.connect(tmp_path / DATABASE)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ServiceError, match="found version 99") as caught:
        open_store(tmp_path)
    assert caught.value.code == "store-newer"


@pytest.mark.parametrize("page", [2, 5, 9])
def test_a_damaged_page_is_found_and_named(page: int, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(bench.take, range(80)))
    bench.store.close()
    with (tmp_path / DATABASE).open("rb+") as file:
        file.seek(4096 * (page - 1))
        file.write(b"\xa5" * 4096)
    with pytest.raises(ServiceError, match=r"malformed|page|Tree|missing|index") as caught:
        open_store(tmp_path)
    assert caught.value.code == "store-corrupt"
    assert DATABASE in caught.value.message


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"not a database at all" * 400)
    with pytest.raises(ServiceError, match="not a database") as caught:
        open_store(tmp_path)
    assert caught.value.code == "store-corrupt"
    assert (tmp_path / DATABASE).read_bytes().startswith(b"not a database")


def test_what_a_transaction_did_is_undone_when_it_raises(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def half() -> None:
        with bench.store.transaction() as store:
            store.run("open_association", {"id": "a"})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert bench.rows("SELECT * FROM association") == []


def test_a_transaction_survives_a_process_that_ends_at_once(tmp_path: Path) -> None:
    """What another connection reads was written, not only promised: the log file has it before the call returns."""
    bench = Bench(tmp_path)
    assert bench.rows("PRAGMA synchronous") == [(2,)]
    assert bench.rows("PRAGMA journal_mode") == [("wal",)]
    bench.take(1)
    other = sqlite3.connect(tmp_path / DATABASE)
    assert other.execute("SELECT count(*) FROM instance").fetchone() == (1,)
    other.close()


BOOTS = st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e7), st.booleans()), min_size=1, max_size=8)


@given(BOOTS)
def test_the_clock_never_goes_back_over_restarts_and_reboots(boots: list[tuple[float, float, bool]]) -> None:
    """Each entry: seconds that pass, seconds since boot after a reboot, whether there was a reboot."""
    stored: tuple[str, float] | None = None
    newest, time = 0.0, Time(0.0, "first")
    for number, (passed, start, reboot) in enumerate(boots):
        if reboot:
            time.name, time.seconds = f"boot-{number}", start
        clock = continued(time.boot(), stored, newest)
        assert clock.now() >= newest - 1e-6
        time.seconds += passed
        stored, newest = (time.name, clock.offset_s), max(newest, clock.now())


def test_the_clock_goes_on_while_the_daemon_is_down_and_stands_still_over_a_reboot(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Time(500.0))
    bench.take(1)
    before = bench.store.clock.now()
    bench.time.seconds += 100
    bench.reopen()
    assert bench.store.clock.now() == pytest.approx(before + 100)
    bench.take(2)
    bench.time.seconds, bench.time.name = 7.0, "boot-2"
    bench.reopen()
    assert bench.store.clock.now() == pytest.approx(before + 100)


def test_the_wall_clock_decides_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    now = bench.store.clock.now()
    jumped = Clock(bench.store.clock.boot, bench.store.clock.offset_s, wall=lambda: datetime.max)
    assert jumped.now() == now
