"""Run a TensorRT plan: own buffers in pinned and device memory, three streams, two batches under way.

While one batch computes, the next one is copied to the GPU and the last one's logits come back. The logits of every
window come to the host: docs/decisions/0013-no-accumulator-on-the-device.md says when that would cost more than it
saves. A plan can execute code when it is loaded: `certified` hands over none that export did not make here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorrt as trt

from dints_deploy.errors import EngineError
from dints_deploy.runtime.cuda import Buffer, Event, Stream, select
from dints_deploy.runtime.engine import Batch, Handle, SessionInfo, check_ends, check_precision
from dints_deploy.runtime.tensorrt_log import Log, given


class TensorRtEngine:
    """TensorRT's runtime on one GPU."""

    name = "tensorrt"

    def __init__(self, *, device: str) -> None:
        self.device = device

    def open(
        self, network: bytes, *, window: Sequence[int], batch: int, precision: str, why: str = "asked for"
    ) -> TensorRtSession:
        """Load a plan for windows (i, j, k); raise `EngineError` when TensorRT does not take it.

        Args:
            network: a plan made by `build_plan` on this GPU.
            window: (i, j, k) of one window.
            batch: windows per call.
            precision: for the report; the plan has its own.
            why: why this engine was chosen.
        """
        check_precision(self.name, precision)
        select(self.device)
        log = Log()
        runtime = trt.Runtime(log)
        plan = given(runtime.deserialize_cuda_engine(network), log, "to load the plan")
        info = SessionInfo(self.name, trt.__version__, self.device, precision, why)
        return TensorRtSession(plan, log, (batch, *window), info)


class _Request:
    """One batch under way: its buffers and the points that its stages reach."""

    def __init__(self, scan: Sequence[int], logits: Sequence[int]) -> None:
        self.scan = Buffer(scan)
        self.logits = Buffer(logits)
        self.uploaded, self.computed, self.downloaded = Event(), Event(), Event()


class TensorRtSession:
    """A loaded plan with its buffers and streams."""

    under_way = 2

    def __init__(self, plan: trt.ICudaEngine, log: Log, sizes: tuple[int, ...], info: SessionInfo) -> None:
        self._plan, self._log, self.info = plan, log, info
        self._scan, self._logits = _ends(plan)
        self._context = given(plan.create_execution_context(), log, "to make room for the plan's layers")
        batch, *window = sizes
        shape = (batch, plan.get_tensor_shape(self._scan)[1], *window)
        if not self._context.set_input_shape(self._scan, shape):
            raise log.failed(f"to have a plan for batches of {shape}")
        found = self._context.get_tensor_shape(self._logits)
        logits = [int(found[axis]) for axis in range(len(found))]
        self._upload, self._compute, self._download = Stream(), Stream(), Stream()
        self._requests = [_Request(shape, logits) for _ in range(self.under_way)]
        self._next = 0

    def submit(self, batch: Batch) -> Handle:
        """Start a batch and return at once; at most `under_way` may be."""
        select(self.info.device)
        request = self._requests[self._next]
        self._next = (self._next + 1) % self.under_way
        if batch.shape != request.scan.host.shape:
            raise EngineError(
                "engine-failed", f"expected a batch of {request.scan.host.shape}, found {batch.shape}: open it for this"
            )
        np.copyto(request.scan.host, batch)
        request.scan.upload(self._upload)
        request.uploaded.record(self._upload)
        self._compute.wait_for(request.uploaded)
        self._context.set_tensor_address(self._scan, request.scan.device)
        self._context.set_tensor_address(self._logits, request.logits.device)
        if not self._context.execute_async_v3(self._compute.handle):
            raise self._log.failed("to run the plan")
        request.computed.record(self._compute)
        self._download.wait_for(request.computed)
        request.logits.download(self._download)
        request.downloaded.record(self._download)
        return request

    def result(self, handle: Handle) -> Batch:
        """Wait for a batch and return a copy of its logits (N, classes, I, J, K)."""
        select(self.info.device)
        request: _Request = handle
        request.downloaded.synchronize()
        return request.logits.host.copy()

    def memory_bytes(self) -> int:
        """Return what layers and buffers take on the device; the weights come on top, TensorRT does not tell them."""
        buffers = sum(request.scan.nbytes + request.logits.nbytes for request in self._requests)
        return int(self._plan.device_memory_size_v2) + buffers


def _ends(plan: trt.ICudaEngine) -> tuple[str, str]:
    """Return the names of the plan's input and output, both float32.

    Raises:
        EngineError: `engine-failed`.
    """
    names = [plan.get_tensor_name(n) for n in range(plan.num_io_tensors)]
    scans = [name for name in names if plan.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    logits = [name for name in names if plan.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
    check_ends(len(scans), len(logits))
    if any(plan.get_tensor_dtype(name) != trt.float32 for name in names):
        raise EngineError("engine-failed", "expected a plan with float32 at both ends, found another: export it again")
    return scans[0], logits[0]
