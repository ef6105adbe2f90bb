"""Decode planes into a stack of modality values: in parallel, within a memory bound, whatever the transfer syntax."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from dints_deploy.dicom.bounded import DEFAULT_LIMITS, Limits, inflate, open_regular, too_many_voxels
from dints_deploy.dicom.content import rescale
from dints_deploy.dicom.decoders import Decoders, Frame
from dints_deploy.dicom.header import BIG_ENDIAN, DEFLATED, PixelLayout, SliceHeader
from dints_deploy.errors import ScanRefused

FRAMES_PER_JOB: Final = 8
"""Frames of one multi-frame file that one decoder takes at a time."""

Job = list[tuple[int, SliceHeader]]
"""Planes of one file, each with its place in the stack."""


def decode(
    slices: Sequence[SliceHeader], *, limits: Limits = DEFAULT_LIMITS, decoders: Decoders | None = None
) -> NDArray[np.float32]:
    """Return the modality values of `slices` as (slices, rows, columns) float32: stored value * slope + intercept.

    All slices have the same rows and columns and passed the gate.

    Args:
        decoders: processes to use for compressed pixels; without, some are started for this call.

    Raises:
        ScanRefused: `dicom-too-large` before anything is read, `dicom-syntax`, `dicom-truncated`, `dicom-pixels`.
    """
    layout = slices[0].layout
    total = len(slices) * layout.Rows * layout.Columns * np.dtype(np.float32).itemsize
    if total > limits.stack_bytes:
        raise too_many_voxels(total, limits)
    stack = np.empty((len(slices), layout.Rows, layout.Columns), dtype=np.float32)
    if decoders is None:
        with Decoders(limits=limits) as own:
            _fill(stack, slices, own)
    else:
        _fill(stack, slices, decoders)
    return stack


def stored_values(headers: Sequence[SliceHeader], decoders: Decoders) -> Generator[Frame]:
    """Yield the stored values of planes of one file, before any rescaling."""
    if headers[0].layout.length < 0:
        yield from decoders.frames(headers)
        return
    if headers[0].layout.TransferSyntaxUID == DEFLATED:
        last = max(header.frame for header in headers) + 1
        whole = inflate(headers[0].path, headers[0].layout.offset + last * headers[0].layout.frame_bytes)
        source: BinaryIO = io.BytesIO(whole)
    else:
        source = open_regular(headers[0].path)
    with source:
        yield from (_native(source, header) for header in headers)


def _fill(stack: NDArray[np.float32], slices: Sequence[SliceHeader], decoders: Decoders) -> None:
    jobs = list(_jobs(slices))
    with ThreadPoolExecutor(max_workers=min(len(jobs), decoders.count)) as threads:
        futures = [threads.submit(_run, stack, job, decoders) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _jobs(slices: Sequence[SliceHeader]) -> Iterator[Job]:
    """Yield the planes by file, in the file's order of frames, a few at a time."""
    files: dict[os.PathLike[str], Job] = {}
    for place, header in enumerate(slices):
        files.setdefault(header.path, []).append((place, header))
    for planes in files.values():
        planes.sort(key=lambda item: item[1].frame)
        deflated = planes[0][1].layout.TransferSyntaxUID == DEFLATED  # can only be read from its beginning
        size = len(planes) if deflated else FRAMES_PER_JOB
        yield from (planes[at : at + size] for at in range(0, len(planes), size))


def _run(stack: NDArray[np.float32], job: Job, decoders: Decoders) -> None:
    with contextlib.closing(stored_values([header for _, header in job], decoders)) as values:
        for (place, header), stored in zip(job, values, strict=True):
            slope, intercept = rescale(header)
            if slope == 1.0:
                np.add(stored, np.float32(intercept), out=stack[place], dtype=np.float32, casting="unsafe")
            else:
                stack[place] = stored * np.float64(slope) + intercept


def _native(source: BinaryIO, header: SliceHeader) -> Frame:
    """Return the stored values of a plane that lies in `source` as it is (PS3.5 8.1.1)."""
    layout = header.layout
    source.seek(layout.offset + header.frame * layout.frame_bytes)
    data = source.read(layout.frame_bytes)
    if len(data) != layout.frame_bytes:
        found = f"found {len(data)}"
        raise ScanRefused("dicom-truncated", f"expected {layout.frame_bytes} bytes of pixels, {found}: send it again")
    return _used_bits(_cells(data, layout), layout)


def _cells(data: bytes, layout: PixelLayout) -> NDArray[Any]:
    """Return the pixel cells (rows, columns) with their sign."""
    big = layout.TransferSyntaxUID == BIG_ENDIAN
    if big and layout.BitsAllocated == 8 and layout.vr == "OW" and len(data) % 2 == 0:
        data = np.frombuffer(data, dtype=">u2").astype("<u2").tobytes()  # bytes come swapped in words (PS3.5 8.1.1)
    sign = "i" if layout.PixelRepresentation else "u"
    cells = np.frombuffer(data, dtype=f"{'>' if big else '<'}{sign}{layout.BitsAllocated // 8}")
    return cells.reshape(layout.Rows, layout.Columns)


def _used_bits(cells: NDArray[Any], layout: PixelLayout) -> NDArray[Any]:
    """Return the values of the stored bits.

    Bits above them are zero or repeat the sign; anything else (an overlay of old, a padding value out of range) makes
    two readings possible, and the wrong one looks like bone.
    """
    spare = layout.BitsAllocated - layout.BitsStored
    if spare == 0:
        return cells
    values = (cells << spare) >> spare
    if np.array_equal(values, cells) or np.array_equal(values & ((1 << layout.BitsStored) - 1), cells):
        return values
    found = "found others set: an overlay or a wrong header"
    raise ScanRefused("dicom-pixels", f"expected values of {layout.BitsStored} bits, {found}: export the series again")
