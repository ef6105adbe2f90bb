"""NIfTI files byte by byte: valid ones of every kind, and the broken and hostile ones that must be refused."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from numpy.typing import NDArray

from tests.phantoms import affine

KINDS: Final[dict[int, Any]] = {1: Nifti1Header, 2: Nifti2Header}
RGB: Final = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
BOMB_CHUNK: Final = bytes(64 << 20)
"""Zeros that one gzip member of a bomb unpacks to."""


def header(
    shape: tuple[int, ...],
    dtype: Any = np.int16,
    *,
    sform: NDArray[np.float64] | None = None,
    qform: NDArray[np.float64] | None = None,
    version: int = 1,
    endian: str = "<",
    **fields: Any,
) -> bytes:
    """Return a header with its extension flag; an sform and a qform (code 1) where given, `fields` written as they are.

    Without sform, qform and the fields about them, the sform is a plain 1 mm grid.
    """
    head = KINDS[version](endianness=endian)
    head.set_data_dtype(dtype)
    head.set_data_shape(shape)
    head["vox_offset"] = 352 if version == 1 else 544
    if sform is None and qform is None and not {"sform_code", "srow_x"} & set(fields):
        sform = affine()
    if sform is not None:
        head.set_sform(sform, code=1)
    if qform is not None:
        head.set_qform(qform, code=1)
    for name, value in fields.items():
        head[name] = value
    return bytes(head.binaryblock) + bytes(4)


def nifti(data: NDArray[Any], *, endian: str = "<", **options: Any) -> bytes:
    """Return a whole file: the header (options as for `header`) and the voxels as they are stored."""
    stored = data.astype(data.dtype.newbyteorder(endian))  # type: ignore[arg-type]
    return header(data.shape, data.dtype, endian=endian, **options) + stored.tobytes(order="F")


def plain() -> bytes:
    """Return a valid file of 6 x 7 x 8 voxels of noise."""
    return nifti(np.random.default_rng(0).normal(200, 50, (6, 7, 8)).astype(np.int16))


def packed(raw: bytes) -> bytes:
    """Return a gzip stream."""
    return gzip.compress(raw, 6, mtime=0)


def bomb(members: int = 64) -> bytes:
    """Return a valid small image followed by gigabytes of zeros: megabytes of gzip that unpack a thousandfold."""
    return packed(plain()) + gzip.compress(BOMB_CHUNK, 1, mtime=0) * members


def _flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 0xFF
    return bytes(changed)


def _voxels(*shape: int, dtype: Any = np.int16) -> bytes:
    return nifti(np.zeros(shape, dtype))


def _turned(degrees: float) -> NDArray[np.float64]:
    return affine(angles=(0, 0, np.radians(degrees)))


BROKEN: Final[dict[str, tuple[Callable[[], bytes], str]]] = {
    "empty": (lambda: b"", "scan-empty"),
    "text": (lambda: b"this is no image" * 50, "scan-format"),
    "three-bytes": (lambda: b"abc", "scan-format"),
    "packed-text": (lambda: packed(b"this is no image" * 50), "scan-format"),
    "packed-twice": (lambda: packed(packed(plain())), "scan-format"),
    "analyze-without-magic": (lambda: header((4, 4, 4), magic=b"") + bytes(128), "scan-format"),
    "half-a-header": (lambda: plain()[:200], "scan-truncated"),
    "half-a-header-packed": (lambda: packed(plain()[:200]), "scan-truncated"),
    "voxels-cut": (lambda: plain()[:-1], "scan-truncated"),
    "voxels-cut-before-packing": (lambda: packed(plain()[:-1]), "scan-truncated"),
    "gzip-cut-in-the-middle": (lambda: packed(plain())[:300], "scan-truncated"),
    "gzip-cut-in-the-checksum": (lambda: packed(plain())[:-5], "scan-truncated"),
    "gzip-header-only": (lambda: packed(plain())[:5], "scan-truncated"),
    "gzip-wrong-checksum": (lambda: _flipped(packed(plain()), -5), "scan-gzip"),
    "gzip-wrong-length": (lambda: _flipped(packed(plain()), -1), "scan-gzip"),
    "gzip-unknown-method": (lambda: _flipped(packed(plain()), 2), "scan-gzip"),
    "gzip-bomb": (bomb, "scan-too-large"),
    "claims-32767-cubed": (lambda: header((32767,) * 3) + bytes(100), "scan-too-large"),
    "claims-32767-cubed-packed": (lambda: packed(header((32767,) * 3) + bytes(100)), "scan-too-large"),
    "claims-a-huge-axis": (lambda: header((2**62, 4, 4), version=2) + bytes(100), "scan-too-large"),
    "claims-8-gigabytes": (lambda: header((2000, 2000, 1000)) + bytes(100), "scan-truncated"),
    "claims-8-gigabytes-packed": (lambda: packed(header((2000, 2000, 1000)) + bytes(100)), "scan-truncated"),
    "two-megabytes-behind-the-voxels": (lambda: plain() + bytes(2 << 20), "scan-too-large"),
    "no-axis": (lambda: header((4, 4, 4), dim=[0] * 8) + bytes(128), "scan-format"),
    "axis-of-zero": (lambda: header((4, 4, 4), dim=[3, 4, 0, 4, 1, 1, 1, 1]) + bytes(128), "scan-format"),
    "axis-below-zero": (lambda: header((4, 4, 4), dim=[3, 4, -4, 4, 1, 1, 1, 1]) + bytes(128), "scan-format"),
    "nine-axes": (lambda: header((4, 4, 4), dim=[9, 4, 4, 4, 1, 1, 1, 1]) + bytes(128), "scan-format"),
    "voxels-inside-the-header": (lambda: header((4, 4, 4), vox_offset=0) + bytes(128), "scan-format"),
    "voxels-nowhere": (lambda: header((4, 4, 4), vox_offset=np.nan) + bytes(128), "scan-format"),
    "voxels-at-infinity": (lambda: header((4, 4, 4), vox_offset=np.inf) + bytes(128), "scan-format"),
    "one-axis": (lambda: _voxels(64), "scan-dimensions"),
    "two-axes": (lambda: _voxels(8, 8), "scan-dimensions"),
    "five-axes": (lambda: _voxels(4, 4, 4, 2, 2), "scan-dimensions"),
    "complex64": (lambda: _voxels(4, 4, 4, dtype=np.complex64), "scan-datatype"),
    "complex128": (lambda: _voxels(4, 4, 4, dtype=np.complex128), "scan-datatype"),
    "colour": (lambda: header((4, 4, 4), RGB) + bytes(192), "scan-datatype"),
    "unknown-type": (lambda: header((4, 4, 4), datatype=12345) + bytes(128), "scan-format"),
    "neither-sform-nor-qform": (lambda: header((4, 4, 4), sform_code=0, qform_code=0) + bytes(128), "scan-affine"),
    "nan-in-the-sform": (
        lambda: (
            header((4, 4, 4), sform_code=1, srow_x=[np.nan, 0, 0, 0], srow_y=[0, 1, 0, 0], srow_z=[0, 0, 1, 0])
            + bytes(128)
        ),
        "scan-affine",
    ),
    "singular-sform": (lambda: header((4, 4, 4), sform=np.diag([1.0, 1, 0, 1])) + bytes(128), "scan-affine"),
    "nan-in-the-qform": (
        lambda: header((4, 4, 4), sform_code=0, qform_code=1, qoffset_x=np.nan) + bytes(128),
        "scan-affine",
    ),
    "impossible-quaternion": (
        lambda: header((4, 4, 4), sform_code=0, qform_code=1, quatern_b=3) + bytes(128),
        "scan-affine",
    ),
    "impossible-quaternion-beside-a-sform": (
        lambda: header((4, 4, 4), sform=affine(), qform_code=1, quatern_b=3) + bytes(128),
        "scan-affine",
    ),
    "sform-and-qform-90-degrees-apart": (
        lambda: header((4, 4, 4), sform=_turned(0), qform=_turned(90)) + bytes(128),
        "scan-affine",
    ),
    "sform-and-qform-mirrored": (
        lambda: header((4, 4, 4), sform=affine("RAS"), qform=affine("LAS", origin=(3, 0, 0))) + bytes(128),
        "scan-affine",
    ),
}
"""What is wrong -> the file's bytes, and the reason code of its refusal."""
