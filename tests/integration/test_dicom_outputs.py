"""Written objects before real peers: dciodvfy, highdicom and Orthanc, for real series with every trap of geometry."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dints_deploy.dicom.objects import object_uid
from dints_deploy.dicom.readback import seg_planes
from dints_deploy.dicom.refusal import write_refusal
from dints_deploy.dicom.rtstruct import write_rtstruct
from dints_deploy.dicom.seg import write_seg
from dints_deploy.dicom.series import collect
from dints_deploy.errors import ScanRefused
from tests.dicom_peers import ask, errors_of, filled, instance, needs, orthanc, store
from tests.dicom_phantoms import Phantom, scans, write
from tests.dicom_results import (
    ENTRY,
    WHEN,
    WRITERS,
    read_object,
    real_result,
    result_of,
    volume_of,
)

REAL = [
    "brain-studies/study-1/13_HCropVolume",
    "brain-studies/study-3/11_HCropVolume",
    "brain-studies/study-3/11-T1post-18670",
    "compressed/j2k/001",
    "ct-3slice",
    "ct-dicom-j2k",
    "enhanced-ct",
    "enhanced-mr",
    "gantry-tilt-ge",
    "negated-cosines",
    "non-square-pixels",
    "oblique-non-square",
    "refusals/gantrytilting/001",
]

COPIED_ERRORS = {
    "compressed/j2k/001": ("PatientAge",),  # "0Y" in the source
    "gantry-tilt-ge": ("DeidentificationMethod",),  # empty in the source
    "refusals/gantrytilting/001": ("PatientAge",),  # "0Y" in the source
}
"""What dciodvfy finds wrong with attributes that are the source's own."""


@pytest.mark.parametrize("name", REAL)
def test_objects_of_real_series_are_right_and_clean_under_dciodvfy(name: str, tmp_path: Path) -> None:
    needs("dciodvfy")
    result = real_result(name)
    assert not result.empty
    for kind, writer in WRITERS.items():
        path = writer(result, tmp_path / f"{kind}.dcm")  # the self-check is part of writing
        unexpected = [
            line for line in errors_of(path) if not any(f"</{word}(" in line for word in COPIED_ERRORS.get(name, ()))
        ]
        assert unexpected == [], kind


def test_dciodvfy_sees_a_wrong_object(tmp_path: Path) -> None:
    """The measure itself."""
    needs("dciodvfy")
    seg = read_object(write_seg(real_result("negated-cosines"), tmp_path / "seg.dcm"))
    del seg.SegmentSequence
    seg.save_as(tmp_path / "bad.dcm")
    assert any("SegmentSequence" in line for line in errors_of(tmp_path / "bad.dcm"))


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
@pytest.mark.parametrize(
    "name", ["brain-studies/study-3/11_HCropVolume", "enhanced-mr", "negated-cosines", "ct-3slice"]
)
def test_highdicom_reads_the_mask_back_exactly(name: str, kind: Any, tmp_path: Path) -> None:
    from highdicom.seg import segread

    result = replace(real_result(name), segmentation_type=kind)
    seg = segread(write_seg(result, tmp_path / "seg.dcm"))
    volume = seg.get_volume(combine_segments=True)
    to_voxel = np.linalg.inv(result.labels.affine) @ np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    where = np.argwhere(volume.array)
    voxels = where @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    assert np.abs(voxels - np.rint(voxels)).max() < 0.1
    found = np.zeros(result.labels.shape, dtype=np.uint8)
    found[tuple(np.rint(voxels).astype(int).T)] = volume.array[tuple(where.T)]
    np.testing.assert_array_equal(found, result.labels.data[0])


def test_a_tilted_head_ct_has_its_mask_on_all_source_slices_that_it_touches(tmp_path: Path) -> None:
    """gantry-tilt-ge: +18.5 degrees, steps of 4, 7 and 1.08 mm; each pixel against the regular grid's nearest voxel."""
    result = real_result("gantry-tilt-ge")
    assert result.volume.regularised
    planes = seg_planes(read_object(write_seg(result, tmp_path / "seg.dcm")))
    to_voxel = np.linalg.inv(result.labels.affine) @ np.diag([-1.0, -1.0, 1.0, 1.0])
    mask = result.labels.data[0]
    touched = 0
    for path in sorted(scans("gantry-tilt-ge").rglob("*")):
        if not path.is_file():
            continue
        source = read_object(path)
        row, column = np.array(source.ImageOrientationPatient, dtype=float).reshape(2, 3)
        r, c = np.indices((512, 512))
        lps = np.array(source.ImagePositionPatient, dtype=float) + (
            c[..., None] * row * float(source.PixelSpacing[1]) + r[..., None] * column * float(source.PixelSpacing[0])
        )
        voxel = lps @ to_voxel[:3, :3].T + to_voxel[:3, 3]
        sure = (np.abs(voxel - np.floor(voxel) - 0.5) > 0.01).all(axis=-1)  # not half-way between two voxels
        expected = mask[tuple(np.moveaxis(np.rint(voxel).astype(int), -1, 0))]
        frame = planes.get((str(source.SOPInstanceUID), 0))
        written = np.zeros_like(expected) if frame is None else frame.segments
        np.testing.assert_array_equal(written[sure], expected[sure])
        touched += bool(expected.any())
    assert touched == len(planes) > 20


@st.composite
def phantoms(draw: st.DrawFn) -> tuple[Phantom, list[int]]:
    """Draw a series of any orientation, spacing, order and tilt, with bright blobs."""
    rotation = np.linalg.qr(np.random.default_rng(draw(st.integers(0, 999))).normal(size=(3, 3)))[0]
    row, column = rotation[:, 0], rotation[:, 1]  # left- or right-handed with the third: either way of stacking
    planes, rows, columns = draw(st.integers(3, 7)), draw(st.integers(5, 14)), draw(st.integers(5, 14))
    lean = draw(st.sampled_from([0.0, 0.2, -0.4]))
    steps = np.full(planes, draw(st.floats(0.8, 6)))
    if draw(st.booleans()):
        steps = steps * np.array(draw(st.lists(st.floats(1.0, 2.4), min_size=planes, max_size=planes)))
    heights = np.cumsum(steps)
    coarse = np.random.default_rng(draw(st.integers(0, 999))).integers(0, 2, (planes, rows // 2 + 1, columns // 2 + 1))
    pixels = np.repeat(np.repeat(coarse, 2, axis=1), 2, axis=2)[:, :rows, :columns].astype(np.uint16) * 1000
    phantom = Phantom(
        pixels=pixels,
        positions=np.array([13.0, -40.0, 7.0]) + heights[:, np.newaxis] * (rotation[:, 2] + lean * column),
        row=tuple(row.tolist()),
        column=tuple(column.tolist()),
        between_rows=draw(st.floats(0.4, 4)),
        between_columns=draw(st.floats(0.4, 4)),
    )
    return phantom, draw(st.permutations(range(planes)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(phantoms(), st.sampled_from(["BINARY", "LABELMAP"]))
def test_a_threshold_on_any_series_comes_back_within_half_a_voxel(drawn: tuple[Phantom, list[int]], kind: Any) -> None:
    """The SEG's pixels, placed by the SEG alone, against the phantom's: upright ones exactly, others by nearest."""
    phantom, order = drawn
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "in", phantom, order=order)
        volume = volume_of(Path(folder) / "in")
        mask = (volume.volume.data[0] > 500).astype(np.uint8)
        result = result_of(volume, mask, segmentation_type=kind)
        path = write_seg(result, Path(folder) / "seg.dcm")
        seg = read_object(path)
        if not result.empty:
            write_rtstruct(result, Path(folder) / "rs.dcm")  # checks itself
    if result.empty:
        assert seg.Modality == "SR"
        return
    voxel_mm = np.array(volume.volume.grid.spacing)
    to_voxel = np.linalg.inv(volume.volume.affine)
    ras: NDArray[Any] = phantom.ras()
    written: dict[int, NDArray[np.uint16]] = {}
    for frame in seg_planes(seg).values():
        index = int(np.linalg.norm(phantom.positions - frame.affine[:3, 3], axis=1).argmin())
        written[index] = frame.segments
        grid = np.indices(frame.segments.shape)
        r, c = grid[0], grid[1]
        lps = frame.affine[:3, 3] + c[..., None] * frame.affine[:3, 0] + r[..., None] * frame.affine[:3, 1]
        np.testing.assert_allclose(lps * [-1, -1, 1], ras[index], atol=1e-3)
        if not volume.regularised:
            np.testing.assert_array_equal(frame.segments > 0, phantom.pixels[index] > 0)
    for index in range(len(ras)):
        places = ras[index]
        voxel = places @ to_voxel[:3, :3].T + to_voxel[:3, 3]
        nearest = np.rint(voxel).astype(int)
        assert (np.abs(voxel - nearest) * voxel_mm <= voxel_mm / 2 + 1e-6).all()
        sure = (np.abs(np.abs(voxel - nearest) - 0.5) > 1e-3).all(axis=-1)
        expected: NDArray[Any] = mask[tuple(np.moveaxis(nearest, -1, 0))]
        found = written.get(index, np.zeros(expected.shape, dtype=np.uint16))
        np.testing.assert_array_equal(found[sure], expected[sure])


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    with orthanc(tmp_path_factory.mktemp("orthanc")) as running:
        yield running


@pytest.mark.parametrize("name", ["brain-studies/study-3/11_HCropVolume", "enhanced-mr"])
def test_orthanc_stores_every_object_and_gives_it_back(name: str, pacs: tuple[str, int], tmp_path: Path) -> None:
    """By C-STORE with dcmtk's storescu; the REST interface then has each one, readable, in the source's study."""
    address, port = pacs
    result = replace(real_result(name), when=WHEN)
    labelmap = replace(result, segmentation_type="LABELMAP")
    paths = [writer(result, tmp_path / f"{kind}.dcm") for kind, writer in WRITERS.items() if kind != "sr-alone"]
    paths.append(refusal(name, tmp_path))
    store(port, paths)
    paths.append(write_seg(labelmap, tmp_path / "labelmap.dcm"))  # newer than dcmtk's list of classes: by REST
    ask(f"{address}/instances", paths[-1].read_bytes())
    for path in paths:
        uid = str(read_object(path).SOPInstanceUID)
        (stored,) = json.loads(ask(f"{address}/tools/lookup", uid.encode()))
        assert stored["Type"] == "Instance"
        back = tmp_path / "back.dcm"
        back.write_bytes(ask(f"{address}/instances/{stored['ID']}/file"))
        assert read_object(back).to_json_dict() == read_object(path).to_json_dict()
        study = json.loads(ask(f"{address}/instances/{stored['ID']}/study"))
        assert study["MainDicomTags"]["StudyInstanceUID"] == result.study
        assert json.loads(ask(f"{address}/instances/{stored['ID']}/simplified-tags"))["SOPInstanceUID"] == uid
    picture = ask(f"{address}/instances/{instance(address, object_uid(result, 'sc', 'instance'))}/preview")
    assert picture.startswith(b"\x89PNG")


def refusal(name: str, folder: Path) -> Path:
    (series,) = [one for one in collect(scans(name)).series if one.slices]
    error = ScanRefused("scan-extent", "expected 100 mm, found 60 mm: choose another series")
    return write_refusal(series, error, folder / "no.dcm", entry=ENTRY, software="0.1.0", when=WHEN)


@pytest.mark.parametrize("name", ["brain-studies/study-3/11_HCropVolume", "ct-dicom-j2k"])
def test_a_refusal_is_clean_under_dciodvfy(name: str, tmp_path: Path) -> None:
    needs("dciodvfy")
    assert errors_of(refusal(name, tmp_path)) == []


@pytest.mark.parametrize("name", ["brain-studies/study-3/11_HCropVolume", "non-square-pixels", "negated-cosines"])
def test_another_rasteriser_fills_the_contours_to_the_mask(name: str, tmp_path: Path) -> None:
    """Pillow draws on an eight times finer grid: what it fills at the pixels' centres is the mask."""
    result = real_result(name)
    plan = read_object(write_rtstruct(result, tmp_path / "rs.dcm"))
    places = {plane.header.SOPInstanceUID: n for n, plane in enumerate(result.planes)}
    found = np.zeros_like(result.segments)
    for roi in plan.ROIContourSequence:
        for contour in roi.get("ContourSequence") or []:
            place = places[str(contour.ContourImageSequence[0].ReferencedSOPInstanceUID)]
            plane = result.planes[place]
            points = np.array(contour.ContourData, dtype=float).reshape(-1, 3) - plane.position
            x, y = points @ plane.row / plane.between_columns, points @ plane.column / plane.between_rows
            found[place][filled(np.stack([x, y], axis=1).tolist(), found.shape[1:])] = roi.ReferencedROINumber
    wrong = np.count_nonzero(found != result.segments)
    assert wrong == 0
