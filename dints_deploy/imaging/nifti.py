"""NIfTI files in and out: bounded while unpacking, strict about geometry, whole or not at all when writing."""

from __future__ import annotations

import io
import logging
import math
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from isal import igzip, igzip_lib
from numpy.typing import NDArray

from dints_deploy.errors import ScanRefused
from dints_deploy.files import replacing
from dints_deploy.imaging.volume import Grid, Volume

MAX_UNPACKED_BYTES: Final = 16 << 30
"""Largest image (bytes after unpacking) that is read: 512 x 512 x 8192 voxels of float64."""

TRAILING_BYTES: Final = 1 << 20
"""What may follow the voxels in a file (padding of some writers); more is not an image."""

HEADER_BYTES: Final = {b"\x5c\x01\0\0": 348, b"\0\0\x01\x5c": 348, b"\x1c\x02\0\0": 540, b"\0\0\x02\x1c": 540}
"""Size of the header by its first four bytes: NIfTI-1 and NIfTI-2, little and big endian."""

MAX_EXPANSION: Final = 1032
"""Bytes that one byte of a gzip stream unpacks to at most (RFC 1951: 258 bytes for two bits)."""

NIFTI1_MAX_AXIS: Final = 32767
"""Voxels along an axis that a NIfTI-1 header can say; a longer axis is written as NIfTI-2."""

STORED_AS: Final[dict[np.dtype[Any], np.dtype[Any]]] = {
    np.dtype(bool): np.dtype(np.uint8),
    np.dtype(np.float16): np.dtype(np.float32),
}
"""Types that NIfTI does not have, and those that hold them."""

COMPRESSION_LEVEL: Final = 1
"""ISA-L level 1: labels pack about as well as at zlib's 6, in a twentieth of the time."""

SPACE_UNITS: Final = {0: "unknown", 1: "metres", 2: "mm", 3: "micrometres"}
"""What the lower three bits of xyzt_units say (nifti1.h, NIFTI_UNITS_*)."""


def read_nifti(path: Path, *, max_bytes: int = MAX_UNPACKED_BYTES) -> Volume:
    """Read `.nii` or `.nii.gz` into a Volume (C, I, J, K); a fourth axis holds the channels.

    Integers stay integers where the file has no scaling; everything else becomes float32. Geometry is the sform
    where its code says it is set, else the qform (NIfTI-1 standard, methods 3 and 2). A file with neither has no
    left and right and is refused.

    Raises:
        ScanRefused: codes `scan-missing`, `scan-empty`, `scan-format`, `scan-truncated`, `scan-gzip`,
            `scan-too-large`, `scan-dimensions`, `scan-datatype`, `scan-affine`.
    """
    raw = _read_bounded(path, max_bytes, _unpack)
    header = _parse(path, raw)
    data = _voxels(path, header, raw)  # (I, J, K) or (I, J, K, C)
    if data.ndim == 3:
        data = data[..., np.newaxis]
    return Volume(np.moveaxis(data, -1, 0), _affine(path, header))


def read_grid(path: Path) -> Grid:
    """Read where the voxels of a NIfTI file lie from its header alone; raise as `read_nifti` does for a header."""
    header = _parse(path, _read_bounded(path, MAX_UNPACKED_BYTES, _unpack_header))
    shape = header.get_data_shape()
    if len(shape) not in (3, 4):
        raise ScanRefused("scan-dimensions", f"expected an image of 3 or 4 axes, found {len(shape)} in {path.name}")
    return Grid(shape[:3], _affine(path, header))


def write_nifti(path: Path, volume: Volume) -> None:
    """Write a Volume (labels, probabilities) to `.nii` or `.nii.gz`, whole or not at all, byte-equal for equal input.

    Raises:
        OutputError: `disk-full` or `output-unwritable`.
    """
    from dints_deploy.imaging.lean_nibabel import Nifti1Image, Nifti2Image

    data = volume.data[0] if volume.channels == 1 else np.moveaxis(volume.data, 0, -1)
    data = data.astype(STORED_AS.get(data.dtype, data.dtype), copy=False)
    kind = Nifti1Image if max(data.shape) <= NIFTI1_MAX_AXIS else Nifti2Image
    image = kind(data, volume.affine, dtype=data.dtype)
    image.header.set_xyzt_units("mm")
    image.set_sform(volume.affine, code=1)
    image.set_qform(volume.affine, code=1)
    # A qform cannot hold shear: a sheared grid is told by the sform alone.
    if not Grid(volume.shape, image.get_qform()).same_as(volume.grid):
        image.header["qform_code"] = 0
    raw = image.to_bytes()
    if path.suffix.lower() == ".gz":
        raw = _packed(raw)
    with replacing(path) as partial:
        partial.write_bytes(raw)


def _packed(raw: bytes) -> bytes:
    buffer = io.BytesIO()
    with igzip.IGzipFile(fileobj=buffer, mode="wb", compresslevel=COMPRESSION_LEVEL, mtime=0) as file:
        file.write(raw)
    return buffer.getvalue()


def _read_bounded(path: Path, max_bytes: int, unpack: Callable[[Path, Any, int, int], bytes]) -> bytes:
    """Return what `unpack` makes of the file: its image, or its header."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # asked before opening: opening a pipe waits for its writer
            raise ScanRefused("scan-missing", f"expected a regular file at {path}, found a folder, pipe or device")
        if status.st_size == 0:
            raise ScanRefused("scan-empty", f"expected a NIfTI image, found 0 bytes in {path.name}: copy it again")
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if packed:
                return unpack(path, igzip.IGzipFile(fileobj=file), max_bytes, status.st_size * MAX_EXPANSION)
            return unpack(path, file, max_bytes, status.st_size)
    except (igzip.BadGzipFile, EOFError, igzip_lib.IsalError) as error:  # type: ignore[misc]  # the stub has no class
        code = "scan-truncated" if isinstance(error, EOFError) else "scan-gzip"
        message = f"expected a whole gzip stream in {path.name}, found: {error}: copy the file again"
        raise ScanRefused(code, message) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise ScanRefused("scan-missing", f"expected a readable file at {path}, found: {reason}") from error


def _unpack_header(path: Path, stream: Any, max_bytes: int, available: int) -> bytes:
    """Return the header, which claims no more voxels than the file can hold and may be read."""
    return _header(path, stream, max_bytes, available)[0]


def _header(path: Path, stream: Any, max_bytes: int, available: int) -> tuple[bytes, int]:
    """Return the header, and the bytes that it and its voxels claim."""
    start = stream.read(4)
    header_bytes = HEADER_BYTES.get(start)
    if header_bytes is None:
        raise ScanRefused("scan-format", f"expected a NIfTI image (.nii, .nii.gz), found other content in {path.name}")
    header: bytes = start + stream.read(header_bytes - 4)
    claimed = _claimed_bytes(path, header, header_bytes)
    if claimed > max_bytes:
        raise ScanRefused(
            "scan-too-large", f"expected at most {max_bytes} bytes, the header of {path.name} claims {claimed}"
        )
    if claimed > available:
        raise ScanRefused(
            "scan-truncated", f"expected {claimed} bytes in {path.name}, it holds at most {available}: copy it again"
        )
    return header, claimed


def _unpack(path: Path, stream: Any, max_bytes: int, available: int) -> bytes:
    """Return the header and its voxels; `available` is what the file can hold at most, so that no more is set aside."""
    header, claimed = _header(path, stream, max_bytes, available)
    body: bytes = stream.read(claimed - len(header))
    if len(header) + len(body) < claimed:
        found = len(header) + len(body)
        raise ScanRefused("scan-truncated", f"expected {claimed} bytes in {path.name}, found {found}: copy it again")
    if len(stream.read(TRAILING_BYTES + 1)) > TRAILING_BYTES:
        raise ScanRefused(
            "scan-too-large", f"expected {claimed} bytes in {path.name}, found more than 1 MiB beyond them"
        )
    return header + body


def _claimed_bytes(path: Path, header: bytes, header_bytes: int) -> int:
    """Return the bytes of the file that a header speaks of, itself included."""
    from dints_deploy.imaging.lean_nibabel import HeaderDataError, Nifti1Header, Nifti2Header

    if len(header) < header_bytes:
        raise ScanRefused("scan-truncated", f"expected a header of {header_bytes} bytes in {path.name}: copy it again")
    kind = Nifti1Header if header_bytes == 348 else Nifti2Header
    try:
        parsed = kind(header, check=False)
        shape, item = parsed.get_data_shape(), parsed.get_data_dtype().itemsize
        offset = int(parsed["vox_offset"])
    except (HeaderDataError, ValueError, OverflowError, KeyError) as error:
        raise ScanRefused("scan-format", f"expected a valid NIfTI header in {path.name}, found: {error}") from error
    if any(n < 1 for n in shape) or offset < header_bytes:
        raise ScanRefused(
            "scan-format",
            f"expected positive sizes and voxels after the header in {path.name}, found {shape}, {offset}",
        )
    claimed: int = offset + item * math.prod(int(n) for n in shape)
    return claimed


def _parse(path: Path, raw: bytes) -> Any:
    """Return the checked header. Its extensions are not looked at: nibabel would hand some to a DICOM parser."""
    from dints_deploy.imaging.lean_nibabel import HeaderDataError, Nifti1Header, Nifti2Header

    header_bytes = HEADER_BYTES[raw[:4]]
    kind = Nifti1Header if header_bytes == 348 else Nifti2Header
    quiet = logging.Logger(__name__)  # nibabel's remarks about a header would be lines beside the refusal
    quiet.addHandler(logging.NullHandler())
    try:
        header = kind(raw[:header_bytes], check=False)
        header.check_fix(logger=quiet)
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise ScanRefused("scan-format", f"expected a valid NIfTI header in {path.name}, found: {error}") from error
    return header


def _voxels(path: Path, header: Any, raw: bytes) -> NDArray[Any]:
    from dints_deploy.imaging.lean_nibabel import ArrayProxy, HeaderDataError

    dtype, shape = header.get_data_dtype(), header.get_data_shape()
    if dtype.kind not in "fiu":
        raise ScanRefused("scan-datatype", f"expected real voxels in {path.name}, found {dtype} (complex or colour)")
    if len(shape) not in (3, 4):
        raise ScanRefused(
            "scan-dimensions", f"expected a 3-D image, or 4-D with channels, found {len(shape)}-D in {path.name}"
        )
    try:
        stored = ArrayProxy(io.BytesIO(raw), header)
    except HeaderDataError as error:
        raise ScanRefused("scan-format", f"expected a valid scaling in {path.name}, found: {error}") from error
    if dtype.kind in "iu" and (stored.slope, stored.inter) == (1.0, 0.0):
        return np.asarray(stored).astype(dtype.newbyteorder("="), copy=False)
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit becomes inf and is refused by name later
        return np.asarray(stored, dtype=np.float64 if dtype.itemsize > 4 else np.float32).astype(np.float32)


def _affine(path: Path, header: Any) -> NDArray[np.float64]:
    from dints_deploy.imaging.lean_nibabel import HeaderDataError

    try:
        sform, sform_code = header.get_sform(coded=True)
        qform, qform_code = header.get_qform(coded=True)
    except (HeaderDataError, ValueError) as error:
        raise ScanRefused("scan-affine", f"expected a valid qform in {path.name}, found: {error}") from error
    code = int(header["xyzt_units"]) % 8  # the higher bits are the unit of time; nibabel fails on codes without a name
    if (unit := SPACE_UNITS.get(code, f"the unknown unit {code}")) not in ("mm", "unknown"):
        raise ScanRefused("scan-affine", f"expected millimetres in {path.name}, found {unit}: convert the header")
    if sform is None and qform is None:
        raise ScanRefused(
            "scan-affine",
            f"expected an sform or a qform in {path.name}, found neither: left and right are unknown: convert it again",
        )
    if sform is None or qform is None:
        return np.array(qform if sform is None else sform, dtype=np.float64)
    if np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0:
        raise ScanRefused(
            "scan-affine", f"expected sform and qform of {path.name} to agree on left and right: repair the header"
        )
    shape = header.get_data_shape()[:3]
    if sform_code == qform_code and not Grid(shape, sform).same_as(
        Grid(shape, qform), 0.5 * min(Grid(shape, qform).spacing)
    ):
        raise ScanRefused(
            "scan-affine", f"expected sform and qform of {path.name} to agree, found them apart: repair the header"
        )
    return np.array(sform, dtype=np.float64)
