"""Collect files into series."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.errors import InvalidDicomError

from dints_deploy.dicom.findings import Finding
from dints_deploy.dicom.header import PixelLayout, SliceHeader


@dataclass(frozen=True)
class Series:
    """One series of a study, as its headers tell.

    Attributes:
        slices: one per image plane (a multi-frame file gives several), by file name and frame.
        findings: files of the series that could not be used.
    """

    StudyInstanceUID: str
    SeriesInstanceUID: str
    Modality: str
    SeriesDescription: str
    SeriesNumber: int | None
    slices: tuple[SliceHeader, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def label(self) -> str:
        """Return a short hash of the SeriesInstanceUID: the only name of a series in messages and logs."""
        return hashlib.sha256(self.SeriesInstanceUID.encode()).hexdigest()[:10]

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files, each once, in the order of the slices."""
        return tuple(dict.fromkeys(header.path for header in self.slices))


@dataclass(frozen=True)
class Study:
    """What was found in a folder, a zip or a list of files; usually one study, but nothing depends on that."""

    series: tuple[Series, ...]
    findings: tuple[Finding, ...] = ()


def collect(source: Path) -> Study:
    """Group the DICOM files under `source` into series."""
    groups: dict[str, list[SliceHeader]] = defaultdict(list)
    about = {}
    for path in sorted(source.rglob("*")):
        if not path.is_file():
            continue
        try:
            dataset = pydicom.dcmread(path, stop_before_pixels=True)
        except InvalidDicomError:
            continue
        about[dataset.SeriesInstanceUID] = dataset
        groups[dataset.SeriesInstanceUID].append(_header(path, dataset))
    return Study(tuple(_series(about[uid], slices) for uid, slices in groups.items()))


def _series(dataset: pydicom.Dataset, slices: list[SliceHeader]) -> Series:
    description = str(dataset.get("SeriesDescription", ""))
    number = dataset.get("SeriesNumber")
    return Series(
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.Modality, description, number, tuple(slices)
    )


def _header(path: Path, dataset: pydicom.FileDataset) -> SliceHeader:
    layout = PixelLayout(
        dataset.file_meta.TransferSyntaxUID, dataset.Rows, dataset.Columns, int(dataset.get("NumberOfFrames", 1)),
        dataset.SamplesPerPixel, dataset.BitsAllocated, dataset.BitsStored, dataset.PixelRepresentation,
        dataset.PhotometricInterpretation, 0,
    )  # fmt: skip
    return SliceHeader(
        path, 0, layout, dataset.SOPInstanceUID, dataset.SOPClassUID,
        ImageOrientationPatient=tuple(float(x) for x in dataset.ImageOrientationPatient),
        ImagePositionPatient=tuple(float(x) for x in dataset.ImagePositionPatient),
        PixelSpacing=tuple(float(x) for x in dataset.PixelSpacing),
        RescaleSlope=float(dataset.get("RescaleSlope", 1)), RescaleIntercept=float(dataset.get("RescaleIntercept", 0)),
    )  # fmt: skip
