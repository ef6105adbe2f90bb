"""One image plane as a header describes it: where it lies (LPS mm) and how its pixels are stored. No identifiers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Patient coordinates of DICOM (left, posterior, superior) to RAS."""


DEFLATED: Final = "1.2.840.10008.1.2.1.99"
BIG_ENDIAN: Final = "1.2.840.10008.1.2.2"
NATIVE: Final = frozenset({"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", BIG_ENDIAN, DEFLATED})
"""Transfer syntaxes whose pixels lie in the file, or in the inflated data set, as they are (PS3.5 A.1 to A.3, A.5)."""


@dataclass(frozen=True)
class PixelLayout:
    """How the pixels of one file are stored (PS3.3 C.7.6.3, PS3.5 section 8). Zero or empty: missing from the header.

    Attributes:
        vr: value representation of the pixel element; empty where there is none.
        offset: where the element's value starts, in the file or in the inflated data set of a deflated file.
        length: bytes of the value as the header says; -1 for encapsulated frames.
        available: bytes from `offset` to the end of the file; -1 in a deflated file.
    """

    TransferSyntaxUID: str
    Rows: int = 0
    Columns: int = 0
    NumberOfFrames: int = 1
    SamplesPerPixel: int = 1
    BitsAllocated: int = 0
    BitsStored: int = 0
    HighBit: int = 0
    PixelRepresentation: int = 0
    PhotometricInterpretation: str = ""
    vr: str = ""
    offset: int = 0
    length: int = 0
    available: int = 0

    @property
    def frame_bytes(self) -> int:
        """Return the bytes of one frame as it is stored without compression."""
        return self.Rows * self.Columns * self.SamplesPerPixel * self.BitsAllocated // 8


@dataclass(frozen=True)
class SliceHeader:
    """One image plane: a single-frame file, or one frame of a multi-frame file.

    Attributes:
        path: the file.
        frame: 0-based frame in the file.
        ImageOrientationPatient: LPS cosines of a row (towards higher columns), then of a column (PS3.3 C.7.6.2.1.1).
        ImagePositionPatient: LPS mm of the centre of the first pixel.
        PixelSpacing: mm between rows, then between columns (PS3.3 10.7.1.3).
        modality_lut: whether values go through a Modality LUT Sequence (PS3.3 C.11.1).
        lossy: whether the pixels ever went through lossy compression.
        volume_of: what separates the volumes of one series (acquisition, echo, time, b-value, stack, image type).
        invalid: keywords of attributes that are there and make no sense.
    """

    path: Path
    frame: int
    layout: PixelLayout
    SOPInstanceUID: str
    SOPClassUID: str
    Modality: str = ""
    InstanceNumber: int | None = None
    FrameOfReferenceUID: str = ""
    ImageType: tuple[str, ...] = ()
    ImageOrientationPatient: tuple[float, ...] | None = None
    ImagePositionPatient: tuple[float, ...] | None = None
    PixelSpacing: tuple[float, ...] | None = None
    SliceThickness: float | None = None
    SpacingBetweenSlices: float | None = None
    GantryDetectorTilt: float | None = None
    RescaleSlope: float | None = None
    RescaleIntercept: float | None = None
    RescaleType: str = ""
    modality_lut: bool = False
    PixelPaddingValue: int | None = None
    PixelPaddingRangeLimit: int | None = None
    lossy: bool = False
    volume_of: tuple[tuple[str, str], ...] = ()
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
