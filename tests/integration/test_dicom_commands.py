"""The command line on DICOM: equal bytes in two runs, no identifier in anything said, lists of files, channels."""

from __future__ import annotations

import html
import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from dints_deploy.dicom.readback import seg_planes
from tests.command import REFUSED, THRESHOLD, USAGE, Machine, files, threshold_entry
from tests.dicom_phantoms import Phantom, straight, write
from tests.dicom_results import read_object
from tests.tiny_entry import Said, TinyNetwork, run_cli, write_entry

FORMATS = ("nifti", "dicom-seg", "dicom-sr", "rtstruct", "dicom-sc", "preview", "html")
OBJECTS = ("dicom-seg", "dicom-sr", "rtstruct", "dicom-sc")

MARKED = {
    "PatientName": "Zzfamily^Zzgiven",
    "PatientID": "ZZPATIENT77",
    "PatientBirthDate": "19510203",
    "PatientBirthTime": "040506",
    "OtherPatientNames": "Zzmaiden",
    "PatientAddress": "Zzstreet 9",
    "PatientTelephoneNumbers": "ZZ0123456",
    "PatientComments": "Zzcomment",
    "AccessionNumber": "ZZACCESSION5",
    "StudyID": "ZZSTUDY6",
    "StudyDescription": "Zzstudy of Zzfamily",
    "StudyDate": "20190817",
    "SeriesDate": "20190818",
    "AcquisitionDate": "20190819",
    "ContentDate": "20190820",
    "InstitutionName": "Zzhospital",
    "InstitutionAddress": "Zzavenue 3",
    "StationName": "ZZSTATION",
    "ReferringPhysicianName": "Zzreferrer",
    "PerformingPhysicianName": "Zzperformer",
    "OperatorsName": "Zzoperator",
    "RequestedProcedureDescription": "Zzprocedure",
    "ImageComments": "Zzimage",
    "ProtocolName": "Zzprotocol",
}
"""Attributes that tell who the patient is, by whom, where and when (PS3.15 E.1), each with a value of its own."""


def marked(ds: Dataset, index: int) -> None:
    for keyword, value in MARKED.items():
        setattr(ds, keyword, value)


def block(planes: int = 10, **changes: Any) -> Phantom:
    """Return a stack with a bright block in a corner, so that every flip shows."""
    pixels = np.random.default_rng(5).integers(0, 400, (planes, 20, 18)).astype(np.uint16)
    pixels[1 : planes // 2, 2:9, 3:8] += 400
    return straight(planes, pixels=pixels, between_rows=1.25, between_columns=0.75, **changes)


def bright_in(channel: int, of: int) -> bytes:
    """Return a network whose label is 1 where one of its channels is above the threshold."""
    weight = np.zeros((2, of, 1, 1, 1), np.float32)
    weight[1, channel] = 1
    return TinyNetwork(((weight, np.array([0, -THRESHOLD], np.float32)),)).onnx()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A zoo with `ct`, and `pair`, which takes two channels and labels what is bright in the second."""
    machine = Machine(tmp_path_factory.mktemp("machine"))
    ct = {"modality": "CT", "intensity": {"scheme": "identity"}}
    accepts = {"modality": ["CT"]}
    fields = threshold_entry("ct", channels=[{"name": "CT", **ct}], accepts=accepts)
    machine.add(fields | {"geometry": {"uneven": "regularise"}})
    for tilt in ("accept", "regularise"):
        fields = threshold_entry(f"tilt-{tilt}", channels=[{"name": "CT", **ct}], accepts=accepts)
        machine.add(fields | {"geometry": {"tilt": tilt}})
    fields = threshold_entry("pair", channels=[{"name": name, **ct} for name in ("plain", "late")], accepts=accepts)
    write_entry(machine.folder / "zoo" / "pair", fields, [bright_in(1, 2)])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DINTS_ZOO", "DINTS_STATE"):
            patch.setenv(name, machine.environment()[name])
        yield machine


def segment(*words: object) -> Said:
    """Run `segment --json` in this process, on ONNX Runtime."""
    return run_cli("segment", *words, "--engine", "onnx", "--threads", 1, "--json")


def cases(done: Said) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(done.out)["cases"]
    return found


def failed_checks(result: Path, source: Path) -> list[str]:
    """Return the names of what `verify` finds untrue."""
    checks = json.loads(run_cli("verify", result, "--source", source, "--json").out)["checks"]
    return [check["name"] for check in checks if not check["passed"]]


def mask_of(seg: Any) -> dict[str, Any]:
    """Return SOPInstanceUID -> (rows, columns) mask of a SEG's source planes."""
    return {uid: frame.segments for (uid, _), frame in seg_planes(seg).items()}


def expected_mask(paths: list[Path]) -> dict[str, Any]:
    """Return the same, from the stored values of the source itself."""
    sources = [dcmread(path) for path in paths]
    masks = {str(ds.SOPInstanceUID): (ds.pixel_array > THRESHOLD).astype(np.uint16) for ds in sources}
    return {uid: mask for uid, mask in masks.items() if mask.any()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[uid], other[uid]) for uid in one)


# --- equal bytes ----------------------------------------------------------------------------------------------------


def test_two_runs_with_one_date_write_equal_objects(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, with their own seeds of hashes; and a run whose date changes dates alone, not the UIDs."""
    write(tmp_path / "in", block())
    words = (tmp_path / "in", "--model", "ct", "--to", ",".join(OBJECTS), "-o")
    for out in ("one", "other"):
        done = machine.segment(*words, tmp_path / out, more={"SOURCE_DATE_EPOCH": "1000000000"})
        assert done.code == 0, done.err
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000086400")
    assert segment(*words, tmp_path / "later").code == 0
    names = files(tmp_path / "one")
    assert len(names) == len(OBJECTS)
    for name in names:
        one, other, later = (tmp_path / out / name for out in ("one", "other", "later"))
        assert one.read_bytes() == other.read_bytes() != later.read_bytes(), name
        assert (read_object(one).SeriesDate, read_object(one).SeriesTime) == ("20010909", "014640")
        assert read_object(later).SeriesDate == "20010910"
        assert read_object(later).SOPInstanceUID == read_object(one).SOPInstanceUID


def test_label_maps_and_refusals_of_one_date_are_equal(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    write(tmp_path / "in", block())
    write(tmp_path / "few", block(planes=2))
    for source, formats, code in (("in", "dicom-labelmap", 0), ("few", "dicom-sr", REFUSED)):
        runs = []
        for out in (tmp_path / "a", tmp_path / "b"):
            done = segment(tmp_path / source, "--model", "ct", "-o", out / source, "--to", formats)
            assert done.code == code, done.err
            runs.append([path.read_bytes() for path in sorted((out / source).iterdir())])
        assert runs[0] == runs[1]
        assert len(runs[0]) == 1


def test_times_are_in_the_zone_of_the_source(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def western(ds: Dataset, index: int) -> None:
        ds.TimezoneOffsetFromUTC = "-0530"

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    write(tmp_path / "in", block(), change=western)
    assert segment(tmp_path / "in", "--model", "ct", "-o", tmp_path / "out", "--to", "dicom-seg").code == 0
    seg = read_object(next((tmp_path / "out").glob("*.dcm")))
    assert (seg.ContentDate, seg.ContentTime, seg.TimezoneOffsetFromUTC) == ("20010908", "201640", "-0530")


def test_a_date_that_is_none_is_a_wrong_call(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "today")
    write(tmp_path / "in", block())
    done = segment(tmp_path / "in", "--model", "ct", "-o", tmp_path)
    assert done.code == USAGE
    assert "SOURCE_DATE_EPOCH" in done.err


# --- no identifier --------------------------------------------------------------------------------------------------


def words_of(picture: Path) -> str:
    """Return the text that a PNG carries beside its pixels."""
    with Image.open(picture) as image:
        return repr(image.info)


def test_no_command_says_who_the_patient_is(
    machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every command, in text and in JSON, done, refused and failed; and every output that is no DICOM object."""
    caplog.set_level(logging.DEBUG)
    study, gap, cut, two = (tmp_path / name for name in ("study", "gap", "cut", "two"))
    write(study, block(), change=marked)
    uneven = block()
    uneven.positions[7:] += [0, 0, 0.9]
    write(gap, uneven, change=marked, name="gap")
    paths = write(cut, block(), change=marked, name="cut")
    paths[3].write_bytes(paths[3].read_bytes()[:-9])
    paths[4].rename(paths[4].with_name("Zzfamily.dcm"))
    for name in ("one", "other"):
        write(two / name, block(), change=marked, name=name)
    broken = tmp_path / "broken.dcm"
    broken.write_bytes(paths[0].read_bytes()[:700])
    caplog.clear()
    capfd.readouterr()

    out, said = tmp_path / "out", []
    for source in (study, gap, cut, two, paths[0], broken):
        for form in ((), ("--json",)):
            said.append(run_cli("dicom", "inspect", source, *form))
            words = ("--model", "ct", "-o", out / source.stem, "--engine", "onnx", "--to", ",".join(FORMATS))
            said.append(run_cli("segment", source, *words, *form))
            assert said[-1].code == (0 if source in (study, gap) else REFUSED), said[-1]
    objects = sorted(out.rglob("*.dcm"))
    assert len(objects) == 2 * 4 + 3  # the broken file has no image that a report could refer to
    for path in [*objects, paths[0], broken]:
        said += [run_cli("verify", path, "--source", source) for source in (study, broken)]
    everything = [*files(out), *(text for one in said for text in (one.out, one.err)), caplog.text, *capfd.readouterr()]
    everything += [re.sub('base64,[^"]+', "", path.read_text()) for path in out.rglob("*.html")]
    everything += [words_of(path) for path in out.rglob("*.png")]
    everything += [repr(nibabel.load(path).header.structarr) for path in out.rglob("*.nii.gz")]
    text = "\n".join(everything)
    for code in ("dicom-truncated", "series-ambiguous", "dicom-uneven-steps", "dicom-too-few-slices"):
        assert code in text  # the marked series went all these ways
    assert [value for value in MARKED.values() if value in text] == []
    assert re.search("zz.*", text, re.IGNORECASE) is None


def test_a_refusal_report_says_nothing_of_the_patient_but_in_the_patients_own_attributes(
    machine: Machine, tmp_path: Path
) -> None:
    write(tmp_path / "in", block(planes=2), change=marked)
    segment(tmp_path / "in", "--model", "ct", "-o", tmp_path / "out", "--to", "dicom-sr")
    report = read_object(next((tmp_path / "out").glob("*.sr.dcm")))
    assert str(report.PatientName) == MARKED["PatientName"]
    assert "Zz" not in str(report.ContentSequence)


# --- what is said of a scan -------------------------------------------------------------------------------------------


def test_a_person_reads_which_series_was_taken_and_what_was_done_about_its_geometry(
    machine: Machine, tmp_path: Path
) -> None:
    uneven = block()
    uneven.positions[7:] += [0, 0, 0.9]
    write(tmp_path / "in", uneven)
    done = run_cli("segment", tmp_path / "in", "--model", "ct", "-o", tmp_path / "out", "--engine", "onnx")
    assert done.code == 0, done.err
    assert re.search(r"^  taken: series 4 [0-9a-f]{10} \(phantom\)$", done.out, re.MULTILINE)
    assert "resampled to a regular grid: expected even steps" in done.out


# --- lists of files -------------------------------------------------------------------------------------------------


def test_the_files_of_a_series_are_one_case_whatever_their_order_and_names(machine: Machine, tmp_path: Path) -> None:
    paths = write(tmp_path / "in", block())
    named = [path.rename(path.with_name(f"IM{(7 * n) % 10}")) for n, path in enumerate(paths)]
    out = tmp_path / "out"
    done = segment(*named, "--model", "ct", "-o", out, "--to", "nifti,dicom-seg")
    assert done.code == 0, done.err
    assert files(out) == ["IM0_seg.nii.gz", "IM0_seg.seg.dcm"]
    assert same(mask_of(read_object(out / "IM0_seg.seg.dcm")), expected_mask(named))
    folder = segment(tmp_path / "in", "--model", "ct", "-o", tmp_path / "folder.nii.gz")
    assert cases(folder)[0]["scan"]["sha256"] == cases(done)[0]["scan"]["sha256"]


def test_files_of_two_studies_are_two_cases_beside_a_folder(machine: Machine, tmp_path: Path) -> None:
    one, other = (write(tmp_path / name, block(planes=n), name=name) for name, n in (("a", 6), ("b", 8)))
    for path in other:
        path.rename(path.with_name(f"b{path.name}"))
    write(tmp_path / "folder", block(planes=5), name="c")
    mixed = [*one, *sorted((tmp_path / "b").iterdir())]
    done = segment(mixed[0], tmp_path / "folder", *mixed[1:], "--model", "ct", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert [case["scan"]["shape"][2] for case in cases(done)] == [6, 5, 8]


def test_a_damaged_file_of_a_list_refuses_its_series(machine: Machine, tmp_path: Path) -> None:
    paths = write(tmp_path / "in", block())
    paths[-1].write_bytes(paths[-1].read_bytes()[:300])
    done = segment(*paths, "--model", "ct", "-o", tmp_path / "out")
    assert done.code == REFUSED
    assert cases(done)[0]["code"] in ("dicom-truncated", "dicom-corrupt")
    assert len(cases(done)) == 1


# --- channels -------------------------------------------------------------------------------------------------------


def two_channels(folder: Path, *, second: Phantom, frame: str | None = None) -> list[list[Path]]:
    """Write two series of one study in one frame of reference, or the second in another."""
    study, shared = generate_uid(), generate_uid()

    def into(uid: str) -> Any:
        def change(ds: Dataset, index: int) -> None:
            ds.StudyInstanceUID, ds.FrameOfReferenceUID = study, uid

        return change

    first = write(folder / "plain", straight(10, 20, 18, between_rows=1.25, between_columns=0.75), change=into(shared))
    return [first, write(folder / "late", second, change=into(shared if frame is None else frame), name="late")]


def test_each_channel_of_a_case_may_be_a_dicom_folder(machine: Machine, tmp_path: Path) -> None:
    _, late = two_channels(tmp_path, second=block())
    channels = [word for name in ("plain", "late") for word in ("--channel", f"{name}={tmp_path / name}")]
    done = segment(*channels, "--model", "pair", "-o", tmp_path / "out", "--to", "dicom-seg")
    assert done.code == 0, done.err
    seg = read_object(next((tmp_path / "out").glob("*.dcm")))
    plain = sorted((tmp_path / "plain").iterdir())
    expected = list(expected_mask(late).values())
    found = mask_of(seg)
    assert set(found) <= {str(dcmread(path).SOPInstanceUID) for path in plain}  # drawn on the first channel
    assert sum(int(mask.sum()) for mask in found.values()) == sum(int(mask.sum()) for mask in expected) > 0
    assert failed_checks(tmp_path / "out" / "plain_seg.seg.dcm", tmp_path) == []
    shutil.rmtree(tmp_path / "late")
    assert failed_checks(tmp_path / "out" / "plain_seg.seg.dcm", tmp_path) == ["input"]


@pytest.mark.parametrize("frame", ["1.2.3.4", ""])
def test_channels_in_two_frames_of_reference_are_refused_though_their_numbers_agree(
    machine: Machine, tmp_path: Path, frame: str
) -> None:
    two_channels(tmp_path, second=block(), frame=frame)
    channels = [word for name in ("plain", "late") for word in ("--channel", f"{name}={tmp_path / name}")]
    done = segment(*channels, "--model", "pair", "-o", tmp_path / "out", "--to", "nifti")
    assert (done.code, cases(done)[0]["code"]) == (REFUSED, "frame-mismatch")


def test_channels_on_two_grids_are_refused(machine: Machine, tmp_path: Path) -> None:
    moved = block()
    two_channels(tmp_path, second=replace(moved, positions=moved.positions + np.array([0.0, 0.5, 0.0])))
    channels = [word for name in ("plain", "late") for word in ("--channel", f"{name}={tmp_path / name}")]
    done = segment(*channels, "--model", "pair", "-o", tmp_path / "out")
    assert (done.code, cases(done)[0]["code"]) == (REFUSED, "frame-mismatch")


def test_dicom_and_nifti_channels_of_one_case_are_a_wrong_call(machine: Machine, tmp_path: Path) -> None:
    write(tmp_path / "plain", block())
    (tmp_path / "late.nii").write_bytes(b"")
    options = ("--channel", f"plain={tmp_path / 'plain'}", "--channel", f"late={tmp_path / 'late.nii'}")
    done = segment(*options, "--model", "pair", "-o", tmp_path / "out")
    assert (done.code, cases(done)[0]["code"]) == (USAGE, "usage")
    wrong = ("--channel", f"one={tmp_path / 'plain'}", "--channel", f"two={tmp_path / 'plain'}")
    done = segment(*wrong, "--model", "pair", "-o", tmp_path / "out")
    assert (done.code, cases(done)[0]["code"]) == (REFUSED, "scan-channels")


# --- an entry's policy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["accept", "regularise"])
def test_a_tilted_series_is_segmented_as_the_entry_says(machine: Machine, tmp_path: Path, action: str) -> None:
    """Accepted, the mask is the threshold on every source slice; regularised, it is within the interpolation."""
    upright = block()
    solid = upright.pixels % 100
    solid[1:6, 4:16, 5:14] += 900
    places = upright.positions + np.arange(10)[:, np.newaxis] * np.array([0, 0.5, 0])
    leaning = replace(upright, pixels=solid, positions=places)
    paths = write(tmp_path / "in", leaning)
    refused = segment(tmp_path / "in", "--model", "ct", "-o", tmp_path / "out")
    assert (refused.code, cases(refused)[0]["code"]) == (REFUSED, "dicom-tilt")
    done = segment(tmp_path / "in", "--model", f"tilt-{action}", "-o", tmp_path / "out", "--to", "dicom-seg,html")
    assert done.code == 0, done.err
    said = f"{'accepted' if action == 'accept' else 'resampled to a regular grid'}: expected slices above each other"
    (line,) = cases(done)[0]["series"]["handled"]
    assert line.startswith(said)
    assert line.endswith("[dicom-tilt]")
    page = html.unescape((tmp_path / "out" / "in_seg.html").read_text())
    assert said.capitalize() in page
    assert "Taken: series 4 " in page
    seg = tmp_path / "out" / "in_seg.seg.dcm"
    assert failed_checks(seg, tmp_path / "in") == []
    found, expected = mask_of(read_object(seg)), expected_mask(paths)
    if action == "accept":
        assert same(found, expected)
        return
    pixels = [(found[uid].astype(bool), mask.astype(bool)) for uid, mask in expected.items()]
    overlap = sum(int((a & b).sum()) for a, b in pixels) / sum(int((a | b).sum()) for a, b in pixels)
    assert overlap > 0.8
