"""Write a mask as RT Structure Set (PS3.3 A.19): closed planar contours on the source's slices, holes by keyholes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydicom.charset import default_encoding
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from scipy.ndimage import find_objects

from dints_deploy.dicom.contour import Polygon, outlines
from dints_deploy.dicom.header import Plane
from dints_deploy.dicom.objects import CONTENT_DESCRIPTION, building, code_item, encoded, stamp, write_checked
from dints_deploy.dicom.readback import header_affine
from dints_deploy.dicom.result import DicomResult
from dints_deploy.dicom.selfcheck import check_rtstruct

Boxes = Sequence[tuple[slice, ...] | None]
"""Where each segment lies in a plane, rows and columns; None for those that do not."""

RTSTRUCT_CLASS: Final = "1.2.840.10008.5.1.4.1.1.481.3"
STUDY_CLASS: Final = "1.2.840.10008.3.1.2.3.1"
"""Detached Study Management, which RT objects name their study by (PS3.3 C.8.8.5)."""

CONTOUR_DATA: Final = Tag("ContourData")
DECIMALS: Final = 4
"""Decimals of a coordinate in mm: far below a pixel, short of the 16 characters of a decimal string."""


def write_rtstruct(result: DicomResult, path: Path) -> Path:
    """Write the mask as RTSTRUCT and read it back before it gets its name.

    A mask without a single pixel has no contours: the measurement report, which says 0 mL for every structure, is
    written in its place, to the same path.

    Raises:
        OutputError: `output-object`, `output-selfcheck`, `output-unwritable`, `disk-full`.
    """
    if result.empty:
        from dints_deploy.dicom.measure import write_sr

        return write_sr(result, path, segmentation=False)
    with building("RTSTRUCT"):
        data = encoded(build_rtstruct(result), implicit=True)  # a contour may be longer than 64 KiB
    return write_checked(path, data, lambda written: check_rtstruct(written, result))


def build_rtstruct(result: DicomResult) -> Dataset:
    """Return the structure set: one ROI for each label of the entry, those without a pixel without contours."""
    plan = Dataset()
    plan.SOPClassUID = RTSTRUCT_CLASS
    plan.Modality = "RTSTRUCT"
    plan.OperatorsName = ""
    plan.StructureSetLabel = "SEGMENTATION"
    plan.StructureSetDescription = CONTENT_DESCRIPTION
    plan.StructureSetDate = result.when.strftime("%Y%m%d")
    plan.StructureSetTime = result.when.strftime("%H%M%S")
    plan.FrameOfReferenceUID = result.frame_of_reference
    plan.PositionReferenceIndicator = ""
    plan.ReferencedFrameOfReferenceSequence = [_frame_of_reference(result)]
    numbers = range(1, len(result.entry.labels) + 1)
    plan.StructureSetROISequence = [_roi(number, result) for number in numbers]
    boxes = [find_objects(plane, len(numbers)) for plane in result.segments]
    plan.ROIContourSequence = [_contours(number, result, boxes) for number in numbers]
    plan.RTROIObservationsSequence = [_observation(number, result) for number in numbers]
    plan.ApprovalStatus = "UNAPPROVED"
    return stamp(plan, result, "rtstruct", f"Structures {result.entry.name}")


def _frame_of_reference(result: DicomResult) -> Dataset:
    """Name the images that the contours lie on, down to the instance (PS3.3 C.8.8.5.1)."""
    instances = dict.fromkeys((plane.header.SOPClassUID, plane.header.SOPInstanceUID) for plane in result.planes)
    frame, study, series = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = result.series
    series.ContourImageSequence = [_reference(*instance) for instance in instances]
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = STUDY_CLASS, result.study
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID = result.frame_of_reference
    frame.RTReferencedStudySequence = [study]
    return frame


def _roi(number: int, result: DicomResult) -> Dataset:
    label = result.entry.labels[number - 1]
    roi = Dataset()
    roi.ROINumber = number
    roi.ReferencedFrameOfReferenceUID = result.frame_of_reference
    roi.ROIName = label.name
    roi.ROIGenerationAlgorithm = "AUTOMATIC"
    roi.ROIGenerationDescription = f"{result.provenance.entry} {result.provenance.version}"[:64]
    return roi


def _observation(number: int, result: DicomResult) -> Dataset:
    """Return what the ROI is (PS3.3 C.8.8.8); an AI's structure has no interpreter."""
    label = result.entry.labels[number - 1]
    observation = Dataset()
    observation.ObservationNumber = observation.ReferencedROINumber = number
    observation.RTROIIdentificationCodeSequence = [code_item(label.type.value, label.type.scheme, label.type.meaning)]
    observation.RTROIInterpretedType = ""
    observation.ROIInterpreter = ""
    return observation


def _contours(number: int, result: DicomResult, boxes: Sequence[Boxes]) -> Dataset:
    """Return the contours of a ROI, plane by plane (PS3.3 C.8.8.6)."""
    roi = Dataset()
    roi.ReferencedROINumber = number
    roi.ROIDisplayColor = list(result.entry.labels[number - 1].colour)
    if number not in result.present:
        return roi
    contours = []
    for plane, segments, reach in zip(result.planes, result.segments, boxes, strict=True):
        affine = header_affine(plane.header)
        for polygon in _polygons(segments, number, reach[number - 1]):
            contours.append(_contour(plane, polygon @ affine[:3, :2].T + affine[:3, 3]))
    roi.ContourSequence = contours
    return roi


def _polygons(segments: NDArray[Any], number: int, box: tuple[slice, ...] | None) -> Sequence[Polygon]:
    """Return the outlines of one segment, searched in its own box only."""
    if box is None:
        return []
    corner = np.array([box[1].start, box[0].start])
    return [polygon + corner for polygon in outlines(segments[box] == number)]


def _contour(plane: Plane, points: NDArray[np.float64]) -> Dataset:
    """Return corners (n, 3) in LPS mm with the image that they lie on."""
    reference = _reference(plane.header.SOPClassUID, plane.header.SOPInstanceUID)
    if plane.header.layout.NumberOfFrames > 1:
        reference.ReferencedFrameNumber = plane.header.frame + 1
    contour = Dataset()
    contour.ContourImageSequence = [reference]
    contour.ContourGeometricType = "CLOSED_PLANAR"
    contour.NumberOfContourPoints = len(points)
    contour[CONTOUR_DATA] = _decimals(points)
    contour.set_original_encoding(True, True, default_encoding)  # as it will be written: pydicom then takes the bytes
    return contour


def _decimals(points: NDArray[np.float64]) -> RawDataElement:
    """Return coordinates as decimal strings in bytes: thirty times faster than one object for each."""
    text = "\\".join(f"{value:.{DECIMALS}f}" for value in points.ravel().tolist())
    value = f"{text}{' ' * (len(text) % 2)}".encode()  # values have an even length (PS3.5 7.1.1)
    return RawDataElement(CONTOUR_DATA, "DS", len(value), value, 0, True, True)


def _reference(sop_class: str, instance: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, instance
    return item
