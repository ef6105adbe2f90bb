"""Shared fixtures, and the rule about skipped tests: in a strict run each needs its line in allowed_skips.txt."""

from __future__ import annotations

import fnmatch
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SKIPPED: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        SKIPPED.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        SKIPPED.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get("DINTS_STRICT_SKIPS") != "1":
        return
    lines = (HERE / "allowed_skips.txt").read_text().splitlines()
    patterns = [line.split("  ")[0] for line in lines if line and not line.startswith("#")]
    unknown = [name for name in SKIPPED if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    for name in unknown:
        sys.stderr.write(f"\nskipped without a line in tests/allowed_skips.txt: {name}\n")
    if unknown:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def data() -> Path:
    """The small real data that comes with the project."""
    return HERE / "data"


@pytest.fixture(scope="session")
def big_data() -> Path:
    """The large real data beside the project: $DINTS_DATA, or ../shared/data; without it the test is skipped."""
    folder = Path(os.environ.get("DINTS_DATA", HERE.parents[1] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no large data at {folder}: set DINTS_DATA")
    return folder
