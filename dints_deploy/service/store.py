"""The SQLite file that holds what the daemon knows: opening, checking, migrating, transactions, named queries.

WAL with synchronous=FULL: a transaction that returned is on disk. One connection per process, used by one thread at a
time; the command line's `jobs` works on the same file from another process.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

from dints_deploy.errors import DintsError, OutputError, ServiceError
from dints_deploy.service.clock import Boot, Clock, continued, this_boot
from dints_deploy.service.states import TABLES, trigger

DATABASE: Final = "appliance.sqlite"
APPLICATION_ID: Final = 0x64696E74
"""Marks the file as ours in its header ("dint")."""

BUSY_SECONDS: Final = 30.0
"""How long a transaction waits for another process's."""

HERE: Final = Path(__file__).parent

Row = sqlite3.Row
Values = Mapping[str, Any]


class Store:
    """An open database.

    Attributes:
        clock: the appliance's clock, continued from the database.
    """

    def __init__(self, connection: sqlite3.Connection, clock: Clock) -> None:
        self._connection = connection
        self._lock = threading.RLock()
        self.clock = clock

    @contextmanager
    def transaction(self) -> Iterator[Store]:
        """Run a block as one transaction: durable when it returns, undone when it raises.

        Raises:
            OutputError: `disk-full`. ServiceError: `store-failed`, `store-corrupt`.
        """
        with self._lock, _named_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def run(self, query: str, values: Values | None = None) -> int:
        """Run a named query and return how many rows it changed."""
        with self._lock, _named_errors():
            return self._connection.execute(queries()[query], values or {}).rowcount

    def rows(self, query: str, values: Values | None = None) -> list[Row]:
        """Run a named query and return its rows."""
        with self._lock, _named_errors():
            return self._connection.execute(queries()[query], values or {}).fetchall()

    def row(self, query: str, values: Values | None = None) -> Row | None:
        """Run a named query and return its first row, if it has one."""
        found = self.rows(query, values)
        return found[0] if found else None

    def close(self) -> None:
        """Close the database; the write-ahead log is merged into it."""
        with self._lock:
            self._connection.close()


@cache
def queries() -> dict[str, str]:
    """Return name -> SQL of `queries.sql`: each query follows a line `-- name`, and comments in parentheses."""
    found: dict[str, str] = {}
    name = ""
    for line in (HERE / "queries.sql").read_text(encoding="utf-8").splitlines():
        if line.startswith("-- ") and not line.startswith("-- ("):
            name = line.removeprefix("-- ").strip()
            found[name] = ""
        elif name:
            found[name] += line + "\n"
    return found


def open_store(data_dir: Path, *, boot: Boot | None = None, check: bool = True) -> Store:
    """Open the database of a data folder, make or migrate it, and continue its clock.

    Args:
        check: read every page first; the daemon does at its start.

    Raises:
        ServiceError: `store-corrupt` with the place; `store-newer`; `store-failed`. OutputError: `disk-full`.
    """
    path = data_dir / DATABASE
    with _named_errors(path):
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            path.chmod(0o600)
            connection.row_factory = sqlite3.Row
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF"):
                connection.execute(f"PRAGMA {pragma}")
            if check:
                _check(connection, path)
            _migrate(connection, path)
            for table in TABLES:
                connection.execute(trigger(table))
            return Store(connection, _continue_clock(connection, boot or this_boot()))
        except BaseException:
            connection.close()
            raise


def _check(connection: sqlite3.Connection, path: Path) -> None:
    found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(10)")]
    found += [f"row {row[1]} of {row[0]} refers to nothing" for row in connection.execute("PRAGMA foreign_key_check")]
    if found != ["ok"]:
        raise _corrupt(path, " ".join(found).replace("\n", " "))


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the schema up to this program's version, and record it, in one transaction."""
    steps = sorted((HERE / "migrations").glob("*.sql"))
    if connection.execute("PRAGMA user_version").fetchone()[0] == len(steps):
        return
    connection.execute("BEGIN EXCLUSIVE")
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(steps):
            found = f"found version {version}: run the newer software, or restore a backup"
            raise ServiceError("store-newer", f"expected a database of version {len(steps)} or less at {path}, {found}")
        for step in steps[version:]:
            for statement in statements(step.read_text(encoding="utf-8")):
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(steps)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def statements(script: str) -> Iterator[str]:
    """Yield the statements of a script one by one: `executescript` would commit in between."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _continue_clock(connection: sqlite3.Connection, boot: Boot) -> Clock:
    stored = connection.execute("SELECT boot, offset_s FROM clock").fetchone()
    (newest_s,) = connection.execute(queries()["newest_time"]).fetchone()
    clock = continued(boot, None if stored is None else (stored["boot"], stored["offset_s"]), newest_s)
    if stored is None or stored["boot"] != boot.name:
        connection.execute(
            "INSERT INTO clock VALUES (1, ?, ?) ON CONFLICT (id) DO UPDATE SET boot = ?, offset_s = ?",
            (boot.name, clock.offset_s) * 2,
        )
    return clock


@contextmanager
def _named_errors(path: Path | None = None) -> Iterator[None]:
    """Turn SQLite's errors into ours."""
    try:
        yield
    except sqlite3.Error as error:
        raise _named(error, path) from error


def _named(error: sqlite3.Error, path: Path | None) -> DintsError:
    where = DATABASE if path is None else str(path)
    code = getattr(error, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_FULL:
        return OutputError("disk-full", f"expected room for {where}, found the disk full: free some space")
    primary = None if code is None else code & 0xFF
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return _corrupt(Path(where), str(error))
    return ServiceError("store-failed", f"expected to use the database {where}, found: {error}: see the log")


def _corrupt(path: Path, found: str) -> ServiceError:
    advice = "stop using the disk, move the file away and restore a backup"
    return ServiceError("store-corrupt", f"expected a sound database at {path}, found: {found}: {advice}")
