"""What TensorRT says: errors are kept for the exception, the rest is dropped."""

from __future__ import annotations

from typing import TypeVar

import tensorrt as trt

from dints_deploy.errors import EngineError
from dints_deploy.runtime.engine import engine_error

T = TypeVar("T")


class Log(trt.ILogger):
    """Keeps TensorRT's errors."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Keep an error's message."""
        if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
            self.errors.append(" ".join(msg.split()))

    def failed(self, expected: str) -> EngineError:
        """Return the error for a call that gave nothing: `engine-memory` or `engine-failed`."""
        return engine_error(f"TensorRT {expected}", "; ".join(self.errors) or "no message")


def given(result: T | None, log: Log, expected: str) -> T:
    """Return what a call of TensorRT gave; raise `EngineError` where it gave None, which is how TensorRT fails."""
    if result is None:
        raise log.failed(expected)
    return result
