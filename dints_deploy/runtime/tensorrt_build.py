"""Build a TensorRT 11 plan of an ONNX network for one GPU.

Networks are strongly typed in TensorRT 11: precision is what the ONNX file says, so fp16 and INT8 are made there
(`half`, `quantise`). TF32 is switched off: fp32 means fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, SupportsInt

import tensorrt as trt

from dints_deploy.errors import EngineError
from dints_deploy.files import make_private_folder, state_folder, write_bytes
from dints_deploy.runtime.certificate import check_owner, engines_folder
from dints_deploy.runtime.cuda import describe_gpu, select
from dints_deploy.runtime.engine import MOST_PER_CALL, check_ends
from dints_deploy.runtime.operators import complaints
from dints_deploy.runtime.pipeline import interrupts_held
from dints_deploy.runtime.tensorrt_log import Log, given

Progress = Callable[[str, int, int], None]

BATCHES: Final = (1, 2, MOST_PER_CALL)
"""Least, usual and most windows per call that a plan is made for."""


def build_plan(network: bytes, window: Sequence[int], *, device: str, progress: Progress) -> bytes:
    """Return the plan of an ONNX network for windows (i, j, k) on a device cuda:N.

    Args:
        network: ONNX, typed as it is to compute.
        window: (i, j, k) of one window.
        device: cuda:N.
        progress: called with (phase, steps done, steps in all).

    Raises:
        EngineError: `engine-failed` with what TensorRT does not take, `engine-memory`, or `engine-missing`.
    """
    if found := complaints(network):
        raise EngineError("engine-failed", f"expected operators that TensorRT takes, found {'; '.join(found)}")
    select(device)
    log = Log()
    builder = trt.Builder(log)
    definition = builder.create_network()
    _parse(network, definition, log)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.add_optimization_profile(_profile(builder, definition, window))
    cache_path = timing_cache_path(device)
    cache = config.create_timing_cache(_cached(cache_path))
    config.set_timing_cache(cache, ignore_mismatch=False)
    with interrupts_held() as let_through:
        monitor = Monitor(progress, let_through)
        config.progress_monitor = monitor  # `monitor` outlives the build, as TensorRT demands
        plan = given(builder.build_serialized_network(definition, config), log, "to build a plan")
    make_private_folder(state_folder())
    make_private_folder(engines_folder())
    write_bytes(cache_path, bytes(memoryview(config.get_timing_cache().serialize())))
    return bytes(memoryview(plan))


def _parse(network: bytes, definition: trt.INetworkDefinition, log: Log) -> None:
    parser = trt.OnnxParser(definition, log)
    if not parser.parse(network):
        told = "; ".join(str(parser.get_error(n)) for n in range(parser.num_errors))
        raise EngineError("engine-failed", f"expected TensorRT to read the network, found: {' '.join(told.split())}")
    check_ends(definition.num_inputs, definition.num_outputs)


def _profile(
    builder: trt.Builder, definition: trt.INetworkDefinition, window: Sequence[int]
) -> trt.IOptimizationProfile:
    """Return the shapes that the plan is made for: one window size, a few batch sizes."""
    scan = definition.get_input(0)
    least, usual, most = (trt.Dims((batch, scan.shape[1], *window)) for batch in BATCHES)
    profile = builder.create_optimization_profile()
    profile.set_shape(scan.name, least, usual, most)
    return profile


def timing_cache_path(device: str) -> Path:
    """Return where the timings of kernels on this GPU lie; they make the next build quicker."""
    model = "".join(c if c.isalnum() else "-" for c in describe_gpu(device))
    return engines_folder() / f"timing-{trt.__version__}-{model}.cache"


def _cached(path: Path) -> bytes:
    """Return the timings of earlier builds; none where there are none, or others could have written them."""
    try:
        check_owner(path, forbidden=0o022)
        return path.read_bytes()
    except (OSError, EngineError):
        return b""


class Monitor(trt.IProgressMonitor):
    """Passes the steps of the outermost phases on, and ends the build at Ctrl-C: C++ takes no exception from here."""

    def __init__(self, progress: Progress, let_through: Callable[[], None]) -> None:
        trt.IProgressMonitor.__init__(self)
        self._progress = progress
        self._let_through = let_through
        self._steps: dict[str, int] = {}

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt) -> None:
        """Note an outermost phase."""
        if not parent_phase:
            self._steps[phase_name] = int(num_steps)

    def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
        """Report a step; say whether the build goes on."""
        try:
            self._let_through()
        except KeyboardInterrupt:
            return False
        if phase_name in self._steps:
            self._progress(phase_name, int(step) + 1, self._steps[phase_name])
        return True

    def phase_finish(self, phase_name: str) -> None:
        """Forget a phase."""
        self._steps.pop(phase_name, None)
