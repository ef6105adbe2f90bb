"""One image plane as a header describes it: where it lies (LPS mm) and how its pixels are stored. No identifiers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Patient coordinates of DICOM (left, posterior, superior) to RAS."""


@dataclass(frozen=True)
class PixelLayout:
    """How the pixels of one file are stored (PS3.3 C.7.6.3, PS3.5 section 8).

    Attributes:
        offset: where in the file the pixel data element starts (for a deflated file: in the inflated data set).
    """

    TransferSyntaxUID: str
    Rows: int
    Columns: int
    NumberOfFrames: int
    SamplesPerPixel: int
    BitsAllocated: int
    BitsStored: int
    PixelRepresentation: int
    PhotometricInterpretation: str
    offset: int

    @property
    def frame_pixels(self) -> int:
        """Return the number of pixels of one frame."""
        return self.Rows * self.Columns


@dataclass(frozen=True)
class SliceHeader:
    """One image plane: a single-frame file, or one frame of a multi-frame file.

    Attributes:
        path: the file.
        frame: 0-based frame in the file.
        PixelSpacing: mm between rows, then between columns (PS3.3 10.7.1.3).
        ImageOrientationPatient: LPS cosines of a row (towards higher columns), then of a column (PS3.3 C.7.6.2.1.1).
        ImagePositionPatient: LPS mm of the centre of the first pixel.
        stack: whatever separates the volumes of one series (acquisition, echo, time, b-value, stack id).
    """

    path: Path
    frame: int
    layout: PixelLayout
    SOPInstanceUID: str
    SOPClassUID: str
    InstanceNumber: int | None = None
    FrameOfReferenceUID: str | None = None
    ImageOrientationPatient: tuple[float, ...] | None = None
    ImagePositionPatient: tuple[float, ...] | None = None
    PixelSpacing: tuple[float, ...] | None = None
    SliceThickness: float | None = None
    SpacingBetweenSlices: float | None = None
    GantryDetectorTilt: float | None = None
    RescaleSlope: float | None = None
    RescaleIntercept: float | None = None
    modality_lut: bool = False
    PixelPaddingValue: int | None = None
    PixelPaddingRangeLimit: int | None = None
    ImageType: tuple[str, ...] = ()
    lossy: bool = False
    stack: tuple[str, ...] = ()
    invalid: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plane:
    """An image plane whose place in the patient is known. Built by the gate, valid once built.

    Attributes:
        header: where it came from.
        row: LPS unit vector along a row, towards higher columns.
        column: LPS unit vector along a column, towards higher rows; orthogonal to `row`.
        position: LPS mm of the centre of the first pixel.
        between_rows: mm from one row to the next.
        between_columns: mm from one column to the next.
    """

    header: SliceHeader
    row: tuple[float, float, float]
    column: tuple[float, float, float]
    position: tuple[float, float, float]
    between_rows: float
    between_columns: float

    @property
    def affine(self) -> NDArray[np.float64]:
        """Return the 4x4 that maps (column, row, mm along the normal, 1) to LPS mm (PS3.3 equation C.7.6.2.1-1)."""
        affine = np.eye(4)
        affine[:3, 0] = np.multiply(self.row, self.between_columns)
        affine[:3, 1] = np.multiply(self.column, self.between_rows)
        affine[:3, 2] = np.cross(self.row, self.column)
        affine[:3, 3] = self.position
        return affine
