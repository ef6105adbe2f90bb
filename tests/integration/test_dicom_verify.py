"""`verify` confirms what is true of a written object and its source, and names what is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dints_deploy.catalog.catalog import LoadedEntry
from dints_deploy.dicom.refusal import write_refusal
from dints_deploy.dicom.seg import write_seg
from dints_deploy.dicom.verify import verify_result
from dints_deploy.errors import ScanRefused
from tests.dicom_phantoms import scans, straight, write
from tests.dicom_results import ENTRY, WHEN, WRITERS, read_object, real_result, result_of, shapes, volume_of


def zoo(name: str) -> LoadedEntry:
    """Return an entry as the record says it is."""
    digests = {"m0.onnx": "a" * 64, "m1.onnx": "b" * 64, "genotype.json": "9" * 64}
    members = [{"onnx": "m0.onnx"}, {"onnx": "m1.onnx"}]
    spec = type(ENTRY).model_validate(ENTRY.model_dump() | {"genotype": "genotype.json", "members": members})
    assert name == spec.name
    return LoadedEntry(Path(), spec, digests)


@pytest.mark.parametrize("name", ["brain-studies/study-3/11_HCropVolume", "enhanced-mr", "refusals/gantrytilting/001"])
def test_verify_confirms_every_object_against_zoo_and_source(name: str, tmp_path: Path) -> None:
    result = real_result(name)
    for kind, writer in WRITERS.items():
        verified = verify_result(writer(result, tmp_path / kind), source=scans(name), zoo=zoo)
        assert verified.passed, [check for check in verified.checks if not check.passed]
        names = {check.name for check in verified.checks}
        assert {"entry", "weights", "genotype", "SOPInstanceUID", "SeriesInstanceUID", "source", "input"} <= names
        if kind in ("seg", "rtstruct"):
            assert {"mask", "geometry"} <= names


def test_verify_names_what_is_not_true(tmp_path: Path) -> None:
    def failed(path: Path, **options: Any) -> set[str]:
        return {check.name for check in verify_result(path, **options).checks if not check.passed}

    result = real_result("negated-cosines")
    path = write_seg(result, tmp_path / "seg.dcm")
    newer = zoo(ENTRY.name)
    newer = replace(newer, digests=newer.digests | {"m1.onnx": "c" * 64})
    assert failed(path, zoo=lambda name: newer) == {"weights"}
    assert failed(path, zoo=zoo, source=scans("enhanced-mr")) == {"source"}

    seg = read_object(path)
    seg.PixelData = bytes([seg.PixelData[0] ^ 1]) + seg.PixelData[1:]
    seg.save_as(tmp_path / "pixel.dcm")
    assert failed(tmp_path / "pixel.dcm", zoo=zoo) == {"mask"}

    seg = read_object(path)
    seg.SOPInstanceUID = seg.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    seg.save_as(tmp_path / "uid.dcm")
    assert failed(tmp_path / "uid.dcm", zoo=zoo) == {"SOPInstanceUID"}

    seg = read_object(path)
    for frame in seg.PerFrameFunctionalGroupsSequence:
        item = frame.PlanePositionSequence[0]
        item.ImagePositionPatient = [*item.ImagePositionPatient[:2], item.ImagePositionPatient[2] + 3]
    seg.save_as(tmp_path / "place.dcm")
    assert failed(tmp_path / "place.dcm", zoo=zoo, source=scans("negated-cosines")) == {"geometry"}

    seg = read_object(path)
    seg.SegmentSequence[0].SegmentLabel = "Kidney, right"
    seg.save_as(tmp_path / "side.dcm")
    assert failed(tmp_path / "side.dcm", zoo=zoo) == {"content"}

    (source, *_) = [one for one in scans("negated-cosines").rglob("*") if one.is_file()]
    assert failed(source, zoo=zoo) == {"provenance"}
    (tmp_path / "none.dcm").write_bytes(b"not DICOM")
    with pytest.raises(ScanRefused, match="dicom-corrupt"):
        verify_result(tmp_path / "none.dcm", zoo=zoo)


def more_millilitres(report: Any) -> None:
    for group in report.ContentSequence[-1].ContentSequence:
        for item in group.ContentSequence:
            if item.ValueType == "NUM":
                item.MeasuredValueSequence[0].NumericValue = "99"


def another_name(plan: Any) -> None:
    plan.StructureSetROISequence[0].ROIName = "Kidney, right"


def moved_contour(plan: Any) -> None:
    contour = next(one for roi in plan.ROIContourSequence for one in roi.get("ContourSequence") or [])
    contour.ContourData = [str(float(value) + 1) for value in contour.ContourData]


def painted(picture: Any) -> None:
    picture.PixelData = b"\xff" + picture.PixelData[1:]


def softened(report: Any) -> None:
    report.ContentSequence[-1].TextValue = "For diagnosis."


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("sr", more_millilitres),
        ("sr-alone", more_millilitres),
        ("rtstruct", another_name),
        ("rtstruct", moved_contour),
        ("sc", painted),
        ("refusal", softened),
    ],
)
def test_verify_sees_what_an_object_says_changed(kind: str, change: Callable[[Any], None], tmp_path: Path) -> None:
    """Without the source: from the object alone."""
    path = tmp_path / "written.dcm"
    write(tmp_path / "in", straight(planes=6, rows=14, columns=11))
    volume = volume_of(tmp_path / "in")
    if kind == "refusal":
        error = ScanRefused("scan-extent", "expected 100 mm, found 60 mm: choose another series")
        write_refusal(volume.series, error, path, entry=ENTRY, software="0.1.0", when=WHEN)
    else:
        WRITERS[kind](result_of(volume, shapes(volume)), path)
    assert verify_result(path, zoo=zoo).passed
    written = read_object(path)
    change(written)
    written.save_as(path)
    failed = [check.name for check in verify_result(path, zoo=zoo).checks if not check.passed]
    assert failed == ["content"]


def test_verify_sees_that_a_source_pixel_changed(tmp_path: Path) -> None:
    phantom = straight(planes=6, rows=14, columns=11)
    write(tmp_path / "in", phantom)
    volume = volume_of(tmp_path / "in")
    path = write_seg(result_of(volume, shapes(volume)), tmp_path / "seg.dcm")
    assert verify_result(path, source=tmp_path / "in", zoo=zoo).passed
    pixels = phantom.pixels.copy()
    pixels[3, 2, 1] += 1
    write(tmp_path / "in", replace(phantom, pixels=pixels))
    checks = verify_result(path, source=tmp_path / "in", zoo=zoo).checks
    assert [check.name for check in checks if not check.passed] == ["input"]
