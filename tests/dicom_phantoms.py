"""Synthetic DICOM series whose every pixel has a known place in the patient, and the folder of real ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

CT = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
MARK = "ZZPATIENTMARKER"
"""What stands in every attribute that identifies a patient: it may appear in no message."""

Change = Callable[[Dataset, int], None]
"""Alters the data set of one slice before it is written; the slice is its index in the phantom."""


@dataclass(frozen=True)
class Phantom:
    """A stack of planes in LPS mm.

    Attributes:
        pixels: (planes, rows, columns) stored values.
        positions: (planes, 3) LPS mm of each plane's first pixel.
    """

    pixels: NDArray[Any]
    positions: NDArray[np.float64]
    row: tuple[float, ...] = (1.0, 0.0, 0.0)
    column: tuple[float, ...] = (0.0, 1.0, 0.0)
    between_rows: float = 1.0
    between_columns: float = 1.0
    slope: float = 1.0
    intercept: float = 0.0

    def ras(self) -> NDArray[np.float64]:
        """Return the place of every pixel: (planes, rows, columns, 3) RAS mm, from PS3.3 equation C.7.6.2.1-1."""
        _, rows, columns = self.pixels.shape
        along_row = np.arange(columns)[:, np.newaxis] * self.between_columns * np.array(self.row)  # (columns, 3)
        along_column = np.arange(rows)[:, np.newaxis] * self.between_rows * np.array(self.column)  # (rows, 3)
        lps = self.positions[:, np.newaxis, np.newaxis] + along_column[:, np.newaxis] + along_row
        ras: NDArray[np.float64] = lps * [-1.0, -1.0, 1.0]
        return ras

    def values(self) -> NDArray[np.float64]:
        """Return the modality values (planes, rows, columns)."""
        values: NDArray[np.float64] = self.pixels * self.slope + self.intercept
        return values


def straight(
    planes: int = 5, rows: int = 6, columns: int = 7, *, step: float = 2.0, seed: int = 0, **changes: Any
) -> Phantom:
    """Return an even stack above each other with random values, along the normal of its rows and columns."""
    pixels = np.random.default_rng(seed).integers(0, 4000, (planes, rows, columns)).astype(np.uint16)
    phantom = replace(Phantom(pixels, np.zeros((planes, 3))), **changes)
    normal = np.cross(phantom.row, phantom.column)
    return replace(phantom, positions=np.arange(planes)[:, np.newaxis] * step * normal)


def dataset(phantom: Phantom, index: int, *, series: str, study: str, frame: str) -> Dataset:
    """Return one plane as a CT image, with marked identifiers."""
    ds = _common(phantom, series=series, study=study, frame=frame)
    ds.SOPClassUID = CT
    ds.SOPInstanceUID = generate_uid(entropy_srcs=[series, str(index)])
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.InstanceNumber = index + 1
    ds.ImageOrientationPatient = _decimals([*phantom.row, *phantom.column])
    ds.ImagePositionPatient = _decimals(phantom.positions[index])
    ds.PixelSpacing = _decimals([phantom.between_rows, phantom.between_columns])
    ds.RescaleSlope, ds.RescaleIntercept = _decimals([phantom.slope, phantom.intercept])
    ds.add_new("PixelData", "OW", phantom.pixels[index].tobytes())
    return ds


def write(
    folder: Path,
    phantom: Phantom,
    *,
    order: Sequence[int] | None = None,
    change: Change | None = None,
    syntax: str = ExplicitVRLittleEndian,
    name: str = "series",
) -> list[Path]:
    """Write a phantom as single-frame CT files; `order` says which plane is which file and instance number."""
    folder.mkdir(parents=True, exist_ok=True)
    uids = {key: generate_uid(entropy_srcs=[name, key]) for key in ("series", "study", "frame")}
    paths = []
    for number, index in enumerate(order if order is not None else range(len(phantom.pixels))):
        ds = dataset(phantom, index, **uids)
        ds.InstanceNumber = number + 1
        if change is not None:
            change(ds, index)
        paths.append(folder / f"{number:04d}.dcm")
        save(ds, paths[-1], syntax=syntax)
    return paths


def write_enhanced(path: Path, phantom: Phantom, *, change: Callable[[Dataset], None] | None = None) -> Path:
    """Write a phantom as one enhanced CT file, rescale and position per frame, the rest shared."""
    ds = _common(phantom, series=generate_uid(), study=generate_uid(), frame=generate_uid())
    ds.SOPClassUID, ds.SOPInstanceUID, ds.InstanceNumber = ENHANCED_CT, generate_uid(), 1
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    ds.NumberOfFrames = len(phantom.pixels)
    measures, orientation, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = _decimals([phantom.between_rows, phantom.between_columns])
    orientation.ImageOrientationPatient = _decimals([*phantom.row, *phantom.column])
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Items([measures]), Items([orientation])
    ds.SharedFunctionalGroupsSequence = Items([shared])
    ds.PerFrameFunctionalGroupsSequence = Items([_frame(phantom, index) for index in range(len(phantom.pixels))])
    ds.add_new("PixelData", "OW", phantom.pixels.tobytes())
    if change is not None:
        change(ds)
    save(ds, path)
    return path


def save(ds: Dataset, path: Path, *, syntax: str = ExplicitVRLittleEndian) -> None:
    """Write a data set as a PS3.10 file."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ds.get("SOPClassUID", CT)
    meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID", "1.2.3")
    meta.TransferSyntaxUID = syntax
    ds.file_meta = meta
    little, implicit = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
    if not little and "PixelData" in ds:
        ds.PixelData = np.frombuffer(ds.PixelData or b"", dtype="<u2").astype(">u2").tobytes()
    ds.save_as(path, enforce_file_format=True, little_endian=little, implicit_vr=implicit)


def scans(*parts: str) -> Path:
    """Return a folder of real scans: of the large data beside the project or of tests/data; skip where both lack it."""
    here = Path(__file__).parent
    large = Path(os.environ.get("DINTS_DATA") or here.parents[1] / "shared/data")
    for root in (large, here / "data"):
        folder = root.joinpath("scans", *parts)
        if folder.is_dir():
            return folder
    pytest.skip(f"no real scans here: {Path('scans', *parts)} is not under $DINTS_DATA or ../shared/data")


def _common(phantom: Phantom, *, series: str, study: str, frame: str) -> Dataset:
    _, rows, columns = phantom.pixels.shape
    ds = Dataset()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
    ds.Modality, ds.SeriesNumber, ds.SeriesDescription = "CT", 4, "phantom"
    ds.PatientName = ds.PatientID = ds.AccessionNumber = ds.ReferringPhysicianName = MARK
    ds.PatientBirthDate = ds.StudyDate = "19870605"
    ds.PatientSex = ds.StudyTime = ds.StudyID = ""
    ds.Rows, ds.Columns, ds.SamplesPerPixel = rows, columns, 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = phantom.pixels.dtype.itemsize * 8
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(phantom.pixels.dtype.kind == "i")
    return ds


def _frame(phantom: Phantom, index: int) -> Dataset:
    position, transformation, content, groups = Dataset(), Dataset(), Dataset(), Dataset()
    position.ImagePositionPatient = _decimals(phantom.positions[index])
    transformation.RescaleSlope, transformation.RescaleIntercept = _decimals([phantom.slope, phantom.intercept])
    content.DimensionIndexValues = [index + 1]
    groups.PlanePositionSequence, groups.FrameContentSequence = Items([position]), Items([content])
    groups.PixelValueTransformationSequence = Items([transformation])
    return groups


def _decimals(values: Sequence[float] | NDArray[np.float64]) -> list[str]:
    """Return numbers as decimal strings of at most 16 characters (PS3.5 6.2, DS)."""
    return [f"{float(value):.10g}"[:16] if abs(value) >= 1e-9 else "0" for value in values]
