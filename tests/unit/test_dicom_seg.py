"""A written SEG is the mask in patient space, says where it comes from, and a wrong one never gets its name."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from dints_deploy.dicom.objects import encoded, write_checked
from dints_deploy.dicom.provenance import read_provenance
from dints_deploy.dicom.readback import seg_planes
from dints_deploy.dicom.result import DicomResult
from dints_deploy.dicom.seg import build_seg, write_seg
from dints_deploy.dicom.selfcheck import check_seg
from dints_deploy.errors import OutputError
from tests.dicom_phantoms import MARK, Phantom, straight, write, write_enhanced
from tests.dicom_results import ENTRY, RECORD, WHEN, WRITERS, read_object, result_of, shapes, volume_of

C, S = float(np.cos(0.4)), float(np.sin(0.4))
ORIENTATIONS = {
    "axial": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
    "negated": ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0)),
    "mirrored column": ((1.0, 0.0, 0.0), (0.0, -1.0, 0.0)),
    "sagittal": ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0)),
    "coronal, feet first": ((-1.0, 0.0, 0.0), (0.0, 0.0, -1.0)),
    "oblique": ((C, S, 0.0), (0.0, 0.0, -1.0)),
}


def written_result(folder: Path, phantom: Phantom | None = None, **options: Any) -> DicomResult:
    """Write a phantom's series and return the result of a mask on it."""
    write(folder / "in", phantom or straight(planes=6, rows=14, columns=11, between_rows=0.8, between_columns=1.7))
    volume = volume_of(folder / "in")
    return result_of(volume, shapes(volume), **options)


def in_patient(path: Path) -> dict[tuple[float, float, float], int]:
    """Return LPS mm -> segment number of every pixel set in a SEG, by highdicom and its own mapping."""
    from highdicom.seg import segread

    seg = segread(path)
    places: dict[tuple[float, float, float], int] = {}
    volume = seg.get_volume(combine_segments=True, rescale_fractional=False)
    for index in np.argwhere(volume.array):
        x, y, z = np.round(volume.affine[:3] @ [*index, 1.0], 3) + 0.0
        places[float(x), float(y), float(z)] = int(volume.array[tuple(index)])
    return places


def mask_in_patient(result: DicomResult) -> dict[tuple[float, float, float], int]:
    """Return the same of the mask, by its affine alone."""
    mask = result.labels.data[0]
    indices = np.argwhere(mask)
    lps = np.round(result.labels.grid.to_world(indices.astype(float)) * [-1.0, -1.0, 1.0], 3) + 0.0
    return {(float(x), float(y), float(z)): int(mask[tuple(i)]) for (x, y, z), i in zip(lps, indices, strict=True)}


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
@pytest.mark.parametrize("name", ORIENTATIONS)
def test_every_voxel_of_the_mask_lies_at_its_place_in_the_patient(name: str, kind: Any, tmp_path: Path) -> None:
    row, column = ORIENTATIONS[name]
    phantom = straight(planes=5, rows=10, columns=12, row=row, column=column, between_rows=0.5, between_columns=2.0)
    write(tmp_path / "in", phantom, order=[4, 0, 3, 1, 2])
    volume = volume_of(tmp_path / "in")
    result = result_of(volume, shapes(volume), segmentation_type=kind)
    written = in_patient(write_seg(result, tmp_path / "seg.dcm"))
    assert written == mask_in_patient(result)
    assert len(written) == np.count_nonzero(result.labels.data) > 40


def test_a_seg_says_what_it_is_and_where_it_comes_from(tmp_path: Path) -> None:
    result = written_result(tmp_path)
    seg = read_object(write_seg(result, tmp_path / "seg.dcm"))
    first = read_object(tmp_path / "in" / "0000.dcm")
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert seg[keyword].value == first[keyword].value
    assert seg.SeriesInstanceUID != first.SeriesInstanceUID
    assert "esearch use only" in seg.ContentDescription
    assert "research use only" in seg.SeriesDescription
    assert (seg.ContentDate, seg.ContentTime, seg.SegmentationType) == ("20260304", "050607", "BINARY")
    kidney, blob = seg.SegmentSequence
    assert (kidney.SegmentNumber, kidney.SegmentLabel, blob.SegmentNumber) == (1, "Kidney, left", 2)
    assert kidney.SegmentedPropertyTypeCodeSequence[0].CodeValue == "64033007"
    modifier = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert (modifier.CodeValue, modifier.CodingSchemeDesignator) == ("7771000", "SCT")
    assert blob.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99DINTS"
    assert seg.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator == "99DINTS"
    lightness, a, b = (value / 65535 for value in blob.RecommendedDisplayCIELabValue)
    assert lightness * 100 == pytest.approx(51.8, abs=1.0)  # CIELab of (20, 120, 240), D65 adapted to D50
    assert (a * 255 - 128, b * 255 - 128) == pytest.approx((15, -67), abs=6)
    algorithm = kidney.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("two-shapes", "1.2.3")
    assert "precision=fp32" in algorithm.AlgorithmParameters
    provenance = read_provenance(seg)
    assert provenance == result.provenance
    assert provenance is not None
    assert provenance.weights == ("a" * 64, "b" * 64)
    assert (provenance.genotype, provenance.engine) == ("9" * 64, "openvino 2025.1")


def test_empty_frames_are_left_out_and_labels_without_a_voxel_are_described(tmp_path: Path) -> None:
    write(tmp_path / "in", straight(planes=9, rows=8, columns=8))
    volume = volume_of(tmp_path / "in")
    mask = np.zeros(volume.volume.shape, dtype=np.uint8)
    mask[2:5, 3, 4:6] = 2
    seg = read_object(write_seg(result_of(volume, mask), tmp_path / "seg.dcm"))
    assert seg.NumberOfFrames == 2
    assert [segment.SegmentNumber for segment in seg.SegmentSequence] == [1, 2]
    frames = seg.PerFrameFunctionalGroupsSequence
    assert {float(frame.PlanePositionSequence[0].ImagePositionPatient[2]) for frame in frames} == {8.0, 10.0}


def test_frames_of_a_multi_frame_source_are_named_by_number(tmp_path: Path) -> None:
    phantom = straight(planes=6, rows=14, columns=11)
    (tmp_path / "in").mkdir()
    write_enhanced(tmp_path / "in" / "one.dcm", replace(phantom, positions=phantom.positions[::-1].copy()))
    volume = volume_of(tmp_path / "in")
    result = result_of(volume, shapes(volume))
    path = write_seg(result, tmp_path / "seg.dcm")
    assert in_patient(path) == mask_in_patient(result)
    seg = read_object(path)
    source = read_object(tmp_path / "in" / "one.dcm")
    assert [str(item.ReferencedSOPInstanceUID) for item in seg.SourceImageSequence] == [source.SOPInstanceUID]
    for frame in seg.PerFrameFunctionalGroupsSequence:
        image = frame.DerivationImageSequence[0].SourceImageSequence[0]
        groups = source.PerFrameFunctionalGroupsSequence[image.ReferencedFrameNumber - 1]
        assert image.ReferencedSOPClassUID == source.SOPClassUID
        ours, theirs = (f.PlanePositionSequence[0].ImagePositionPatient for f in (frame, groups))
        assert ours == theirs


def test_a_regularised_source_gets_its_mask_back_on_every_tilted_slice(tmp_path: Path) -> None:
    upright = straight(planes=6, rows=16, columns=12)
    heights = np.array([0.0, 2.0, 3.1, 6.0, 8.0, 12.0])
    positions = heights[:, np.newaxis] * np.array([0.0, 0.35, 1.0])
    write(tmp_path / "in", replace(upright, positions=positions))
    volume = volume_of(tmp_path / "in")
    assert volume.regularised
    mask = np.zeros(volume.volume.shape, dtype=np.uint8)
    mask[2:9, 4:14, 2:] = 1
    result = result_of(volume, mask)
    planes = seg_planes(read_object(write_seg(result, tmp_path / "seg.dcm")))
    written = {round(float(plane.affine[2, 3]), 6): plane.segments for plane in planes.values()}
    assert set(written) == {2.0, 3.1, 6.0, 8.0, 12.0}  # the first is nearer to the regular grid's second voxel
    for height, segments in written.items():
        y = np.arange(16) + 0.35 * height  # of this slice's rows; the box reaches from 3.5 to 13.5 mm
        assert segments.sum() == 7 * np.count_nonzero((y > 3.5) & (y < 13.5))


def shifted(seg: Any) -> None:
    frame = seg.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0]
    frame.ImagePositionPatient = [frame.ImagePositionPatient[0] + 1.0, *frame.ImagePositionPatient[1:]]


def transposed_spacing(seg: Any) -> None:
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    measures.PixelSpacing = list(reversed(measures.PixelSpacing))


def mirrored(seg: Any) -> None:
    plane = seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
    plane.ImageOrientationPatient = [
        -float(v) if n < 3 else float(v) for n, v in enumerate(plane.ImageOrientationPatient)
    ]


def one_pixel(seg: Any) -> None:
    data = bytearray(seg.PixelData or b"")
    data[7] ^= 0x10
    seg.PixelData = bytes(data)


def exchanged_frames(seg: Any) -> None:
    frames = seg.PerFrameFunctionalGroupsSequence
    one, other = frames[0].PlanePositionSequence, frames[2].PlanePositionSequence
    frames[0].PlanePositionSequence, frames[2].PlanePositionSequence = other, one


def another_segment(seg: Any) -> None:
    seg.PerFrameFunctionalGroupsSequence[0].SegmentIdentificationSequence[0].ReferencedSegmentNumber = 2


def frame_lost(seg: Any) -> None:
    frames = list(seg.PerFrameFunctionalGroupsSequence)
    bits = np.unpackbits(np.frombuffer(seg.PixelData or b"", dtype=np.uint8), bitorder="little")
    size = seg.Rows * seg.Columns
    data = np.packbits(bits[: size * (len(frames) - 1)], bitorder="little").tobytes()
    seg.PixelData = data + b"\0" * (len(data) % 2)
    seg.PerFrameFunctionalGroupsSequence = frames[:-1]
    seg.NumberOfFrames = len(frames) - 1


def stranger(seg: Any) -> None:
    image = seg.PerFrameFunctionalGroupsSequence[1].DerivationImageSequence[0].SourceImageSequence[0]
    image.ReferencedSOPInstanceUID = "1.2.3.4"


def described_twice(seg: Any) -> None:
    seg.SegmentSequence[1].SegmentNumber = 3


def no_groups(seg: Any) -> None:
    del seg.SharedFunctionalGroupsSequence


@pytest.mark.parametrize(
    "tamper",
    [
        shifted, transposed_spacing, mirrored, one_pixel, exchanged_frames, another_segment, frame_lost, stranger,
        described_twice, no_groups,
    ],
)  # fmt: skip
def test_a_tampered_seg_never_gets_its_name(tamper: Callable[[Any], None], tmp_path: Path) -> None:
    result = written_result(tmp_path)
    seg = build_seg(result)
    path = tmp_path / "out" / "seg.dcm"
    path.parent.mkdir()
    write_checked(path, encoded(seg), lambda written: check_seg(written, result))
    path.unlink()
    tamper(seg)
    with pytest.raises(OutputError, match="output-selfcheck") as error:
        write_checked(path, encoded(seg), lambda written: check_seg(written, result))
    assert MARK not in str(error.value)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("kind", WRITERS)
def test_two_runs_write_the_same_bytes(kind: str, tmp_path: Path) -> None:
    one, other = (WRITERS[kind](written_result(tmp_path), tmp_path / name).read_bytes() for name in ("a", "b"))
    assert one == other


def test_uids_follow_mask_engine_and_input_but_not_the_clock(tmp_path: Path) -> None:
    result = written_result(tmp_path)

    def uid(one: DicomResult) -> str:
        return str(build_seg(one).SOPInstanceUID)

    assert uid(written_result(tmp_path, when=WHEN + timedelta(days=1))) == uid(result)
    volume = volume_of(tmp_path / "in")
    mask: NDArray[np.uint8] = shapes(volume)
    mask[0, 0, 0] = 1
    others = [uid(result_of(volume, mask)), uid(replace(result, segmentation_type="LABELMAP"))]
    for engine in ({"name": "onnx", "version": "1.20", "precision": "fp32"}, {**RECORD["engine"], "precision": "bf16"}):
        others.append(uid(result_of(volume, shapes(volume), record={**RECORD, "engine": engine})))
    write(tmp_path / "in", straight(planes=6, rows=14, columns=11, between_rows=0.8, between_columns=1.7, seed=1))
    others.append(uid(written_result(tmp_path / "other", straight(planes=6, rows=14, columns=11, seed=1))))
    assert len({uid(result), *others}) == 6


@pytest.mark.parametrize("kind", ["seg", "rtstruct"])
def test_a_mask_without_a_voxel_is_answered_by_a_report_of_zero_volumes(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "in", straight())
    volume = volume_of(tmp_path / "in")
    result = result_of(volume, np.zeros(volume.volume.shape, dtype=np.uint8))
    answer = read_object(WRITERS[kind](result, tmp_path / "answer.dcm"))
    assert answer.Modality == "SR"
    values = [item.MeasuredValueSequence[0].NumericValue for item in numbers(answer)]
    assert values == [0, 0]


def numbers(item: Any) -> list[Any]:
    """Return the NUM items of a content tree."""
    found = [item] if item.get("ValueType") == "NUM" else []
    for child in item.get("ContentSequence") or []:
        found += numbers(child)
    return found


def test_no_identifier_appears_in_messages_warnings_or_logs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    def odd(ds: Dataset, index: int) -> None:
        ds.PatientBirthDate = ds.PatientAge = ds.PatientSex = MARK[:16]
        ds.PatientName = f"{MARK}^A^B^C^D^E^F=G=H=I"
        ds.StudyDate, ds.AccessionNumber, ds.SpecificCharacterSet = MARK, MARK * 4, "ISO_IR 999"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, about the odd values of this test
        write(tmp_path / "in", straight(planes=6, rows=14, columns=11), change=odd)
    caplog.clear()
    capfd.readouterr()
    caplog.set_level(logging.DEBUG)
    volume = volume_of(tmp_path / "in")
    result = result_of(volume, shapes(volume))
    for kind, writer in WRITERS.items():
        path = writer(result, tmp_path / f"{kind}.dcm")
        assert MARK.encode() in path.read_bytes()  # copied as it stands
    broken = replace(result, header=Dataset(), volumes_ml={})
    with pytest.raises(OutputError, match="output-object") as error:
        WRITERS["sr"](broken, tmp_path / "broken.dcm")
    out, err = capfd.readouterr()
    assert MARK not in "".join([caplog.text, out, err, str(error.value), repr(error.value.__cause__)])
    assert not (tmp_path / "broken.dcm").exists()


def test_a_mask_with_a_value_that_is_no_label_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in", straight())
    volume = volume_of(tmp_path / "in")
    mask = np.full(volume.volume.shape, 3, dtype=np.uint8)
    with pytest.raises(OutputError, match=r"found \[3\].*output-object"):
        result_of(volume, mask)


def test_a_source_without_study_series_and_frame_uids_gets_derived_ones(tmp_path: Path) -> None:
    def anonymised(ds: Dataset, index: int) -> None:
        ds.StudyInstanceUID = ds.SeriesInstanceUID = ds.FrameOfReferenceUID = ""

    write(tmp_path / "in", straight(planes=6, rows=14, columns=11), change=anonymised)
    volume = volume_of(tmp_path / "in")
    segs = [read_object(write_seg(result_of(volume, shapes(volume)), tmp_path / name)) for name in ("a", "b")]
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        assert segs[0][keyword].value == segs[1][keyword].value
        assert str(segs[0][keyword].value).startswith("2.25.")


def test_cosines_that_are_no_unit_vectors_are_written_as_unit_vectors(tmp_path: Path) -> None:
    """The gate lets through what is rounded to three digits; a SEG says what was meant."""

    def rounded(ds: Dataset, index: int) -> None:
        ds.ImageOrientationPatient = ["0.9993", "0", "0", "0", "1.0004", "0"]

    write(tmp_path / "in", straight(planes=6, rows=14, columns=11), change=rounded)
    volume = volume_of(tmp_path / "in")
    result = result_of(volume, shapes(volume))
    path = write_seg(result, tmp_path / "seg.dcm")
    assert in_patient(path) == mask_in_patient(result)
    shared = read_object(path).SharedFunctionalGroupsSequence[0]
    assert list(shared.PlaneOrientationSequence[0].ImageOrientationPatient) == [1, 0, 0, 0, 1, 0]


def test_names_outside_ascii_are_written_as_utf_8(tmp_path: Path) -> None:
    result = written_result(tmp_path)
    labels = (result.entry.labels[0].model_copy(update={"name": "Niere, links (左)"}), result.entry.labels[1])
    result = replace(result, entry=ENTRY.model_copy(update={"labels": labels}))
    seg = read_object(write_seg(result, tmp_path / "seg.dcm"))
    assert seg.SegmentSequence[0].SegmentLabel == "Niere, links (左)"
    assert str(seg.PatientName) == MARK
