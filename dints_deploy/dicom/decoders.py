"""The caller's side of the decoding processes: start, ask, time out, replace."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from dints_deploy.dicom.bounded import DEFAULT_LIMITS, Limits
from dints_deploy.dicom.header import SliceHeader
from dints_deploy.errors import DintsError, ScanRefused

Frame = NDArray[np.signedinteger[Any] | np.unsignedinteger[Any]]
"""Stored values (rows, columns) of one frame."""

LINE_BYTES: Final = 4096
CHUNK_BYTES: Final = 1 << 20
AGAIN: Final = "send the file again"
STARTING_SECONDS: Final = 120.0
"""How long a process may take to start."""


class Decoders:
    """A few decoding processes, started when first needed, shared by any number of threads.

    Use as a context manager; a daemon keeps one for its life.

    Args:
        count: how many processes may run at once.
    """

    def __init__(self, count: int | None = None, *, limits: Limits = DEFAULT_LIMITS) -> None:
        self.count = max(1, len(os.sched_getaffinity(0)) if count is None else count)
        self.limits = limits
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(self.count):
            self._idle.put(None)  # started when first needed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in [self._idle.get() for _ in range(self.count)]:  # waits for those at work
            if process is not None:
                process.stop()
            self._idle.put(None)

    def frames(self, headers: Sequence[SliceHeader]) -> Iterator[Frame]:
        """Yield the stored values of planes of one compressed file.

        Raises:
            ScanRefused: `dicom-syntax` where its decoder is not installed, `dicom-pixels` where it fails, crashes or
                takes longer than the limit.
            DintsError: `dicom-decoder` where no decoding process starts.
        """
        process = self._idle.get()
        healthy = False
        try:
            process = process or _Process(self.limits)
            yield from process.frames(headers)
            healthy = True
        finally:
            if process is not None and not healthy:
                process.stop()
            self._idle.put(process if healthy else None)


class _Process:
    """One decoding process."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "dints_deploy.dicom.decoder", str(limits.decoder_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        with contextlib.suppress(OSError):  # a wider pipe means fewer switches; the default works too
            fcntl.fcntl(self.popen.stdout or -1, fcntl.F_SETPIPE_SZ, CHUNK_BYTES)
        try:
            self._line(time.monotonic() + STARTING_SECONDS)
        except ScanRefused as refused:
            self.stop()
            found = f"expected a decoding process to start, found that it ended ({self.popen.returncode}): see doctor"
            raise DintsError("dicom-decoder", found) from refused

    def stop(self) -> None:
        """Kill the process and wait for its end."""
        self.popen.kill()
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.popen.wait()

    def frames(self, headers: Sequence[SliceHeader]) -> Iterator[Frame]:
        """Ask for planes of one file and yield them."""
        layout = headers[0].layout
        self._ask(_request(headers))
        for _ in headers:
            deadline = time.monotonic() + self.limits.frame_seconds
            head = json.loads(self._line(deadline))
            if "error" in head:
                if head["error"] == "ImportError":
                    bits = f"{layout.BitsStored} bits in {layout.TransferSyntaxUID}"
                    raise ScanRefused("dicom-syntax", f"expected a decoder of {bits}, found none: convert the series")
                raise ScanRefused("dicom-pixels", f"expected {_name(headers)}, found damage ({head['error']}): {AGAIN}")
            if head["bytes"] != layout.Rows * layout.Columns * np.dtype(head["dtype"]).itemsize:
                raise ScanRefused("dicom-pixels", f"expected {_name(headers)}, found a frame of another size: {AGAIN}")
            data = self._exactly(head["bytes"], deadline)
            yield np.frombuffer(data, dtype=head["dtype"]).reshape(layout.Rows, layout.Columns)

    def _ask(self, request: dict[str, Any]) -> None:
        stdin = self.popen.stdin
        try:
            if stdin is not None:
                stdin.write(json.dumps(request).encode() + b"\n")
                stdin.flush()
        except OSError as error:
            raise _crashed() from error

    def _line(self, deadline: float) -> bytes:
        """Return one answer line; answers are short, so a byte at a time costs nothing against a frame."""
        line = b""
        while not line.endswith(b"\n"):
            line += self._exactly(1, deadline)
            if len(line) > LINE_BYTES:
                raise _crashed()
        return line

    def _exactly(self, count: int, deadline: float) -> bytearray:
        """Return `count` bytes of the answer, by `deadline`."""
        stdout = self.popen.stdout
        data = bytearray(count)
        view, at = memoryview(data), 0
        while at < count and stdout is not None:
            ready, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                limit = self.limits.frame_seconds
                raise ScanRefused(
                    "dicom-pixels", f"expected a frame within {limit:g} s, found none: the file is damaged"
                )
            got = os.readv(stdout.fileno(), [view[at : at + CHUNK_BYTES]])
            if got == 0:
                raise _crashed()
            at += got
        return data


def _crashed() -> ScanRefused:
    return ScanRefused("dicom-pixels", "expected a frame, found that the decoder crashed on it: the file is damaged")


def _name(headers: Sequence[SliceHeader]) -> str:
    frames = f"{headers[0].frame + 1} to {headers[-1].frame + 1}"
    return "an image" if headers[0].layout.NumberOfFrames == 1 else f"frames {frames}"


def _request(headers: Sequence[SliceHeader]) -> dict[str, Any]:
    """Return the request of the protocol in `decoder`."""
    layout = headers[0].layout
    return {
        "path": str(headers[0].path),
        "offset": layout.offset,
        "syntax": layout.TransferSyntaxUID,
        "frames": [header.frame for header in headers],
        "options": {
            "rows": layout.Rows,
            "columns": layout.Columns,
            "number_of_frames": layout.NumberOfFrames,
            "samples_per_pixel": layout.SamplesPerPixel,
            "bits_allocated": layout.BitsAllocated,
            "bits_stored": layout.BitsStored,
            "pixel_representation": layout.PixelRepresentation,
            "photometric_interpretation": layout.PhotometricInterpretation,
            "pixel_keyword": "PixelData",
            "pixel_vr": layout.vr,
        },
    }
