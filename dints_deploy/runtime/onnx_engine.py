"""Run a network with ONNX Runtime: on any CPU, or on CUDA where onnxruntime-gpu is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnxruntime

from dints_deploy.errors import EngineError
from dints_deploy.runtime.engine import Batch, Handle, SessionInfo, check_ends, check_precision


class OnnxEngine:
    """ONNX Runtime; the session computes in the types that the ONNX file names (fp32)."""

    name = "onnx"

    def __init__(self, *, device: str = "cpu", threads: int = 0) -> None:
        self.device = device
        self.threads = threads

    def open(
        self, network: bytes, *, window: Sequence[int], batch: int, precision: str, why: str = "asked for"
    ) -> OnnxSession:
        """Load a network; raise `EngineError` when ONNX Runtime cannot, or the precision has no certificate."""
        check_precision(self.name, precision)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 4  # errors come as exceptions
        providers = self._providers()
        try:
            session = onnxruntime.InferenceSession(network, options, providers=providers)
        except Exception as error:  # ONNX Runtime's own exceptions are not public
            raise EngineError(
                "engine-failed", f"expected ONNX Runtime to load the network, found: {_line(error)}"
            ) from error
        check_ends(len(session.get_inputs()), len(session.get_outputs()))
        info = SessionInfo(self.name, onnxruntime.__version__, self.device, precision, why)
        return OnnxSession(session, info)

    def _providers(self) -> list[Any]:
        if self.device == "cpu":
            return ["CPUExecutionProvider"]
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise EngineError(
                "engine-missing", f"expected ONNX Runtime with CUDA for {self.device}: pip install 'dints-deploy[gpu]'"
            )
        options = {"device_id": int(self.device.removeprefix("cuda:")), "use_tf32": 0}
        return [("CUDAExecutionProvider", options)]


class OnnxSession:
    """A loaded network; ONNX Runtime computes when the batch is submitted."""

    def __init__(self, session: Any, info: SessionInfo) -> None:
        self._session = session
        self._input: str = session.get_inputs()[0].name
        self.info = info

    def submit(self, batch: Batch) -> Handle:
        """Run a batch now; the handle is its result."""
        try:
            return self._session.run(None, {self._input: batch})[0]
        except Exception as error:  # ONNX Runtime's own exceptions are not public
            raise EngineError(
                "engine-failed", f"expected ONNX Runtime to run the network, found: {_line(error)}"
            ) from error

    def result(self, handle: Handle) -> Batch:
        """Return the logits of a submitted batch."""
        logits: Batch = handle
        return logits

    def memory_bytes(self) -> int:
        """ONNX Runtime does not tell."""
        return 0


def _line(error: Exception) -> str:
    """Return ONNX Runtime's message in one line."""
    return " ".join(str(error).split())
