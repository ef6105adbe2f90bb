"""Run a network with ONNX Runtime: on any CPU; on a GPU by its CUDA provider, or by its TensorRT provider.

A provider that cannot start is replaced by the CPU without a word; here that is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import onnxruntime

from dints_deploy.errors import EngineError
from dints_deploy.files import make_private_folder, state_folder
from dints_deploy.runtime.engine import Batch, Handle, SessionInfo, check_ends, check_precision, engine_error

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"


class OnnxEngine:
    """ONNX Runtime; the session computes in the types that the ONNX file names."""

    def __init__(self, *, device: str = "cpu", threads: int = 0, compiled: bool = False) -> None:
        self.name = "onnx-trt" if compiled else "onnx"
        self.device = device
        self.threads = threads
        self.provider = CPU if device == "cpu" else TENSORRT if compiled else CUDA

    def open(
        self, network: bytes, *, window: Sequence[int], batch: int, precision: str, why: str = "asked for"
    ) -> OnnxSession:
        """Load a network; raise `EngineError` when ONNX Runtime cannot, or not on this device."""
        check_precision(self.name, precision)
        if self.provider not in onnxruntime.get_available_providers():
            raise EngineError(
                "engine-missing",
                f"expected ONNX Runtime with {self.provider} for {self.device}: pip install 'dints-deploy[gpu]'",
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 4  # errors come as exceptions
        # Threads that wait leave their core: a first window is quicker, later ones are the same, a busy machine gains.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(network, options, providers=self._providers())
        except Exception as error:  # ONNX Runtime's own exceptions are not public
            raise engine_error("ONNX Runtime to load the network", _line(error)) from error
        if session.get_providers()[0] != self.provider:
            raise EngineError(
                "engine-missing",
                f"expected {self.provider} on {self.device}, found it not to start: see dints-deploy doctor",
            )
        check_ends(len(session.get_inputs()), len(session.get_outputs()))
        return OnnxSession(session, SessionInfo(self.name, onnxruntime.__version__, self.device, precision, why))

    def _providers(self) -> list[Any]:
        """Return the providers in order: what the first cannot run goes to the next."""
        if self.provider == CPU:
            return [CPU]
        number = int(self.device.removeprefix("cuda:"))
        cuda = (CUDA, {"device_id": number, "use_tf32": 0})
        if self.provider == CUDA:
            return [cuda, CPU]
        settings = {"device_id": number, "trt_engine_cache_enable": True, "trt_engine_cache_path": str(plan_folder())}
        return [(TENSORRT, settings), cuda, CPU]


def plan_folder() -> Path:
    """Return the folder for ONNX Runtime's TensorRT plans, which can execute code when they are loaded.

    Raises:
        EngineError: `state-permissions` when another user owns one, or it is a link. OutputError: it cannot be made.
    """
    from dints_deploy.runtime.certificate import check_owner  # of no use on a CPU, where the start is to be quick

    make_private_folder(state_folder())
    folder = make_private_folder(make_private_folder(state_folder() / "engines") / "onnx-trt")
    for plan in folder.iterdir():
        check_owner(plan, forbidden=0)  # ONNX Runtime writes them as the umask says; the folder keeps others out
    return folder


class OnnxSession:
    """A loaded network; ONNX Runtime computes when the batch is submitted."""

    under_way = 2

    def __init__(self, session: Any, info: SessionInfo) -> None:
        self._session = session
        self._input: str = session.get_inputs()[0].name
        self.info = info

    def submit(self, batch: Batch) -> Handle:
        """Run a batch now; the handle is its result."""
        try:
            return self._session.run(None, {self._input: batch})[0]
        except Exception as error:  # ONNX Runtime's own exceptions are not public
            raise engine_error("ONNX Runtime to run the network", _line(error)) from error

    def result(self, handle: Handle) -> Batch:
        """Return the logits of a submitted batch."""
        logits: Batch = handle
        return logits

    def memory_bytes(self) -> int:
        """ONNX Runtime does not tell."""
        return 0


def _line(error: Exception) -> str:
    """Return ONNX Runtime's message in one line, or the error's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
