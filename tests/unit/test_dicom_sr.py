"""The measurement report says each volume with its segment and model; a refusal says why nothing was done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dints_deploy.dicom.objects import encoded, write_checked
from dints_deploy.dicom.provenance import read_provenance
from dints_deploy.dicom.read import read_series
from dints_deploy.dicom.refusal import write_refusal
from dints_deploy.dicom.result import DicomResult
from dints_deploy.dicom.seg import write_seg
from dints_deploy.dicom.selfcheck import check_values
from dints_deploy.dicom.series import collect
from dints_deploy.errors import OutputError, ScanRefused
from tests.dicom_phantoms import MARK, straight, write
from tests.dicom_results import ENTRY, WHEN, WRITERS, read_object, result_of, volume_of


@pytest.fixture
def result(tmp_path: Path) -> DicomResult:
    """Twelve voxels of the kidney at 0.8 x 1.5 x 2 mm, nothing of the blob."""
    write(tmp_path / "in", straight(planes=5, rows=9, columns=8, between_rows=0.8, between_columns=1.5))
    volume = volume_of(tmp_path / "in")
    mask = np.zeros(volume.volume.shape, dtype=np.uint8)
    mask[1:4, 2:4, 1:3] = 1
    return result_of(volume, mask)


def groups(report: Any) -> list[Any]:
    from highdicom.sr import MeasurementReport

    content = MeasurementReport.from_sequence([report])
    return [
        *content.get_volumetric_roi_measurement_groups(),
        *content.get_image_measurement_groups(),
    ]


def texts(item: Any) -> list[str]:
    """Return the texts of a content tree."""
    found = [str(item.TextValue)] if item.get("ValueType") == "TEXT" else []
    for child in item.get("ContentSequence") or []:
        found += texts(child)
    return found


def test_each_structure_has_its_volume_in_millilitres_and_its_segment(result: DicomResult, tmp_path: Path) -> None:
    from highdicom.sr import srread

    seg = read_object(write_seg(result, tmp_path / "seg.dcm"))
    report = srread(WRITERS["sr"](result, tmp_path / "sr.dcm"))
    kidney, blob = groups(report)
    (volume,) = kidney.get_measurements()
    assert volume.value == pytest.approx(12 * 0.8 * 1.5 * 2 / 1000)
    assert (volume.unit.value, volume.unit.scheme_designator, volume.name.value) == ("mL", "UCUM", "118565006")
    assert (kidney.finding_type.value, kidney.tracking_identifier) == ("64033007", "kidney-left")
    segment = kidney.referenced_segment
    assert segment.referenced_sop_instance_uid == seg.SOPInstanceUID
    assert segment[0].ReferencedSOPSequence[0].ReferencedSegmentNumber == 1
    assert kidney.tracking_uid == seg.SegmentSequence[0].TrackingUID
    assert blob.get_measurements()[0].value == 0
    sources = read_object(tmp_path / "in" / "0000.dcm").SeriesInstanceUID
    assert sources in str(report)
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    listed = {str(one.SeriesInstanceUID): len(one.ReferencedSOPSequence) for one in evidence}
    others = report.get("PertinentOtherEvidenceSequence") or []
    for study in others:
        listed |= {str(one.SeriesInstanceUID): len(one.ReferencedSOPSequence) for one in study.ReferencedSeriesSequence}
    assert listed == {str(sources): 5, str(seg.SeriesInstanceUID): 1}


def test_a_report_without_a_seg_refers_to_none(result: DicomResult, tmp_path: Path) -> None:
    report = read_object(WRITERS["sr-alone"](result, tmp_path / "sr.dcm"))
    kidney, blob = groups(report)
    assert kidney.get_measurements()[0].value == pytest.approx(0.0288)
    assert blob.get_measurements()[0].value == 0
    assert result.uid("seg", "instance", "BINARY") not in str(report)


def test_a_report_names_model_weights_and_research_use(result: DicomResult, tmp_path: Path) -> None:
    report = read_object(WRITERS["sr"](result, tmp_path / "sr.dcm"))
    said = texts(report)
    assert ENTRY.research_use in said
    assert f"weights={'a' * 64} {'b' * 64}" in said
    assert {"two-shapes", "1.2.3", "engine=openvino 2025.1", "precision=fp32"} <= set(said)
    assert read_provenance(report) == result.provenance
    assert (report.CompletionFlag, report.VerificationFlag) == ("COMPLETE", "UNVERIFIED")
    assert str(report.PatientName) == MARK


def test_a_report_that_reads_back_differently_never_gets_its_name(result: DicomResult, tmp_path: Path) -> None:
    report = read_object(WRITERS["sr"](result, tmp_path / "sr.dcm"))
    meant = read_object(tmp_path / "sr.dcm")
    volume = next(item for item in numeric(report))
    volume.MeasuredValueSequence[0].NumericValue = "0.0289"
    with pytest.raises(OutputError, match="output-selfcheck"):
        write_checked(tmp_path / "bad.dcm", encoded(report), lambda path: check_values(path, meant, "SR"))
    assert not (tmp_path / "bad.dcm").exists()


def numeric(item: Any) -> list[Any]:
    found = [item] if item.get("ValueType") == "NUM" else []
    for child in item.get("ContentSequence") or []:
        found += numeric(child)
    return found


def test_a_refusal_becomes_a_report_with_code_and_sentence(tmp_path: Path) -> None:
    phantom = straight(planes=2)
    write(tmp_path / "in", phantom)
    (series,) = collect(tmp_path / "in").series
    with pytest.raises(ScanRefused) as refused:
        read_series(series)
    paths = [tmp_path / name for name in ("a.dcm", "b.dcm")]
    for path in paths:
        write_refusal(series, refused.value, path, entry=ENTRY, software="0.1.0", when=WHEN)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    report = read_object(paths[0])
    said = texts(report)
    assert "dicom-too-few-slices" in said
    (sentence,) = [text for text in said if text.startswith("Not processed because")]
    assert "expected at least 3 slices, found 2" in sentence
    assert ENTRY.research_use in said
    assert report.ConceptNameCodeSequence[0].CodeMeaning == "Not processed by the algorithm"
    assert report.StudyInstanceUID == series.StudyInstanceUID
    assert (str(report.PatientName), report.Modality) == (MARK, "SR")
    assert all(header.SOPInstanceUID in str(report) for header in series.slices)


def test_another_reason_is_another_object(tmp_path: Path) -> None:
    write(tmp_path / "in", straight())
    (series,) = collect(tmp_path / "in").series
    uids = set()
    for code in ("scan-extent", "scan-spacing"):
        path = write_refusal(series, ScanRefused(code, "no"), tmp_path / code, entry=None, software="1", when=WHEN)
        uids.add(str(read_object(path).SOPInstanceUID))
    assert len(uids) == 2


def test_a_refusal_without_an_image_to_refer_to_cannot_be_written(tmp_path: Path) -> None:
    write(tmp_path / "in", straight())
    (series,) = collect(tmp_path / "in").series
    nameless = replace(series, slices=tuple(replace(header, SOPInstanceUID="") for header in series.slices))
    with pytest.raises(OutputError, match="output-object"):
        write_refusal(nameless, ScanRefused("scan-extent", "no"), tmp_path / "x", entry=None, software="1", when=WHEN)
