"""Where the planes lie: from headers to planes of one common orientation, spacing and matrix, or findings why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dints_deploy.dicom.findings import Finding, finding
from dints_deploy.dicom.header import Plane, SliceHeader

UNIT_TOLERANCE: Final = 1e-3
"""How far cosines may be from two orthogonal unit vectors: header values are rounded to few digits."""

PARALLEL_TOLERANCE: Final = 2e-4
"""How far the cosines of two slices may differ: 0.1 mm over a field of view of 500 mm."""

SPACING_TOLERANCE: Final = 1e-4
"""How far the logarithms of the pixel spacings of two slices may differ: 0.05 mm over a field of view of 500 mm."""

SQUARE_TOLERANCE: Final = 1e-3
"""How far row and column spacing may differ, relative, for pixels to be called square."""

SMALLEST_MM: Final = 1e-3
LARGEST_MM: Final = 1e3
"""Pixel spacings outside these are no image of a patient."""

FARTHEST_MM: Final = 1e4
"""Positions farther from the origin are no place in a scanner."""

MIXED: Final[tuple[tuple[str, str, Callable[[SliceHeader], Any], float], ...]] = (
    ("dicom-mixed-matrix", "rows and columns", lambda header: (header.layout.Rows, header.layout.Columns), 0.0),
    ("dicom-mixed-orientation", "orientation", lambda header: header.ImageOrientationPatient, PARALLEL_TOLERANCE),
    ("dicom-mixed-spacing", "pixel spacing", lambda header: np.log(header.PixelSpacing or ()), SPACING_TOLERANCE),
)
"""What all planes of a volume share: code, name, value and tolerance."""


def place(slices: Sequence[SliceHeader]) -> tuple[list[Plane], list[Finding]]:
    """Return the planes, in the order of `slices`, or none and the reasons (PS3.3 C.7.6.2.1.1)."""
    reasons = [*_missing(slices)]
    if not reasons:
        reasons = [*_impossible(slices)]
    if not reasons:
        reasons = [*_mixed(slices)]
    if reasons:
        return [], reasons
    planes = [_plane(header) for header in slices]
    rows, columns = planes[0].between_rows, planes[0].between_columns
    notes = []
    if abs(rows - columns) > SQUARE_TOLERANCE * max(rows, columns):
        message = f"the pixels are not square: {rows:g} mm between rows, {columns:g} mm between columns"
        notes.append(finding("dicom-non-square", message, tuple(range(len(planes)))))
    return planes, notes


def _missing(slices: Sequence[SliceHeader]) -> Iterator[Finding]:
    """Yield the attributes that place a plane and are not there."""
    for code, keyword in (
        ("dicom-position", "ImagePositionPatient"),
        ("dicom-orientation", "ImageOrientationPatient"),
        ("dicom-spacing", "PixelSpacing"),
    ):
        if concerned := tuple(i for i, header in enumerate(slices) if getattr(header, keyword) is None):
            message = f"expected {keyword} in every slice, found none in {len(concerned)}: choose another series"
            yield finding(code, message, concerned)


def _impossible(slices: Sequence[SliceHeader]) -> Iterator[Finding]:
    """Yield values that cannot be: cosines that are no orthogonal unit vectors, spacings that are not positive."""
    cosines = _values(slices, lambda header: header.ImageOrientationPatient).clip(-2, 2).reshape(-1, 2, 3)
    gram = np.einsum("nai,nbi->nab", cosines, cosines)  # (n, 2, 2)
    crooked = np.flatnonzero(np.abs(gram - np.eye(2)).max(axis=(1, 2)) > 2 * UNIT_TOLERANCE)
    if crooked.size:
        message = "expected two orthogonal unit vectors as orientation, found others: repair the header"
        yield finding("dicom-orientation", message, tuple(crooked.tolist()))
    spacings = _values(slices, lambda header: header.PixelSpacing)
    flat = np.flatnonzero(~((spacings > SMALLEST_MM) & (spacings < LARGEST_MM)).all(axis=1))
    if flat.size:
        message = "expected a pixel spacing between a micrometre and a metre, found another: repair the header"
        yield finding("dicom-spacing", message, tuple(flat.tolist()))
    positions = _values(slices, lambda header: header.ImagePositionPatient)
    far = np.flatnonzero(np.abs(positions).max(axis=1) > FARTHEST_MM)
    if far.size:
        message = "expected slices within ten metres of the origin, found others: repair the header"
        yield finding("dicom-position", message, tuple(far.tolist()))


def _mixed(slices: Sequence[SliceHeader]) -> Iterator[Finding]:
    """Yield in what the planes differ from the commonest value, and which planes."""
    frames = [header.FrameOfReferenceUID for header in slices]
    numbered = np.unique(frames, return_inverse=True)[1].astype(np.float64)
    if odd := _odd_ones(numbered[:, np.newaxis], 0.0):
        message = "expected one frame of reference, found several: the slices cannot be placed together"
        yield finding("dicom-mixed-frame", message, odd)
    for code, name, value, tolerance in MIXED:
        if odd := _odd_ones(_values(slices, value), tolerance):
            message = f"expected one {name} in all slices, found {len(odd)} of {len(slices)} that differ: separate them"
            yield finding(code, message, odd)


def _odd_ones(values: NDArray[np.float64], tolerance: float) -> tuple[int, ...]:
    """Return the rows of `values` that differ by more than `tolerance` from the commonest row."""
    rounded = np.round(values / (tolerance or 1.0)).astype(np.int64)
    _, first, counts = np.unique(rounded, axis=0, return_index=True, return_counts=True)
    reference = values[first[np.argmax(counts)]]
    return tuple(np.flatnonzero(np.abs(values - reference).max(axis=1) > tolerance).tolist())


def _values(slices: Sequence[SliceHeader], value: Callable[[SliceHeader], Any]) -> NDArray[np.float64]:
    return np.array([value(header) for header in slices], dtype=np.float64)


def _plane(header: SliceHeader) -> Plane:
    """Return a plane with cosines of length one, so that spacings are exactly the header's."""
    row, column = _values([header], lambda one: one.ImageOrientationPatient).reshape(2, 3)
    x, y, z = header.ImagePositionPatient or (0.0, 0.0, 0.0)
    between_rows, between_columns = header.PixelSpacing or (1.0, 1.0)
    return Plane(header, _unit(row), _unit(column), (x, y, z), between_rows, between_columns)


def _unit(vector: NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = (vector / np.linalg.norm(vector)).tolist()
    return x, y, z
