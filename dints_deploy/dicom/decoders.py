"""The caller's side of the decoding processes: start, ask, time out, replace."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from dints_deploy.dicom.bounded import DEFAULT_LIMITS, Limits
from dints_deploy.dicom.decoder import HEAD_BYTES, MESSAGE_BYTES, READY
from dints_deploy.dicom.header import SliceHeader
from dints_deploy.errors import DintsError, ScanRefused

Frame = NDArray[np.signedinteger[Any] | np.unsignedinteger[Any]]
"""Stored values (rows, columns) of one frame."""

AGAIN: Final = "send the file again"
STARTING_SECONDS: Final = 120.0
"""How long the first process may take to start."""


class Decoders:
    """A few decoding processes, started when first needed, shared by any number of threads.

    Use as a context manager; it costs nothing where nothing is compressed.

    Args:
        count: how many processes may decode at once.
    """

    def __init__(self, count: int | None = None, *, limits: Limits = DEFAULT_LIMITS) -> None:
        self.count = max(1, len(os.sched_getaffinity(0)) if count is None else count)
        self.limits = limits
        self._nursery = _Nursery(limits)
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(self.count):
            self._idle.put(None)  # started when first needed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in [self._idle.get() for _ in range(self.count)]:  # waits for those at work
            if worker is not None:
                worker.stop()
            self._idle.put(None)
        self._nursery.close()

    def start(self) -> None:
        """Begin to start, without waiting: who knows that compressed pixels will come loses no time over it later."""
        self._nursery.start()

    def frames(self, headers: Sequence[SliceHeader]) -> Iterator[Frame]:
        """Yield the stored values of planes of one compressed file.

        Raises:
            ScanRefused: `dicom-syntax` where its decoder is not installed, `dicom-pixels` where it fails, crashes or
                takes longer than the limit.
            DintsError: `dicom-decoder` where no decoding process starts.
        """
        worker = self._idle.get()
        healthy = False
        try:
            if worker is not None and worker.orphaned():  # no file is to blame for that
                worker.stop()
                worker = None
            worker = worker or _Worker(self._nursery)
            yield from worker.frames(headers)
            healthy = True
        finally:
            if worker is not None and not healthy:
                worker.stop()
            self._idle.put(worker if healthy else None)


class _Nursery:
    """The process that forks the workers: what they import takes longer than many a series, and is imported once."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._popen: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """Return the process, where there is one."""
        return self._popen

    def start(self) -> None:
        """Start the process where there is none, or none any more; what hinders it shows when it is needed."""
        with self._lock:
            try:
                self._running()
            except OSError:
                self._forget()

    def fork(self, end: socket.socket) -> int:
        """Return the process of a new worker that serves `end` of a connection.

        Raises:
            DintsError: `dicom-decoder`.
        """
        return self._exchange({"start": True}, [end.fileno()])

    def stop(self, worker: int) -> None:
        """End a worker; where the nursery itself is gone, so are its workers."""
        popen = self._popen
        if popen is not None and popen.poll() is None:
            with contextlib.suppress(DintsError):
                self._exchange({"stop": worker}, [])

    def close(self) -> None:
        """End the process, and with it what it forked."""
        with self._lock:
            self._forget()

    def _exchange(self, message: dict[str, Any], descriptors: list[int]) -> int:
        with self._lock:
            control = self._running()
            try:
                socket.send_fds(control, [json.dumps(message).encode()], descriptors)
                answer = self._receive(control)
                while answer == READY:
                    answer = self._receive(control)
                worker = int(json.loads(answer)["pid"])
            except (OSError, EOFError, ValueError):  # it ended, or said nothing for too long
                ended = self._forget(patience_s=1.0)
                found = f"expected a decoding process to start, found that it ended ({ended}): see doctor"
                raise DintsError("dicom-decoder", found) from None
        if not worker:
            raise DintsError("dicom-decoder", "expected a decoding process, found none left: end other programs")
        return worker

    def _running(self) -> socket.socket:
        """Return the way to the process, started if need be."""
        if self._popen is not None and self._popen.poll() is not None:
            self._forget()
        if self._control is None:
            self._control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._control.settimeout(STARTING_SECONDS)
            arguments = str(other.fileno()), str(self.limits.decoder_bytes)
            with other:
                self._popen = subprocess.Popen(
                    [sys.executable, "-P", "-m", "dints_deploy.dicom.decoder", *arguments],
                    stdin=subprocess.DEVNULL,  # decoders print what they please
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[other.fileno()],
                    env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                )
        return self._control

    @staticmethod
    def _receive(control: socket.socket) -> bytes:
        answer = control.recv(MESSAGE_BYTES)
        if not answer:
            raise EOFError
        return answer

    def _forget(self, *, patience_s: float = 0.0) -> int | None:
        """End the process, which its workers die with, and return its exit code."""
        popen, self._popen = self._popen, None
        if self._control is not None:
            self._control.close()
            self._control = None
        if popen is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            popen.wait(timeout=patience_s)
        popen.kill()
        return popen.wait()


class _Worker:
    """One process that decodes, and the connection to it."""

    def __init__(self, nursery: _Nursery) -> None:
        self.nursery = nursery
        self.limits = nursery.limits
        self.connection, end = socket.socketpair()
        try:
            with end:
                self.pid = nursery.fork(end)
            self.parent = nursery.process
        except DintsError:
            self.connection.close()
            raise

    def orphaned(self) -> bool:
        """Return whether the process that forked this one has ended: this one dies with it, if it has not yet."""
        return self.parent is None or self.parent.poll() is not None

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.connection.close()
        self.nursery.stop(self.pid)

    def frames(self, headers: Sequence[SliceHeader]) -> Iterator[Frame]:
        """Ask for planes of one file and yield them."""
        layout = headers[0].layout
        self._ask(_request(headers))
        for _ in headers:
            deadline = time.monotonic() + self.limits.frame_seconds
            head = _head(self._exactly(HEAD_BYTES, deadline))
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
        self.connection.settimeout(self.limits.frame_seconds or None)
        try:
            self.connection.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise _crashed() from error

    def _exactly(self, count: int, deadline: float) -> bytearray:
        """Return `count` bytes of the answer, by `deadline`."""
        data = bytearray(count)
        view, at = memoryview(data), 0
        while at < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._late()
            self.connection.settimeout(left)
            try:
                got = self.connection.recv_into(view[at:])
            except TimeoutError:
                raise self._late() from None
            except OSError as error:
                raise _crashed() from error
            if got == 0:
                raise _crashed()
            at += got
        return data

    def _late(self) -> ScanRefused:
        limit = self.limits.frame_seconds
        return ScanRefused("dicom-pixels", f"expected a frame within {limit:g} s, found none: the file is damaged")


def _head(data: bytearray) -> dict[str, Any]:
    try:
        head: dict[str, Any] = json.loads(data)
    except ValueError as error:
        raise _crashed() from error
    return head


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
