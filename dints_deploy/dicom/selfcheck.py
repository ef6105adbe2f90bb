"""The check before an object may exist: every voxel of the written file, mapped to the patient, is that of the mask.

What was written is read by `readback`; where it lies is taken from the written values and from the source's headers as
they stand, not from the code that placed the planes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset

from dints_deploy.dicom.bounded import INVALID_FILE, quiet
from dints_deploy.dicom.header import LPS_TO_RAS
from dints_deploy.dicom.read import as_planes
from dints_deploy.dicom.readback import header_affine, inside_box, rtstruct_polygons, seg_planes
from dints_deploy.dicom.result import DicomResult
from dints_deploy.errors import OutputError

SAME_PLACE_MM: Final = 0.01
"""How far a written plane's first pixel may lie from its source's: above the rounding of decimal strings."""

SAME_PLACE_PIXELS: Final = 0.25
"""How far its last pixels may: a SEG has one orientation and spacing, those of its slices differ by rounding."""

TIE: Final = 2e-3
"""Voxels this close to the middle between two: either is the nearest (decimal strings have 16 characters)."""

SEPARABLE: Final = 1e-3
"""Voxels that a plane's rows may lean against the grid's axes to be mapped axis by axis."""


def check_seg(path: Path, result: DicomResult) -> None:
    """Compare a written SEG with the mask in patient space, every pixel of every source plane.

    Raises:
        OutputError: `output-selfcheck`.
    """
    with _reading("SEG", path) as seg:
        planes = seg_planes(seg)
        numbers = [number for one in seg.SegmentSequence if (number := int(one.SegmentNumber))]  # 0: background
    _expect(numbers == list(range(1, len(result.entry.labels) + 1)), "SEG", "its segments are not the entry's labels")
    sources = {(plane.header.SOPInstanceUID, plane.header.frame): plane for plane in result.planes}
    _expect(set(planes) <= set(sources), "SEG", "a frame refers to an image that is no source")
    for name, frame in planes.items():
        off = apart(frame.affine, header_affine(sources[name].header), frame.segments.shape)
        _expect(off <= 1, "SEG", "a frame lies elsewhere than its source")
    _compare("SEG", {name: (frame.affine, frame.segments) for name, frame in planes.items()}, result)


def check_rtstruct(path: Path, result: DicomResult) -> None:
    """Compare a written RTSTRUCT with the mask: a pixel is inside the contours exactly where the mask is.

    Raises:
        OutputError: `output-selfcheck`.
    """
    with _reading("RTSTRUCT", path) as plan:
        polygons = list(rtstruct_polygons(plan))
    sources = {(plane.header.SOPInstanceUID, plane.header.frame): plane for plane in result.planes}
    affines = {name: header_affine(plane.header) for name, plane in sources.items()}
    shape = result.segments.shape[1:]
    written: dict[tuple[str, int], NDArray[np.uint16]] = {}
    for number, name, corners in polygons:
        _expect(name in sources, "RTSTRUCT", "a contour refers to an image that is no source")
        to_plane = np.linalg.inv(affines[name])
        local = corners @ to_plane[:3, :3].T + to_plane[:3, 3]
        _expect(float(np.abs(local[:, 2]).max()) <= SAME_PLACE_MM, "RTSTRUCT", "a contour lies beside its source plane")
        if name not in written:
            written[name] = np.zeros(shape, dtype=np.uint16)
        box, filled = inside_box(local[:, :2], (shape[0], shape[1]))
        part = written[name][box]
        _expect(not part[filled].any(), "RTSTRUCT", "contours overlap")
        part[filled] = number
    _compare("RTSTRUCT", {name: (affines[name], plane) for name, plane in written.items()}, result)


def check_values(path: Path, expected: Dataset, kind: str) -> None:
    """Compare a written report or picture with the data set that was meant: read back, it has the same elements.

    Raises:
        OutputError: `output-selfcheck`.
    """
    with _reading(kind, path) as written:
        _expect(written.to_json_dict() == expected.to_json_dict(), kind, "it does not read back as it was meant")


def _compare(
    kind: str, written: dict[tuple[str, int], tuple[NDArray[np.float64], NDArray[np.uint16]]], result: DicomResult
) -> None:
    """Compare segment numbers on source planes with the labels of the voxels that their pixels lie in."""
    numbers = {label.value: number for number, label in enumerate(result.entry.labels, start=1)}
    highest = int(result.labels.data.max())
    table = np.array([numbers.get(value, 0) for value in range(highest + 1)], dtype=np.uint16)
    mask = as_planes(result.labels.data[0])  # (K, J, I)
    to_voxel = np.linalg.inv(result.labels.affine) @ LPS_TO_RAS
    nothing = np.zeros(result.segments.shape[1:], dtype=np.uint16)
    found = 0
    for plane in result.planes:
        name = plane.header.SOPInstanceUID, plane.header.frame
        affine, segments = written.get(name, (header_affine(plane.header), nothing))
        wrong = _mismatches(segments, to_voxel @ affine, mask, table)
        _expect(wrong == 0, kind, f"{wrong} pixels of a plane differ from the mask")
        found += int(np.count_nonzero(segments))
    lost = int(np.count_nonzero(mask)) - found
    # A source's own voxels are on its planes one by one; a regular grid has others between them.
    _expect(result.volume.regularised or lost == 0, kind, f"{lost} voxels of the mask are missing")


def _mismatches(
    segments: NDArray[np.uint16], matrix: NDArray[np.float64], mask: NDArray[Any], table: NDArray[np.uint16]
) -> int:
    """Count the pixels whose segment is not that of the nearest voxel.

    Args:
        segments: (rows, columns) as written.
        matrix: maps (column, row, 0, 1) to (i, j, k).
        mask: (K, J, I) label values.
        table: label value -> segment number.
    """
    rows, columns = segments.shape
    lean = np.abs([matrix[0, 1] * rows, matrix[1, 0] * columns, matrix[2, 0] * columns, matrix[2, 1] * rows]).max()
    if lean < SEPARABLE:
        i, j = (matrix[axis, axis] * np.arange(n) + matrix[axis, 3] for axis, n in enumerate((columns, rows)))
        expected = _lookup(mask, table, *np.ix_(i, j, matrix[2, 3:])).reshape(columns, rows).T
    else:
        column, row = np.meshgrid(np.arange(columns), np.arange(rows))
        expected = _lookup(mask, table, *(m[0] * column + m[1] * row + m[3] for m in matrix[:3]))
    r, c = np.nonzero(expected != segments)
    if not r.size:
        return 0
    place = matrix[:3, :2] @ np.stack([c, r]) + matrix[:3, 3:]  # (3, n) of what differs: ties may fall either way
    agreed = np.zeros(r.size, dtype=bool)
    for way in itertools.product((-TIE, TIE), repeat=3):
        agreed |= _lookup(mask, table, *(place + np.array(way)[:, np.newaxis])) == segments[r, c]
    return int(np.count_nonzero(~agreed))


def _lookup(mask: NDArray[Any], table: NDArray[np.uint16], *place: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Return the segment numbers of the voxels of `mask` (K, J, I) nearest to `place`; none outside.

    Args:
        place: i, j and k, three arrays that broadcast.
    """
    voxel = [np.rint(one).astype(np.intp) for one in place]
    bounds = list(zip(voxel, mask.shape[::-1], strict=True))
    i, j, k = (np.clip(one, 0, size - 1) for one, size in bounds)
    segments: NDArray[np.uint16] = table[mask[k, j, i]]
    for one, size in bounds:
        segments *= (one >= 0) & (one < size)
    return segments


def apart(written: NDArray[np.float64], source: NDArray[np.float64], shape: tuple[int, ...]) -> float:
    """Return how far two planes lie from each other, as a multiple of what is tolerated."""
    first = float(np.linalg.norm((written - source)[:3, 3]))
    pixel = np.linalg.norm(source[:3, :2], axis=0).min()
    return float(max(first / SAME_PLACE_MM, corner_mm(written, source, shape) / (SAME_PLACE_PIXELS * pixel)))


def corner_mm(written: NDArray[np.float64], source: NDArray[np.float64], shape: tuple[int, ...]) -> float:
    """Return how far the corners (first and last pixels) of two planes lie from each other, at most."""
    corners = np.array([[c, r, 0, 1] for c in (0, shape[1] - 1) for r in (0, shape[0] - 1)], dtype=np.float64).T
    return float(np.linalg.norm(((written - source) @ corners)[:3], axis=0).max())


@contextlib.contextmanager
def _reading(kind: str, path: Path) -> Iterator[Any]:
    """Yield the written data set; whatever cannot be read fails the check, without a value of it in the message."""
    try:
        with quiet():
            yield dcmread(path)
    except INVALID_FILE as error:
        raise _failed(kind, f"it cannot be read back ({type(error).__name__})") from None


def _expect(condition: bool, kind: str, what: str) -> None:
    if not condition:
        raise _failed(kind, what)


def _failed(kind: str, what: str) -> OutputError:
    return OutputError(
        "output-selfcheck", f"expected the written {kind} to be the mask in patient space: {what}: report it"
    )
