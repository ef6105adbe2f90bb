"""Write a mask as DICOM SEG on the source's planes (PS3.3 A.51): binary by default, label map as an option."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from pydicom.dataset import Dataset

from dints_deploy.catalog.entry import Label
from dints_deploy.dicom.header import Plane
from dints_deploy.dicom.objects import (
    CONTENT_DESCRIPTION,
    SUPERSEDING,
    building,
    code_item,
    encoded,
    object_uid,
    stamp,
    write_checked,
)
from dints_deploy.dicom.provenance import SOFTWARE
from dints_deploy.dicom.readback import SEG_CLASSES
from dints_deploy.dicom.result import DicomResult
from dints_deploy.dicom.selfcheck import check_seg

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription

UNIT_TOLERANCE: Final = 1e-4
"""How far the source's cosines may be from unit vectors to be written as they stand; others are normalised."""


def write_seg(result: DicomResult, path: Path) -> Path:
    """Write the mask as SEG and read it back before it gets its name.

    A mask without a single pixel has no SEG (PS3.3 C.7.6.16: at least one frame): the measurement report, which says
    0 mL for every structure, is written in its place, to the same path.

    Raises:
        OutputError: `output-object`, `output-selfcheck`, `output-unwritable`, `disk-full`.
    """
    if result.empty:
        from dints_deploy.dicom.measure import write_sr

        return write_sr(result, path, segmentation=False)
    with building("SEG"):
        data = encoded(build_seg(result))
    return write_checked(path, data, lambda written: check_seg(written, result))


def build_seg(result: DicomResult) -> Dataset:
    """Return the SEG: geometry of the source, empty frames omitted, every label of the entry described."""
    from highdicom.seg import Segmentation

    surrogates = [_surrogate(plane, result) for plane in result.planes]
    seg = Segmentation(
        source_images=surrogates,
        pixel_array=result.segments,
        segmentation_type=result.segmentation_type,
        segment_descriptions=[_description(n, label, result) for n, label in enumerate(result.entry.labels, start=1)],
        series_instance_uid=object_uid(result, "seg", "series"),
        series_number=1,
        sop_instance_uid=object_uid(result, "seg", "instance"),
        instance_number=1,
        manufacturer=SOFTWARE,
        manufacturer_model_name=SOFTWARE,
        software_versions=result.provenance.software,
        device_serial_number="1",
        content_label="SEGMENTATION",
        content_description=SUPERSEDING if _replaces_another(result) else CONTENT_DESCRIPTION,
        omit_empty_frames=True,
    )
    _refer_to_source(seg, {str(one.SOPInstanceUID): p for one, p in zip(surrogates, result.planes, strict=True)})
    _name_dimensions(seg, result.uid("seg", "dimensions"))
    seg.ContentDate, seg.ContentTime = result.when.strftime("%Y%m%d"), result.when.strftime("%H%M%S")
    return stamp(seg, result, "seg", f"Segmentation {result.entry.name}")


def _replaces_another(result: DicomResult) -> bool:
    own = object_uid(result, "seg", "instance")
    return any(one.SOPClassUID in SEG_CLASSES and one.SOPInstanceUID != own for one in result.supersedes)


def _description(number: int, label: Label, result: DicomResult) -> SegmentDescription:
    """Return the segment of a label (PS3.3 C.8.20.4)."""
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    provenance = result.provenance
    segment = SegmentDescription(
        segment_number=number,
        segment_label=label.name,
        segmented_property_category=Code(label.category.value, label.category.scheme, label.category.meaning),
        segmented_property_type=Code(label.type.value, label.type.scheme, label.type.meaning),
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=provenance.entry,
            family=codes.cid7162.ArtificialIntelligence,
            version=provenance.version,
            source=f"{SOFTWARE} {provenance.software}",
            parameters=provenance.parameters(),
        ),
        tracking_uid=result.uid("tracking", label.id),
        tracking_id=label.id,
        display_color=CIELabColor.from_rgb(*label.colour),
    )
    if label.modifier:
        modifier = code_item(label.modifier.value, label.modifier.scheme, label.modifier.meaning)
        segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    return segment


def _surrogate(plane: Plane, result: DicomResult) -> Dataset:
    """Return a single-frame image in the place of a source plane, for highdicom: UID by plane, nothing of the patient.

    Frames of a multi-frame file become images of their own, so that one path serves both; `_refer_to_source` puts the
    true references back.
    """
    first = result.planes[0]
    layout = plane.header.layout
    image = Dataset()
    image.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    image.SOPInstanceUID = result.uid("surrogate", plane.header.SOPInstanceUID, str(plane.header.frame))
    image.StudyInstanceUID = result.study
    image.SeriesInstanceUID = result.series
    image.FrameOfReferenceUID = result.frame_of_reference
    image.Modality = result.volume.series.Modality
    image.Rows, image.Columns = layout.Rows, layout.Columns
    image.ImageOrientationPatient = _decimals(orientation(first))
    image.ImagePositionPatient = _decimals(plane.header.ImagePositionPatient or plane.position)
    image.PixelSpacing = _decimals([first.between_rows, first.between_columns])
    image.SliceThickness = _decimals([thickness(result)])[0]
    image.LossyImageCompression = "01" if plane.header.lossy else "00"
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
        setattr(image, keyword, "")
    image.StudyDate = image.StudyTime = image.ReferringPhysicianName = None
    return image


def orientation(plane: Plane) -> Sequence[float]:
    """Return the cosines as the source has them, or normalised where they are no unit vectors."""
    own = np.array(plane.header.ImageOrientationPatient or (0.0,) * 6)
    lengths = np.linalg.norm(own.reshape(2, 3), axis=1)
    if np.abs(lengths - 1).max() <= UNIT_TOLERANCE:
        return [float(value) for value in own]
    return [*plane.row, *plane.column]


def thickness(result: DicomResult) -> float:
    """Return the source's SliceThickness, or the usual step between planes where it has none."""
    own = result.planes[0].header.SliceThickness
    if own is not None and own > 0:
        return own
    positions = result.volume.report.positions
    return float(np.median(np.diff(positions))) if len(positions) > 1 else result.labels.grid.spacing[2]


def _refer_to_source(seg: Any, planes: dict[str, Plane]) -> None:
    """Replace the surrogates' UIDs by those of the source, with frame numbers for multi-frame files."""
    for item in _references(seg):
        plane = planes.get(str(item.ReferencedSOPInstanceUID))
        if plane is None:
            continue
        item.ReferencedSOPClassUID = plane.header.SOPClassUID
        item.ReferencedSOPInstanceUID = plane.header.SOPInstanceUID
        if plane.header.layout.NumberOfFrames > 1 and "PurposeOfReferenceCodeSequence" in item:
            item.ReferencedFrameNumber = plane.header.frame + 1
    seg.SourceImageSequence = _once(seg.SourceImageSequence)
    for series in seg.ReferencedSeriesSequence:
        series.ReferencedInstanceSequence = _once(series.ReferencedInstanceSequence)


def _references(dataset: Any) -> Iterator[Any]:
    """Yield every item at any depth that refers to an instance, each object once."""
    seen: set[int] = set()
    pending: list[Any] = [dataset]
    while pending:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if "ReferencedSOPInstanceUID" in one:
            yield one
        pending += [item for element in one if element.VR == "SQ" for item in element.value]


def _once(items: Any) -> list[Dataset]:
    return list({str(item.ReferencedSOPInstanceUID): item for item in items}.values())


def _name_dimensions(seg: Any, uid: str) -> None:
    """Replace highdicom's random DimensionOrganizationUID (PS3.3 C.7.6.17)."""
    for item in [*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence]:
        item.DimensionOrganizationUID = uid


def _decimals(values: Sequence[float]) -> list[Any]:
    from pydicom.valuerep import DSfloat

    return [DSfloat(float(value), auto_format=True) for value in values]
