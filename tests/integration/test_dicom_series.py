"""Folders, zips and lists of files become series; damage, links and tricks become findings or refusals, no crashes."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from dints_deploy.dicom.bounded import Limits
from dints_deploy.dicom.inspect import as_lines, describe
from dints_deploy.dicom.read import read_series
from dints_deploy.dicom.series import Study, collect, opened
from dints_deploy.errors import ScanRefused, UsageError
from tests.dicom_phantoms import MARK, save, straight, write


def codes(study: Study) -> list[str]:
    return [item.code for item in study.findings]


def refused_code(act: Callable[[], object]) -> str:
    with pytest.raises(ScanRefused) as refused:
        act()
    assert MARK not in str(refused.value)
    return refused.value.code


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened_zip:
        for name, data in members.items():
            opened_zip.writestr(name, data)
    return path


def test_a_folder_is_grouped_by_series_whatever_the_folders_and_names_are(tmp_path: Path) -> None:
    write(tmp_path / "a", straight(planes=4), name="one")
    write(tmp_path / "b", straight(planes=3, step=3.0), name="two")
    shutil.move(tmp_path / "a" / "0002.dcm", tmp_path / "b" / "zz")
    study = collect(tmp_path)
    assert sorted(len(series.slices) for series in study.series) == [3, 4]
    for series in study.series:
        assert (series.Modality, series.SeriesNumber, series.SeriesDescription) == ("CT", 4, "phantom")
        assert not series.contrast
        assert read_series(series).volume.shape[2] == len(series.slices)
        assert len(series.label) == 10
        assert len(series.files) == len(series.slices) == series.objects


def test_a_list_of_files_a_single_file_and_a_zip_give_the_same_series(tmp_path: Path) -> None:
    paths = write(tmp_path / "in", straight())
    packed = archive(tmp_path / "x.zip", {f"d/{path.name}": path.read_bytes() for path in paths})
    (listed,) = collect(paths).series
    (alone,) = collect(paths[0]).series
    assert (len(listed.slices), len(alone.slices)) == (5, 1)
    with opened(packed) as study:
        (unpacked,) = study.series
        assert [one.InstanceNumber for one in unpacked.slices] == [1, 2, 3, 4, 5]
        scratch = unpacked.files[0].parent
        assert (read_series(unpacked).volume.data == read_series(listed).volume.data).all()
    assert not scratch.exists()
    with pytest.raises(UsageError, match="scratch"):
        collect(packed)


def test_links_pipes_and_folders_in_a_folder_are_left_out_and_named(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    write(inside, straight(planes=3))
    secret = write(outside, straight(planes=4), name="secret")
    (inside / "link.dcm").symlink_to(secret[0])
    (inside / "folder").symlink_to(outside)
    os.mkfifo(inside / "pipe")
    study = collect(inside)
    assert len(study.series) == 1
    assert codes(study) == ["dicom-not-a-file", "dicom-not-a-file"]


def test_other_files_are_notes_and_a_folder_without_dicom_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x" * 500)
    (tmp_path / "empty").touch()
    assert refused_code(lambda: collect(tmp_path)) == "dicom-no-images"
    write(tmp_path / "s", straight())
    study = collect(tmp_path)
    assert codes(study) == ["scan-empty", "dicom-not-dicom"]
    assert read_series(study.series[0]).volume.shape == (7, 6, 5)


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    assert refused_code(lambda: collect(tmp_path / "nothing")) == "scan-missing"
    assert refused_code(lambda: collect([])) == "dicom-no-images"


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda data: data[:600], "dicom-truncated"),  # in the header
        (lambda data: data[:-20], "dicom-truncated"),  # in the pixels
        (lambda data: data[:140] + b"\xff" * 200 + data[340:], "dicom-syntax"),
        (lambda data: data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"), "dicom-syntax"),
        (lambda data: data.replace(b"OW\0\0T\0\0\0", b"OW\0\0\xff\xff\xff\xff"), "dicom-pixels"),
    ],
)
def test_a_damaged_slice_refuses_its_series_even_at_the_end_of_the_stack(
    tmp_path: Path, damage: Callable[[bytes], bytes], code: str
) -> None:
    """Without the rule a truncated last slice would just be a shorter volume."""
    paths = write(tmp_path, straight(planes=6))
    paths[-1].write_bytes(damage(paths[-1].read_bytes()))
    series = max(collect(tmp_path).series, key=lambda one: len(one.slices))
    assert len(series.slices) == 5
    assert refused_code(lambda: read_series(series)) == code


def test_a_copy_of_a_file_is_left_out_and_another_image_with_its_uid_is_refused(tmp_path: Path) -> None:
    paths = write(tmp_path, straight(planes=4))
    shutil.copy(paths[1], tmp_path / "copy.dcm")
    (series,) = collect(tmp_path).series
    assert [item.code for item in series.findings] == ["dicom-copied-file"]
    assert read_series(series).volume.shape[2] == 4

    def same_uid(ds: Dataset, index: int) -> None:
        ds.SOPInstanceUID = "1.2.3.4"

    write(tmp_path / "other", straight(planes=4), change=same_uid, name="other")
    (other,) = collect(tmp_path / "other").series
    assert refused_code(lambda: read_series(other)) == "dicom-duplicate-uid"


def test_files_without_any_uid_are_one_series_by_folder_with_a_warning(tmp_path: Path) -> None:
    def anonymous(ds: Dataset, index: int) -> None:
        ds.StudyInstanceUID = ds.SeriesInstanceUID = ""

    write(tmp_path / "a", straight(planes=4), change=anonymous)
    write(tmp_path / "b", straight(planes=3), change=anonymous)
    study = collect(tmp_path)
    assert sorted(len(series.slices) for series in study.series) == [3, 4]
    assert {item.code for series in study.series for item in series.findings} == {"dicom-no-uid"}
    assert len({series.label for series in study.series}) == 2


def test_objects_that_are_no_slices_are_in_the_tree_and_refused(tmp_path: Path) -> None:
    def report(ds: Dataset, index: int) -> None:
        ds.SOPClassUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.88.22", "SR"

    write(tmp_path, straight(planes=1), change=report)
    (series,) = collect(tmp_path).series
    assert (series.slices, series.objects) == ((), 1)
    assert refused_code(lambda: read_series(series)) == "dicom-sop-class"


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil", "c:\\evil"])
def test_a_zip_that_leads_outside_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    packed = archive(tmp_path / "x.zip", {name: b"x"})
    assert refused_code(lambda: collect(packed, scratch=_folder(tmp_path))) == "dicom-archive"
    assert not list((tmp_path / "scratch").iterdir())


def test_links_passwords_nested_archives_and_damage_in_a_zip_are_refused(tmp_path: Path) -> None:
    scratch = _folder(tmp_path)
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as opened_zip:
        opened_zip.writestr(link, "/etc/passwd")
    nested = archive(tmp_path / "nested.zip", {"a.zip": archive(tmp_path / "in.zip", {"b": b"b"}).read_bytes()})
    gzipped = archive(tmp_path / "gz.zip", {"a.gz": b"\x1f\x8b\x08" + b"x" * 40})
    damaged = archive(tmp_path / "damaged.zip", {"a": os.urandom(5000)})
    damaged.write_bytes(damaged.read_bytes()[:2000] + b"y" * 200 + damaged.read_bytes()[2200:])
    for packed in (tmp_path / "link.zip", nested, gzipped, damaged):
        shutil.rmtree(scratch)
        scratch.mkdir()
        assert refused_code(lambda packed=packed: collect(packed, scratch=scratch)) == "dicom-archive"  # type: ignore[misc]


def test_a_zip_bomb_is_refused_by_its_claim_and_by_its_stream(tmp_path: Path) -> None:
    bomb = archive(tmp_path / "bomb.zip", {"a": b"\0" * 30_000_000})
    assert refused_code(lambda: collect(bomb, scratch=_folder(tmp_path))) == "dicom-too-large"
    data = bytearray(bomb.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = (1000).to_bytes(4, "little")  # the directory lies: 1000 bytes
    bomb.write_bytes(data)
    code = refused_code(lambda: collect(bomb, scratch=tmp_path / "scratch"))
    assert code in ("dicom-too-large", "dicom-archive")
    assert sum(path.stat().st_size for path in (tmp_path / "scratch").iterdir()) <= 2_000_000
    many = archive(tmp_path / "many.zip", {str(n): b"" for n in range(20)})
    limits = Limits(files=10)
    assert refused_code(lambda: collect(many, scratch=tmp_path / "scratch", limits=limits)) == "dicom-too-large"


def test_the_tree_the_log_and_every_message_are_free_of_identifiers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Marked name, id, accession number, dates and UIDs may appear nowhere, in no file's fate."""
    paths = write(tmp_path / f"{MARK}", straight(planes=6))
    paths[3].write_bytes(paths[3].read_bytes()[:-9])
    paths[4].write_bytes(paths[4].read_bytes()[:700])

    def odd(ds: Dataset, index: int) -> None:
        ds.SeriesDescription = "line\nbreak \x1b[31mred"
        ds.SliceThickness = "1" * len(MARK)

    for path in write(tmp_path / "odd", straight(planes=3), change=odd, name="odd"):
        path.write_bytes(path.read_bytes().replace(b"1" * len(MARK), MARK.encode()))  # pydicom quotes it in its log
    study = collect(tmp_path)
    tree = describe(study)
    text = "\n".join([json.dumps(tree), *as_lines(tree), caplog.text])
    uids = [series.SeriesInstanceUID for series in study.series] + [s.StudyInstanceUID for s in study.series]
    for identifier in filter(None, (MARK, "19870605", *uids)):
        assert identifier not in text
    assert "\x1b" not in text
    assert {item["code"] for one in tree["studies"][0]["series"] for item in one["findings"]} | {
        item["code"] for one in tree["studies"][-1]["series"] for item in one["findings"]
    } >= {"dicom-truncated"}


def test_the_tree_shows_geometry_and_verdict(tmp_path: Path) -> None:
    write(tmp_path / "good", straight(planes=4, rows=6, columns=7, between_rows=0.5), name="good")
    gap = straight(planes=4)
    gap.positions[3] += gap.positions[1]
    write(tmp_path / "gap", gap, name="gap")
    lines = as_lines(describe(collect(tmp_path)))
    text = "\n".join(lines)
    assert "axial, 7 x 6 x 4 voxels of 1 x 0.5 x 2 mm" in text
    assert "'phantom': accept" in text
    assert "'phantom': refuse" in text
    assert "refusal dicom-missing-slice (refuse): expected a slice every 2 mm, found 1 missing" in text
    assert "[slices 2-3]" in text


def test_a_dicomdir_is_passed_over(tmp_path: Path) -> None:
    index = Dataset()
    index.SOPClassUID, index.SOPInstanceUID = "1.2.840.10008.1.3.10", "1.2.3"
    save(index, tmp_path / "DICOMDIR")
    write(tmp_path / "s", straight())
    study = collect(tmp_path)
    assert codes(study) == ["dicom-not-dicom"]
    assert len(study.series) == 1


def _folder(parent: Path) -> Path:
    scratch = parent / "scratch"
    scratch.mkdir()
    return scratch
