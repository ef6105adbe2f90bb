"""Processes that decode compressed frames, so that a decoder's crash, greed or endless loop cannot harm the caller.

Run as `python -m dints_deploy.dicom.decoder DESCRIPTOR BYTES`, with a socket of packets on DESCRIPTOR. This first
process imports what decoding needs, says "ready", and decodes nothing: for {"start"}, which comes with a connected
stream socket, it forks a worker that serves that socket and answers {"pid"}; for {"stop": pid} it ends and buries the
worker. Where the caller closes its end, or dies, all end.

Requests to a worker are JSON lines (`decoders._request` writes them); for each frame a head of `HEAD_BYTES` goes out,
JSON with {"dtype", "bytes"}, and then the bytes, or a head with {"error"}, which ends the request.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NoReturn

if TYPE_CHECKING:
    from pydicom.pixels.decoders.base import Decoder

PLUGINS: Final = {
    "1.2.840.10008.1.2.4.50": "gdcm",  # JPEG Baseline
    "1.2.840.10008.1.2.4.51": "gdcm",  # JPEG Extended
    "1.2.840.10008.1.2.4.57": "gdcm",  # JPEG Lossless
    "1.2.840.10008.1.2.4.70": "gdcm",  # JPEG Lossless SV1
    "1.2.840.10008.1.2.4.80": "pyjpegls",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.81": "pyjpegls",  # JPEG-LS Near-Lossless
    "1.2.840.10008.1.2.4.90": "pylibjpeg",  # JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.91": "pylibjpeg",  # JPEG 2000
    "1.2.840.10008.1.2.4.201": "pylibjpeg",  # HTJ2K Lossless
    "1.2.840.10008.1.2.4.202": "pylibjpeg",  # HTJ2K Lossless RPCL
    "1.2.840.10008.1.2.4.203": "pylibjpeg",  # HTJ2K
    "1.2.840.10008.1.2.5": "pylibjpeg",  # RLE Lossless
}
"""Compressed transfer syntaxes (PS3.5 A.4), each with the one pydicom plugin that decodes it: never a silent second."""

WIDE_PLUGINS: Final = {"1.2.840.10008.1.2.4.51": "pylibjpeg"}
"""The same for more than 8 bits: JPEG Extended of 12 bits needs pylibjpeg-libjpeg, which is GPL and therefore no
dependency; where it is not installed, such images are refused."""

HEAD_BYTES: Final = 128
"""What precedes each frame: JSON, filled up with spaces."""

MESSAGE_BYTES: Final = 256
READY: Final = b"ready"

PR_SET_PDEATHSIG: Final = 1
"""Of prctl(2)."""


def main() -> None:
    """Fork workers until the caller closes its end. Arguments: the socket, and bytes of address space for each."""
    with socket.socket(fileno=int(sys.argv[1])) as control:
        limit_memory(int(sys.argv[2]))
        warnings.simplefilter("ignore")
        prepare()
        control.send(READY)
        serve_caller(control)


def limit_memory(count: int) -> None:
    """Let this process, and what it forks, have `count` bytes of address space, and dump no core."""
    resource.setrlimit(resource.RLIMIT_AS, (count, count))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def prepare() -> None:
    """Import what decoding needs: once for all workers, and a broken installation shows before a frame does.

    All but GDCM, whose wrapper alone takes a fifth of the start: `load_gdcm` brings it to a worker that needs it.
    """
    sys.modules["gdcm"] = None  # type: ignore[assignment]  # as if it were not installed
    import pydicom.pixels  # noqa: F401

    del sys.modules["gdcm"]
    import dints_deploy.dicom.bounded  # noqa: F401


def serve_caller(control: socket.socket) -> NoReturn:
    """Start and stop workers as the caller says; end with all of them where there is no caller any more."""
    workers: set[int] = set()
    while True:
        try:
            message, descriptors, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 1)
            if not message:
                break
            request = json.loads(message)
            control.send(json.dumps({"pid": _answer_caller(request, descriptors, workers, control)}).encode())
        except OSError:
            break
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    os._exit(0)  # nothing to tidy up, and the interpreter takes its time


def _answer_caller(request: dict[str, Any], descriptors: list[int], workers: set[int], control: socket.socket) -> int:
    """Return the process that was started or stopped, 0 where none could be."""
    if stopped := request.get("stop"):
        if stopped in workers:  # not yet buried, so that its number is still its own
            os.kill(stopped, signal.SIGKILL)
            os.waitpid(stopped, 0)
            workers.remove(stopped)
        return int(stopped)
    try:
        worker = os.fork()
    except OSError:
        worker = 0
    else:
        if worker == 0:
            control.close()
            work(descriptors[0])
        workers.add(worker)
    os.close(descriptors[0])
    return worker


def work(descriptor: int) -> NoReturn:
    """Serve requests on a socket until the caller closes it; die with the process that forked this one."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with socket.socket(fileno=descriptor) as caller, caller.makefile("rb") as lines, caller.makefile("wb") as out:
            for line in lines:
                answer(json.loads(line), out)
    finally:
        os._exit(0)


def answer(request: dict[str, Any], out: BinaryIO) -> None:
    """Write the frames of one request, or the kind of error that ended it (never its text: it may quote the file)."""
    from dints_deploy.dicom.bounded import INVALID_FILE

    try:
        for frame in frames(request):
            out.write(head(dtype=frame.dtype.str, bytes=frame.nbytes))
            out.write(frame.data)
    except (*INVALID_FILE, RuntimeError, ImportError) as error:
        out.write(head(error=type(error).__name__))
    out.flush()


def head(**fields: Any) -> bytes:
    """Return what precedes a frame."""
    return json.dumps(fields).encode().ljust(HEAD_BYTES)


def load_gdcm(decoder: Decoder) -> None:
    """Let pydicom look for GDCM again; where it is not installed, it stays away."""
    from pydicom.pixels.decoders import gdcm

    if "gdcm" in decoder.available_plugins:
        return
    if not gdcm.HAVE_GDCM:
        importlib.reload(gdcm)
    decoder.remove_plugin("gdcm")
    decoder.add_plugin("gdcm", (gdcm.__name__, "_decode_frame"))


def frames(request: dict[str, Any]) -> Iterator[Any]:
    """Yield the frames of one request as contiguous arrays (rows, columns)."""
    import numpy as np
    from pydicom.pixels import get_decoder

    from dints_deploy.dicom.bounded import open_regular

    options = request["options"]
    decoder = get_decoder(request["syntax"])
    with open_regular(Path(request["path"])) as file:
        file.seek(request["offset"])
        plugin = WIDE_PLUGINS.get(request["syntax"], "") if options["bits_stored"] > 8 else ""
        plugin = plugin or PLUGINS[request["syntax"]]
        if plugin == "gdcm":
            load_gdcm(decoder)
        if plugin not in decoder.available_plugins:
            raise ImportError(plugin)
        decoded = decoder.iter_array(file, indices=request["frames"], raw=True, decoding_plugin=plugin, **options)
        for frame, _ in decoded:
            if frame.shape != (options["rows"], options["columns"]) or frame.dtype.kind not in "iu":
                raise ValueError("the frame is not what the header says")
            yield np.ascontiguousarray(frame)


if __name__ == "__main__":
    main()
