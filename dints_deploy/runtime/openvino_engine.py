"""Run a network with OpenVINO on the CPU. Its default precision on many CPUs is bfloat16: here it is always set."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any, Final

from dints_deploy.errors import EngineError
from dints_deploy.runtime.engine import Batch, Handle, SessionInfo, check_ends, check_precision, engine_error
from dints_deploy.runtime.machine import BF16_FEATURES, cpu_features

# `import openvino` loads its model converter, which sends a usage event over the network. Nothing leaves this machine:
# the converter is not needed, so it is not found. The import is a third quicker as well.
sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]
import openvino  # noqa: E402

HINTS: Final = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
"""Precision -> OpenVINO's inference precision."""


class OpenVinoEngine:
    """OpenVINO's CPU plugin.

    Args:
        threads: of all windows together; 0 for all of the machine's.
        at_once: windows that compute at a time, each on its share of the threads.
        fewer_products: write large fp32 convolutions with fewer multiplications, for a longer start.
    """

    name = "openvino"

    def __init__(self, *, threads: int = 0, at_once: int = 1, fewer_products: bool = False) -> None:
        self.threads = threads
        self.at_once = at_once
        self.fewer_products = fewer_products

    def open(
        self, network: bytes, *, window: Sequence[int], batch: int, precision: str, why: str = "asked for"
    ) -> OpenVinoSession:
        """Compile a network for one window size; raise `EngineError` when OpenVINO cannot, or not in this precision."""
        check_precision(self.name, precision)
        hint = _hint(precision)
        settings = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": self.at_once,
        }
        try:
            core = _core()
            model = core.read_model(network, b"")
            check_ends(len(model.inputs), len(model.outputs))
            channels = model.input(0).partial_shape[1]
            model.reshape([batch, channels, *window])
            saved = self._rewrite(model) if precision == "fp32" else 0.0
            compiled = core.compile_model(model, "CPU", settings)
        except (RuntimeError, TypeError, MemoryError) as error:
            raise engine_error("OpenVINO to load the network", _first(error)) from error
        told = str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
        if told != hint:
            raise EngineError(
                "engine-failed",
                f"expected OpenVINO to compute in {hint} here, found {told}: use another --precision",
            )
        if saved:
            why += f"; {saved / 1e9:.0f} GMAC of a window saved (Winograd's convolutions)"
        info = SessionInfo(self.name, openvino.__version__.split("-")[0], "cpu", precision, why, saved)
        return OpenVinoSession(compiled, info, under_way=self.at_once + 1)

    def _rewrite(self, model: Any) -> float:
        """Return the multiplications per window that a network is rewritten to save."""
        if not self.fewer_products:
            return 0.0
        from dints_deploy.runtime.openvino_winograd import with_fewer_products

        return with_fewer_products(model)


def _hint(precision: str) -> str:
    """Return OpenVINO's inference precision; for int8 that of what the file does not quantise.

    Where the processor computes in bf16 that is bf16: the convolutions at the ends, which stay in floating point, took
    most of an int8 window's time in f32 (docs/decisions/0014-int8-beside-bf16.md).
    """
    if precision == "int8":
        return "bf16" if BF16_FEATURES & set(cpu_features()) else "f32"
    return HINTS[precision]


@functools.cache
def _core() -> Any:
    """Return the one OpenVINO core of this process.

    Each core that compiles for the CPU takes over the thread's alternate signal stack and gives it back when it ends.
    Of several, those that end in another order than they began leave a freed stack behind, and the next signal kills
    the process (2026.4: an ensemble, then Ctrl-C).
    """
    return openvino.Core()


class OpenVinoSession:
    """A compiled network with a ring of requests: those that compute, and one whose input is there already."""

    def __init__(self, compiled: Any, info: SessionInfo, *, under_way: int) -> None:
        self._requests = [compiled.create_infer_request() for _ in range(under_way)]
        self._next = 0
        self.info = info
        self.under_way = under_way

    def submit(self, batch: Batch) -> Handle:
        """Start a batch; at most `under_way` may be."""
        request = self._requests[self._next]
        self._next = (self._next + 1) % self.under_way
        try:
            request.start_async([batch], share_inputs=False)
        except (RuntimeError, MemoryError) as error:
            raise engine_error("OpenVINO to run the network", _first(error)) from error
        return request

    def result(self, handle: Handle) -> Batch:
        """Wait for a batch and return a copy of its logits."""
        try:
            handle.wait()
            logits: Batch = handle.get_output_tensor(0).data.copy()
        except (RuntimeError, MemoryError) as error:
            raise engine_error("OpenVINO to run the network", _first(error)) from error
        return logits

    def memory_bytes(self) -> int:
        """OpenVINO does not tell."""
        return 0


def _first(error: Exception) -> str:
    """Return the first telling line of an OpenVINO message, which quotes source files around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = (line for line in lines if not line.startswith(("Exception from", "Check '")))
    return next(told, type(error).__name__)
