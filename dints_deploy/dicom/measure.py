"""Write measurements as a TID 1500 report (PS3.16): the volume of each structure in mL, with its segment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydicom.dataset import Dataset

from dints_deploy.catalog.entry import Code as EntryCode
from dints_deploy.dicom.instance import Instance
from dints_deploy.dicom.objects import building, encoded, object_uid, stamp, write_checked
from dints_deploy.dicom.provenance import SOFTWARE
from dints_deploy.dicom.readback import LABELMAP_CLASS, SEG_CLASSES
from dints_deploy.dicom.result import DicomResult
from dints_deploy.dicom.selfcheck import check_values
from dints_deploy.dicom.uid import derived_uid

if TYPE_CHECKING:
    from highdicom.sr import (
        AlgorithmIdentification,
        Measurement,
        MeasurementsAndQualitativeEvaluations,
        ObservationContext,
        VolumetricROIMeasurementsAndQualitativeEvaluations,
    )
    from pydicom.sr.coding import Code

PROCEDURES: Final = {
    "CT": "CTUnspecifiedBodyRegion",
    "MR": "MRIUnspecifiedBodyRegion",
    "PT": "PETUnspecifiedBodyRegion",
}
"""Modality -> procedure of CID 100; others are an "Imaging procedure"."""

REPORT_CLASS: Final = "1.2.840.10008.5.1.4.1.1.88.34"
"""Comprehensive 3D SR (PS3.4 B.5)."""

DIGITS: Final = 6
"""Of a volume in mL: a thousandth of a cubic millimetre."""


def write_sr(result: DicomResult, path: Path, *, segmentation: bool) -> Path:
    """Write the measurements, and read them back before the file gets its name.

    Args:
        segmentation: whether the SEG of the same result is written too; the report refers to its segments then, and to
            the source images alone otherwise.

    Raises:
        OutputError: `output-object`, `output-selfcheck`, `output-unwritable`, `disk-full`.
    """
    with building("SR"):
        report = build_sr(result, segmentation=segmentation)
        data = encoded(report)
    return write_checked(path, data, lambda written: check_values(written, report, "SR"))


def build_sr(result: DicomResult, *, segmentation: bool) -> Dataset:
    """Return the Comprehensive 3D SR with one measurement group for each label of the entry (TID 1500)."""
    from highdicom.sr import Comprehensive3DSR, MeasurementReport
    from pydicom.sr.codedict import codes

    procedure = PROCEDURES.get(result.volume.series.Modality, "ImagingProcedure")
    content = MeasurementReport(
        observation_context=observation_context(result.provenance.entry, result.provenance.software),
        procedure_reported=getattr(codes.cid100, procedure),
        imaging_measurements=list(_groups(result, segmentation=segmentation)),
    )
    sources = dict.fromkeys((plane.header.SOPClassUID, plane.header.SOPInstanceUID) for plane in result.planes)
    evidence = [evidence_item(*source, series=result.series, study=result.study) for source in sources]
    if segmentation and not result.empty:
        series = object_uid(result, "seg", "series")
        seg = evidence_item(seg_class(result), object_uid(result, "seg", "instance"), series=series, study=result.study)
        evidence.append(seg)
    report = Comprehensive3DSR(
        evidence=evidence,
        content=content,
        series_instance_uid=object_uid(result, "sr", "series"),
        series_number=1,
        sop_instance_uid=object_uid(result, "sr", "instance"),
        instance_number=1,
        manufacturer=SOFTWARE,
        is_complete=True,
    )
    if predecessors := _predecessors(result, but=str(report.SOPInstanceUID)):
        report.PredecessorDocumentsSequence = predecessors
    report.ContentDate, report.ContentTime = result.when.strftime("%Y%m%d"), result.when.strftime("%H%M%S")
    return stamp(report, result, "sr", f"Measurements {result.entry.name}")


def _predecessors(result: DicomResult, *, but: str) -> list[Dataset]:
    """Return the reports that this one replaces, by study and series (PS3.3 C.17.2, table C.17-3)."""
    earlier = [one for one in result.supersedes if one.SOPClassUID == REPORT_CLASS and one.SOPInstanceUID != but]
    return [_in_study(one) for one in earlier]


def _in_study(one: Instance) -> Dataset:
    instance, series, study = Dataset(), Dataset(), Dataset()
    instance.ReferencedSOPClassUID, instance.ReferencedSOPInstanceUID = one.SOPClassUID, one.SOPInstanceUID
    series.SeriesInstanceUID, series.ReferencedSOPSequence = one.SeriesInstanceUID, [instance]
    study.StudyInstanceUID, study.ReferencedSeriesSequence = one.StudyInstanceUID, [series]
    return study


def observation_context(entry: str, software: str) -> ObservationContext:
    """Return who observed: a device, named by the entry and the software (TID 1002, 1004)."""
    from highdicom.sr import DeviceObserverIdentifyingAttributes, ObservationContext, ObserverContext
    from pydicom.sr.codedict import codes

    return ObservationContext(
        observer_device_context=ObserverContext(
            observer_type=codes.DCM.Device,
            observer_identifying_attributes=DeviceObserverIdentifyingAttributes(
                uid=derived_uid("device", entry, software),
                name=f"{SOFTWARE} {software}",
                manufacturer_name=SOFTWARE,
                model_name=entry,
            ),
        )
    )


def seg_class(result: DicomResult) -> str:
    """Return the SOP class of the result's SEG."""
    return LABELMAP_CLASS if result.segmentation_type == "LABELMAP" else SEG_CLASSES[0]


def _groups(
    result: DicomResult, *, segmentation: bool
) -> Iterator[VolumetricROIMeasurementsAndQualitativeEvaluations | MeasurementsAndQualitativeEvaluations]:
    """Yield TID 1411 groups that refer to a segment; TID 1501 groups, with the source series, where there is none."""
    from highdicom.sr import (
        MeasurementsAndQualitativeEvaluations,
        ReferencedSegment,
        SourceSeriesForSegmentation,
        TrackingIdentifier,
        VolumetricROIMeasurementsAndQualitativeEvaluations,
    )

    series = SourceSeriesForSegmentation(result.series)
    for number, label in enumerate(result.entry.labels, start=1):
        common = {
            "tracking_identifier": TrackingIdentifier(uid=result.uid("tracking", label.id), identifier=label.id),
            "finding_type": _code(label.type),
            "finding_category": _code(label.category),
            "algorithm_id": _algorithm(result),
            "measurements": [_volume(result.volumes_ml[label.id])],
        }
        if segmentation and number in result.present:
            segment = ReferencedSegment(
                seg_class(result), object_uid(result, "seg", "instance"), number, source_series=series
            )
            yield VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_segment=segment, **common)
        else:
            group = MeasurementsAndQualitativeEvaluations(**common)
            group[0].ContentSequence.append(series)  # TID 1501 is extensible; one line instead of every image
            yield group


def _volume(millilitres: float) -> Measurement:
    from highdicom.sr import Measurement
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    unit = Code("mL", "UCUM", "milliliter")
    return Measurement(name=codes.SCT.Volume, value=round(millilitres, DIGITS), unit=unit)


def _algorithm(result: DicomResult) -> AlgorithmIdentification:
    """Return TID 4019: the model and everything that decided its result."""
    from highdicom.sr import AlgorithmIdentification

    parameters = [f"{key}={value}" for key, value in result.provenance.parameters().items()]
    parameters.append(result.entry.research_use)
    return AlgorithmIdentification(
        name=result.provenance.entry, version=result.provenance.version, parameters=parameters
    )


def evidence_item(sop_class: str, instance: str, *, series: str, study: str) -> Dataset:
    """Return a stand-in for an image that a report is about: its UIDs, and empty patient attributes."""
    item = Dataset()
    item.SOPClassUID, item.SOPInstanceUID = sop_class, instance
    item.SeriesInstanceUID, item.StudyInstanceUID = series, study
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
        setattr(item, keyword, "")
    item.StudyDate = item.StudyTime = item.ReferringPhysicianName = None
    return item


def _code(code: EntryCode) -> Code:
    from pydicom.sr.coding import Code

    return Code(code.value, code.scheme, code.meaning)
