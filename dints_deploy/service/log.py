"""Structured log lines: one JSON object each, a fixed sentence with fields, and nothing that identifies a patient.

A message is a constant; what varies stands in fields (`action`, `job`, `code`, numbers). Of an exception its kind and
place are written, never its text, which may quote a file. Other packages' records are dropped: they quote what peers
say.
"""

from __future__ import annotations

import json
import logging
import traceback
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from typing import Any, Final

from dints_deploy.config.appliance import Log
from dints_deploy.errors import DintsError, UsageError

PACKAGE: Final = "dints_deploy"

FRAMES: Final = 4
"""Innermost frames of a traceback that are written."""

STANDARD: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
"""What every record has; the rest are fields."""


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.msg,
            "where": record.name.removeprefix(f"{PACKAGE}."),
        }
        fields |= {key: _plain(value) for key, value in record.__dict__.items() if key not in STANDARD}
        if record.exc_info and record.exc_info[1] is not None:
            fields["exception"] = _exception(record.exc_info[1])
        return json.dumps(fields)


def configure(log: Log) -> None:
    """Send this package's records to standard error, or to a file that may be rotated, and drop all others.

    Raises:
        UsageError: `config-invalid` where the file cannot be written.
    """
    try:
        handler = logging.StreamHandler() if log.file is None else WatchedFileHandler(log.file, encoding="utf-8")
    except OSError as error:
        found = error.strerror or type(error).__name__
        raise UsageError("config-invalid", f"expected to write the log {log.file}, found: {found}") from error
    handler.setFormatter(JsonLines())
    ours = logging.getLogger(PACKAGE)
    for old in list(ours.handlers):
        ours.removeHandler(old)
        old.close()
    ours.addHandler(handler)
    ours.setLevel(log.level.upper())
    ours.propagate = False
    logging.getLogger().addHandler(logging.NullHandler())  # without one, Python prints others' warnings itself


def _plain(value: object) -> object:
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _exception(error: BaseException) -> dict[str, Any]:
    """Return the kind of an exception, its reason code, and where it came from."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    found: dict[str, Any] = {"kind": type(error).__name__}
    if isinstance(error, DintsError):
        found["code"] = error.code
    if isinstance(error, OSError) and error.errno is not None:
        found["errno"] = error.errno
    found["at"] = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames]
    return found
