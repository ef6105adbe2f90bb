"""Read written objects back with pydicom alone, frame by frame, by none of the code that wrote them.

Data sets are `Any` here: the attributes of an object that was read may be there or not; callers catch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dints_deploy.dicom.header import SliceHeader

LABELMAP_CLASS: Final = "1.2.840.10008.5.1.4.1.1.66.7"
SEG_CLASSES: Final = ("1.2.840.10008.5.1.4.1.1.66.4", LABELMAP_CLASS)


@dataclass(frozen=True, eq=False)
class WrittenFrame:
    """One frame of a SEG.

    Attributes:
        affine: 4x4, (column, row, 0, 1) to LPS mm (PS3.3 equation C.7.6.2.1-1).
        source: SOPInstanceUID and frame (from 0) of the image that it was derived from.
        segments: (rows, columns) segment numbers.
    """

    affine: NDArray[np.float64]
    source: tuple[str, int]
    segments: NDArray[np.uint16]


def seg_frames(seg: Any) -> Iterator[WrittenFrame]:
    """Yield the frames of a SEG.

    Raises:
        ValueError, AttributeError, ...: those of pydicom for an object that is none.
    """
    count, rows, columns = int(seg.NumberOfFrames), int(seg.Rows), int(seg.Columns)
    pixels = _frames(seg, count, rows * columns)
    shared = seg.SharedFunctionalGroupsSequence[0]
    if len(seg.PerFrameFunctionalGroupsSequence) != count:
        raise ValueError("expected functional groups for every frame")
    for groups, frame in zip(seg.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        sets = (groups, shared)
        position = _macro(sets, "PlanePositionSequence").ImagePositionPatient
        cosines = _macro(sets, "PlaneOrientationSequence").ImageOrientationPatient
        spacing = _macro(sets, "PixelMeasuresSequence").PixelSpacing
        source = _macro((_macro(sets, "DerivationImageSequence"),), "SourceImageSequence")
        segments = frame.reshape(rows, columns).astype(np.uint16)
        if seg.SOPClassUID != LABELMAP_CLASS:
            segments *= int(_macro(sets, "SegmentIdentificationSequence").ReferencedSegmentNumber)
        name = str(source.ReferencedSOPInstanceUID), int(source.get("ReferencedFrameNumber", 1)) - 1
        yield WrittenFrame(plane_affine(position, cosines, spacing), name, segments)


def seg_planes(seg: Any) -> dict[tuple[str, int], WrittenFrame]:
    """Return the frames of a SEG put together by source plane.

    Raises:
        ValueError: segments overlap, or frames of one source plane lie at different places.
    """
    planes: dict[tuple[str, int], WrittenFrame] = {}
    for frame in seg_frames(seg):
        before = planes.setdefault(frame.source, frame)
        if before is frame:
            continue
        if not np.array_equal(before.affine, frame.affine) or (before.segments.astype(bool) & frame.segments).any():
            raise ValueError("expected frames of one plane that do not overlap")
        np.add(before.segments, frame.segments, out=before.segments)
    return planes


def rtstruct_polygons(plan: Any) -> Iterator[tuple[int, tuple[str, int], NDArray[np.float64]]]:
    """Yield ROI number, source plane and corners (n, 3) LPS mm of every contour of an RTSTRUCT (PS3.3 C.8.8.6)."""
    for roi in plan.ROIContourSequence:
        for contour in roi.get("ContourSequence") or []:
            if contour.ContourGeometricType != "CLOSED_PLANAR":
                raise ValueError("expected closed planar contours")
            image = contour.ContourImageSequence[0]
            name = str(image.ReferencedSOPInstanceUID), int(image.get("ReferencedFrameNumber", 1)) - 1
            text = bytes(contour.get_item("ContourData").value)  # not converted: thirty times faster
            corners = np.array(text.split(b"\\"), dtype=np.float64).reshape(int(contour.NumberOfContourPoints), 3)
            yield int(roi.ReferencedROINumber), name, corners


def plane_affine(position: Any, cosines: Any, spacing: Any) -> NDArray[np.float64]:
    """Return the 4x4 that maps (column, row, mm along the normal, 1) to LPS mm, from values of a data set."""
    row, column = np.array(cosines, dtype=np.float64).reshape(2, 3)
    affine = np.eye(4)
    affine[:3, 0] = row * float(spacing[1])  # PixelSpacing: between rows, then between columns (PS3.3 10.7.1.3)
    affine[:3, 1] = column * float(spacing[0])
    affine[:3, 2] = np.cross(row, column)
    affine[:3, 3] = np.array(position, dtype=np.float64)
    return affine


def header_affine(header: SliceHeader) -> NDArray[np.float64]:
    """Return the same map of a source plane, from the values of its header; cosines are made unit vectors."""
    cosines = np.array(header.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    cosines /= np.linalg.norm(cosines, axis=1, keepdims=True)
    return plane_affine(header.ImagePositionPatient, cosines, header.PixelSpacing)


def inside(polygon: NDArray[np.floating[Any]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which pixel centres (rows, columns) lie inside a polygon (n, 2) of columns and rows: odd crossings."""
    filled = np.zeros(shape, dtype=bool)
    box, part = inside_box(polygon, shape)
    filled[box] = part
    return filled


def inside_box(
    polygon: NDArray[np.floating[Any]], shape: tuple[int, int]
) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """Return the part of a plane (rows, columns) that a polygon reaches, and which of its pixel centres are inside."""
    left, top = np.maximum(np.ceil(polygon.min(axis=0)), 0).astype(int).tolist()
    right, bottom = np.minimum(np.floor(polygon.max(axis=0)) + 1, [shape[1], shape[0]]).astype(int).tolist()
    right, bottom = max(left, right), max(top, bottom)
    part = _odd_crossings(polygon - np.array([left, top]), bottom - top, right - left)
    return (slice(top, bottom), slice(left, right)), part


def _odd_crossings(polygon: NDArray[np.floating[Any]], rows: int, columns: int) -> NDArray[np.bool_]:
    x1, y1 = polygon.T
    x2, y2 = np.roll(polygon, -1, axis=0).T
    first = np.floor(np.minimum(y1, y2)).astype(int) + 1
    count = np.floor(np.maximum(y1, y2)).astype(int) - first + 1  # rows that each edge crosses
    edge = np.repeat(np.arange(len(polygon)), count)
    row = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
    x = x1[edge] + (row - y1[edge]) * (x2[edge] - x1[edge]) / (y2[edge] - y1[edge])
    column = np.clip(np.floor(x).astype(int) + 1, 0, columns)  # the first centre right of the edge
    within = (row >= 0) & (row < rows)
    flips = np.zeros((rows, columns + 1), dtype=np.uint8)
    np.bitwise_xor.at(flips, (row[within], column[within]), 1)
    return np.bitwise_xor.accumulate(flips, axis=1)[:, :columns].astype(bool)


def _frames(seg: Any, count: int, size: int) -> Iterator[NDArray[Any]]:
    """Yield the values of one frame after the other: all together, unpacked, take eight times the file."""
    if seg.BitsAllocated != 1:
        values = np.frombuffer(seg.PixelData, dtype=f"<u{int(seg.BitsAllocated) // 8}")
        yield from values[: count * size].reshape(count, size)
        return
    packed = np.frombuffer(seg.PixelData, dtype=np.uint8)  # first pixel in the lowest bit (PS3.5 8.1.1)
    if packed.size * 8 < count * size:
        raise ValueError("expected the pixels of every frame")
    for first in range(0, count * size, size):  # a frame may begin within a byte
        bits = np.unpackbits(packed[first // 8 : (first + size + 7) // 8], bitorder="little")
        yield bits[first % 8 : first % 8 + size]


def _macro(sets: tuple[Any, ...], keyword: str) -> Any:
    for one in sets:
        if keyword in one:
            return one[keyword].value[0]
    raise ValueError(f"expected a {keyword}")
