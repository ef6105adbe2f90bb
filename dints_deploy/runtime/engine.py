"""The seam between the window loop and what runs a network: one Engine per way of running, one Session per network.

`open(network, window, batch, precision) -> Session`, `submit(host batch) -> Handle`, `result(handle)`. Precision is
always set explicitly, and the session says which one runs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dints_deploy.errors import EngineError, UsageError

Batch = NDArray[np.float32]
"""(N, C, I, J, K)."""

Handle = Any
Precision = Literal["fp32", "bf16", "fp16", "int8"]
PRECISIONS: Final = ("fp32", "bf16", "fp16", "int8")


@dataclass(frozen=True)
class SessionInfo:
    """What really runs, for the report.

    Attributes:
        engine: openvino, onnx, torch ...
        version: of the engine's package.
        device: CPU, cuda:0 ...
        precision: that the engine was told to compute in.
        why: why this engine was chosen.
        products_saved: multiplications per window that a rewritten network does without; 0 where it runs as it is.
    """

    engine: str
    version: str
    device: str
    precision: str
    why: str = ""
    products_saved: float = 0.0


class Session(Protocol):
    """A network that is ready to run on batches of windows.

    Attributes:
        under_way: batches that may be submitted before the oldest is waited for.
    """

    info: SessionInfo
    under_way: int

    def submit(self, batch: Batch) -> Handle:
        """Start a batch (N, C, I, J, K) and return at once; at most `under_way` may be."""
        ...

    def result(self, handle: Handle) -> Batch:
        """Wait for a batch and return its logits (N, classes, I, J, K) float32."""
        ...

    def memory_bytes(self) -> int:
        """Return what the network holds on its device, as far as the engine tells; 0 where it does not."""
        ...


class Engine(Protocol):
    """A way of running networks."""

    name: str

    def open(self, network: bytes, *, window: Sequence[int], batch: int, precision: str, why: str) -> Session:
        """Load an ONNX network for windows (i, j, k) and batches of `batch`.

        Raises:
            EngineError: `engine-failed` or `engine-memory`. UsageError: the engine has no such precision.
        """
        ...


PACKAGES: Final = {
    "openvino": "openvino",
    "onnx": "onnxruntime",
    "onnx-trt": "onnxruntime",
    "tensorrt": "tensorrt",
}
"""Engine -> the package it needs; `onnx-trt` is ONNX Runtime's TensorRT provider."""

DISTRIBUTIONS: Final = {
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu13"),
}
"""Package -> the distributions that bring it."""

COMPUTES: Final = {
    "openvino": ("fp32", "bf16", "fp16", "int8"),
    "onnx": ("fp32", "fp16", "int8"),
    "onnx-trt": ("fp32", "fp16", "int8"),
    "tensorrt": ("fp32", "fp16", "int8"),
}
"""Engine -> the precisions it can be told to compute in."""

COMPILED: Final = ("tensorrt", "onnx-trt")
"""Engines that compile a network into a plan for one GPU: each plan needs a certificate of its own, fp32 too."""

FIX: Final = {
    "openvino": "pip install 'dints-deploy[cpu]'",
    "onnx": "pip install 'dints-deploy[cpu]'",
    "onnx-trt": "pip install 'dints-deploy[gpu]' on a machine with an NVIDIA GPU",
    "tensorrt": "pip install 'dints-deploy[gpu]' on a machine with an NVIDIA GPU",
}

MOST_PER_CALL: Final = 4
"""Windows of one call at most: plans for TensorRT are made for as many."""

FEW_WINDOWS: Final = 4
"""Up to this many windows a quicker start outweighs a quicker network (benchmarks/cold_start.py)."""


def choose_engine(
    name: str,
    *,
    windows: int,
    device: str = "cpu",
    threads: int | None = None,
    at_once: int = 1,
    fewer_products: bool = False,
) -> tuple[Engine, str]:
    """Return an engine and why it was chosen.

    Args:
        name: `auto`, or an engine's name.
        windows: how many windows will run; a short run wants a quick start.
        device: cpu or cuda:N.
        threads: CPU threads, None for all.
        at_once: windows that compute at a time, where the engine can.
        fewer_products: rewrite large convolutions, where the engine can.

    Raises:
        UsageError: the name or device is unknown. EngineError: `engine-missing`.
    """
    check_engine(name, device)
    chosen, why = choose_name(name, windows, device)
    if not installed(chosen):
        raise EngineError("engine-missing", f"expected the engine {chosen}, found it not installed: {FIX[chosen]}")
    threads = threads or available_threads()
    return build_engine(chosen, device, threads, at_once=at_once, fewer_products=fewer_products), why


def check_engine(name: str, device: str) -> None:
    """Refuse an engine or a device that there is not, or not together.

    Raises:
        UsageError: `usage`.
    """
    if name not in ("auto", *PACKAGES):
        raise UsageError("usage", f"expected an engine of auto, {', '.join(PACKAGES)}, found {name!r}")
    if re.fullmatch(r"cpu|cuda:[0-9]+", device) is None:
        raise UsageError("usage", f"expected the device cpu or cuda:N, found {device!r}")
    if name == "openvino" and device != "cpu":
        raise UsageError("usage", f"expected the device cpu for openvino, found {device!r}: choose the engine onnx")
    if name in COMPILED and device == "cpu":
        raise UsageError("usage", f"expected a GPU for {name}, found the device cpu: add --device cuda:0")


def installed(engine: str) -> bool:
    """Say whether an engine's package is there, without importing it."""
    return importlib.util.find_spec(PACKAGES[engine]) is not None


def available_threads() -> int:
    """Return the CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def choose_name(name: str, windows: int, device: str) -> tuple[str, str]:
    """Return the engine that a name stands for, and why; another name than `auto` stands for itself."""
    if name != "auto":
        return name, "asked for"
    if device != "cpu":
        return "onnx", "the engine for CUDA devices"
    if installed("openvino") and installed("onnx"):
        if windows <= FEW_WINDOWS:
            return "onnx", f"quickest start, for {windows} window(s)"
        return "openvino", f"fastest on this CPU, for {windows} windows"
    if installed("openvino"):
        return "openvino", "the only CPU engine installed"
    return "onnx", "the only CPU engine installed"


def build_engine(name: str, device: str, threads: int, *, at_once: int = 1, fewer_products: bool = False) -> Engine:
    """Return an engine that is installed; the last two arguments are for those that can: see `choose_engine`."""
    if name == "openvino":
        from dints_deploy.runtime.openvino_engine import OpenVinoEngine

        return OpenVinoEngine(threads=threads, at_once=at_once, fewer_products=fewer_products)
    if name == "tensorrt":
        from dints_deploy.runtime.tensorrt_engine import TensorRtEngine

        return TensorRtEngine(device=device)
    from dints_deploy.runtime.onnx_engine import OnnxEngine

    return OnnxEngine(device=device, threads=threads, compiled=name == "onnx-trt")


def engine_version(name: str) -> str:
    """Return the version of an installed engine's package, without importing it; "" where it tells none."""
    for distribution in DISTRIBUTIONS[PACKAGES[name]]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def check_precision(engine: str, precision: str) -> None:
    """Refuse a precision that there is not, or that an engine cannot be told to compute in.

    Whether a precision may be used for an entry is another question: `certified.choose_networks` answers it.

    Raises:
        UsageError: `usage`.
    """
    known = COMPUTES.get(engine, ("fp32",))
    if precision not in known:
        raise UsageError(
            "usage",
            f"expected a precision of {', '.join(known)} for {engine}, found {precision!r}: choose one of these",
        )


MEMORY_WORDS: Final = ("bad_alloc", "memoryerror", "out of memory", "outofmemory", "allocate")
"""By these words the engines' messages tell that memory was short; none of them has a type for it."""


def engine_error(expected: str, found: str) -> EngineError:
    """Return the error for what an engine's own exception says: `engine-memory` or `engine-failed`."""
    if any(word in found.lower() for word in MEMORY_WORDS):
        return EngineError(
            "engine-memory",
            f"expected {expected}, found too little memory: give it more, or use --max-ram ({found})",
        )
    return EngineError("engine-failed", f"expected {expected}, found: {found}")


def check_ends(inputs: int, outputs: int) -> None:
    """Refuse a network that does not map one array to one array: nobody guesses which of several is meant.

    Raises:
        EngineError: `engine-failed`.
    """
    if (inputs, outputs) != (1, 1):
        raise EngineError(
            "engine-failed", f"expected a network of one input and one output, found {inputs} and {outputs}"
        )


def check_output(logits: Batch, expected: tuple[int, ...], engine: str) -> Batch:
    """Refuse logits of a wrong shape or with NaN or infinity: an engine that fails silently must not make a mask.

    Raises:
        EngineError: `engine-output`.
    """
    if logits.shape != expected:
        raise EngineError("engine-output", f"expected logits of shape {expected} from {engine}, found {logits.shape}")
    if not np.isfinite(logits).all():
        raise EngineError("engine-output", f"expected finite logits from {engine}, found NaN or infinity")
    return logits
