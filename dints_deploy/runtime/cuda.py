"""CUDA through cuda-python: every call checked, every buffer freed with the object that holds it.

Only this file knows CUDA's calls. It imports cuda-python when first used: the CPU engines need none of it.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dints_deploy.errors import EngineError


@functools.cache
def _runtime() -> Any:
    """Return cuda-python's bindings of the CUDA runtime; raise `EngineError` `engine-missing` without the package."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise EngineError(
            "engine-missing", f"expected cuda-python for a GPU, found: {error}: pip install 'dints-deploy[gpu]'"
        ) from error
    return runtime


def _call(name: str, *arguments: object) -> Any:
    """Call a function of the CUDA runtime and return its one result, if it has one.

    Raises:
        EngineError: `engine-memory`, `engine-missing` (no driver, no such device) or `engine-failed`.
    """
    runtime = _runtime()
    error, *results = getattr(runtime, name)(*arguments)
    codes = runtime.cudaError_t
    if error == codes.cudaSuccess:
        return results[0] if results else None
    if error == codes.cudaErrorMemoryAllocation:
        raise EngineError("engine-memory", f"expected {name} to succeed, found the GPU's memory full: free some of it")
    missing = (codes.cudaErrorInsufficientDriver, codes.cudaErrorNoDevice, codes.cudaErrorInvalidDevice)
    code = "engine-missing" if error in missing else "engine-failed"
    raise EngineError(code, f"expected {name} to succeed, found {error.name}: see dints-deploy doctor")


def ordinal(device: str) -> int:
    """Return the number of a device cuda:N."""
    return int(device.removeprefix("cuda:"))


def select(device: str) -> None:
    """Make a device cuda:N the one that this thread's calls go to."""
    _call("cudaSetDevice", ordinal(device))


def describe_gpu(device: str) -> str:
    """Return a GPU's name and compute capability in one line: what a plan depends on."""
    found = _call("cudaGetDeviceProperties", ordinal(device))
    return f"{found.name.decode()}; compute capability {found.major}.{found.minor}"


def driver_version() -> str:
    """Return the newest CUDA version that the driver runs, such as 13.0; raise `EngineError` without a driver."""
    number = int(_call("cudaDriverGetVersion"))
    if number == 0:
        raise EngineError("engine-missing", "expected an NVIDIA driver, found none: install it")
    return f"{number // 1000}.{number % 1000 // 10}"


class Stream:
    """A queue of work on the device; what is put in it runs in order."""

    def __init__(self) -> None:
        self.handle = int(_call("cudaStreamCreate"))
        weakref.finalize(self, _drop, "cudaStreamDestroy", self.handle)

    def wait_for(self, event: Event) -> None:
        """Let what is queued from now on start after an event; the host does not wait."""
        _call("cudaStreamWaitEvent", self.handle, event.handle, 0)


class Event:
    """A point in a stream."""

    def __init__(self) -> None:
        flags = _runtime().cudaEventDisableTiming
        self.handle = int(_call("cudaEventCreateWithFlags", flags))
        weakref.finalize(self, _drop, "cudaEventDestroy", self.handle)

    def record(self, stream: Stream) -> None:
        """Put the event behind what the stream holds now."""
        _call("cudaEventRecord", self.handle, stream.handle)

    def synchronize(self) -> None:
        """Wait on the host until the event is reached."""
        _call("cudaEventSynchronize", self.handle)


class Buffer:
    """A float32 array twice: in pinned host memory, where copies do not pass through another buffer, and on the device.

    Attributes:
        host: the pinned array.
        device: address on the device.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        count = int(np.prod(shape))
        self.nbytes = 4 * count
        self.device = int(_call("cudaMalloc", self.nbytes))
        weakref.finalize(self, _drop, "cudaFree", self.device)
        pinned = int(_call("cudaHostAlloc", self.nbytes, _runtime().cudaHostAllocDefault))
        weakref.finalize(self, _drop, "cudaFreeHost", pinned)
        self.host: NDArray[np.float32] = np.ctypeslib.as_array((ctypes.c_float * count).from_address(pinned))
        self.host = self.host.reshape(shape)

    def upload(self, stream: Stream) -> None:
        """Queue the copy to the device."""
        kind = _runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
        _call("cudaMemcpyAsync", self.device, self.host.ctypes.data, self.nbytes, kind, stream.handle)

    def download(self, stream: Stream) -> None:
        """Queue the copy to the host."""
        kind = _runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
        _call("cudaMemcpyAsync", self.host.ctypes.data, self.device, self.nbytes, kind, stream.handle)


def _drop(function: str, handle: int) -> None:
    """Free a resource; at the end of the process CUDA may be gone already, and the resource with it."""
    getattr(_runtime(), function)(handle)
