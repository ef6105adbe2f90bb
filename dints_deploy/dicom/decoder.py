"""A process that decodes compressed frames, so that a decoder's crash, greed or endless loop cannot harm the caller.

Run as `python -m dints_deploy.dicom.decoder BYTES`. A JSON line {"ready"} says that it can serve. Requests come as JSON
lines on standard input (`decoders._request` writes them); for each frame a JSON line goes out, {"dtype", "bytes"} and
then the bytes, or {"error"}, which ends the request.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

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


def main() -> None:
    """Serve requests until standard input ends."""
    limit_memory(int(sys.argv[1]))
    out = os.fdopen(os.dup(1), "wb")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # decoders print what they please: only answers may go out
    os.dup2(quiet, 2)
    warnings.simplefilter("ignore")
    out.write(json.dumps({"ready": prepare()}).encode() + b"\n")
    out.flush()
    for line in sys.stdin.buffer:
        answer(json.loads(line), out)


def limit_memory(count: int) -> None:
    """Let this process have `count` bytes of address space, and dump no core."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (count, count))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def prepare() -> bool:
    """Import what decoding needs, so that a broken installation shows before a frame does."""
    import pydicom.pixels

    return bool(pydicom.pixels)


def answer(request: dict[str, Any], out: BinaryIO) -> None:
    """Write the frames of one request, or the kind of error that ended it (never its text: it may quote the file)."""
    from dints_deploy.dicom.bounded import INVALID_FILE

    try:
        for frame in frames(request):
            head = json.dumps({"dtype": frame.dtype.str, "bytes": frame.nbytes})
            out.write(head.encode() + b"\n")
            out.write(frame.data)
    except (*INVALID_FILE, RuntimeError, ImportError) as error:
        out.write(json.dumps({"error": type(error).__name__}).encode() + b"\n")
    out.flush()


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
        if plugin not in decoder.available_plugins:
            raise ImportError(plugin)
        decoded = decoder.iter_array(file, indices=request["frames"], raw=True, decoding_plugin=plugin, **options)
        for frame, _ in decoded:
            if frame.shape != (options["rows"], options["columns"]) or frame.dtype.kind not in "iu":
                raise ValueError("the frame is not what the header says")
            yield np.ascontiguousarray(frame)


if __name__ == "__main__":
    main()
