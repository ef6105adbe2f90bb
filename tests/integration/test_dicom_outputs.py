"""Written objects before real peers: dciodvfy, highdicom and Orthanc, for real series with every trap of geometry."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dints_deploy.catalog.catalog import LoadedEntry
from dints_deploy.dicom.objects import object_uid
from dints_deploy.dicom.readback import seg_planes
from dints_deploy.dicom.refusal import write_refusal
from dints_deploy.dicom.result import DicomResult
from dints_deploy.dicom.rtstruct import write_rtstruct
from dints_deploy.dicom.seg import write_seg
from dints_deploy.dicom.series import collect
from dints_deploy.dicom.verify import verify_result
from dints_deploy.errors import ScanRefused
from tests.dicom_phantoms import Phantom, scans, write
from tests.dicom_results import (
    ENTRY,
    WHEN,
    WRITERS,
    read_object,
    result_of,
    shapes,
    thresholded,
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


def needs(*programs: str) -> None:
    """Skip where a program of Debian's packages is not installed."""
    if missing := [name for name in programs if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian packages dicom3tools, dcmtk, orthanc)")


@cache
def real_result(name: str) -> DicomResult:
    """Return a result on a real series: the brighter tissue, smoothed, in pieces of at least a hundred voxels."""
    from scipy.ndimage import gaussian_filter, label

    volume = volume_of(scans(name))
    data = gaussian_filter(volume.volume.data[0], (3.0, 3.0, 0.5))
    smooth = replace(volume, volume=replace(volume.volume, data=data[np.newaxis]))
    mask = thresholded(smooth)
    for value in (1, 2):
        pieces = label(mask == value)[0]
        mask[(mask == value) & (np.bincount(pieces.ravel()) < 100)[pieces]] = 0
    return result_of(volume, mask)


def errors_of(path: Path) -> list[str]:
    found = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, timeout=60, check=False)
    lines = (found.stdout + found.stderr).splitlines()
    assert lines, "dciodvfy says at least which IOD it checks"
    return [line for line in lines if line.startswith("Error")]


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

    (source, *_) = [one for one in scans("negated-cosines").rglob("*") if one.is_file()]
    assert failed(source, zoo=zoo) == {"provenance"}
    (tmp_path / "none.dcm").write_bytes(b"not DICOM")
    with pytest.raises(ScanRefused, match="dicom-corrupt"):
        verify_result(tmp_path / "none.dcm", zoo=zoo)


def test_verify_sees_that_a_source_pixel_changed(tmp_path: Path) -> None:
    from tests.dicom_phantoms import straight

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


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Start a real Orthanc on 127.0.0.1; yield its REST address and DICOM port."""
    needs("Orthanc", "storescu")
    folder = tmp_path_factory.mktemp("orthanc")
    http, dicom = free_port(), free_port()
    settings_file = folder / "orthanc.json"
    settings_file.write_text(
        json.dumps(
            {
                "StorageDirectory": str(folder / "db"),
                "IndexDirectory": str(folder / "db"),
                "HttpPort": http,
                "DicomPort": dicom,
                "DicomAet": "ORTHANC",
                "RemoteAccessAllowed": False,
                "HttpBindAddresses": ["127.0.0.1"],
                "AuthenticationEnabled": True,
                "RegisteredUsers": {"test": "test"},
                "DicomAlwaysAllowStore": True,
                "Plugins": [],
            }
        )
    )
    address = f"http://127.0.0.1:{http}"
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(["Orthanc", str(settings_file)], stdout=log, stderr=log) as server,
    ):
        try:
            wait_for(address)
            yield address, dicom
        finally:
            server.terminate()
            server.wait(timeout=30)


def free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_for(address: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            ask(f"{address}/system")
            return
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def ask(url: str, data: bytes | None = None) -> bytes:
    token = base64.b64encode(b"test:test").decode()
    request = urllib.request.Request(url, data=data, headers={"Authorization": f"Basic {token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


@pytest.mark.parametrize("name", ["brain-studies/study-3/11_HCropVolume", "enhanced-mr", "gantry-tilt-ge"])
def test_orthanc_stores_every_object_and_gives_it_back(name: str, orthanc: tuple[str, int], tmp_path: Path) -> None:
    """By C-STORE with dcmtk's storescu; the REST interface then has each one, readable, in the source's study."""
    address, port = orthanc
    result = replace(real_result(name), when=WHEN)
    labelmap = replace(result, segmentation_type="LABELMAP")
    paths = [writer(result, tmp_path / f"{kind}.dcm") for kind, writer in WRITERS.items() if kind != "sr-alone"]
    paths.append(refusal(name, tmp_path))
    sent = subprocess.run(
        ["storescu", "-R", "-aec", "ORTHANC", "127.0.0.1", str(port), *map(str, paths)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert sent.returncode == 0, sent.stderr
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


def instance(address: str, uid: str) -> str:
    (stored,) = json.loads(ask(f"{address}/tools/lookup", uid.encode()))
    return str(stored["ID"])


def refusal(name: str, folder: Path) -> Path:
    (series,) = [one for one in collect(scans(name)).series if one.slices]
    error = ScanRefused("scan-extent", "expected 100 mm, found 60 mm: choose another series")
    return write_refusal(series, error, folder / "no.dcm", entry=ENTRY, software="0.1.0", when=WHEN)


@pytest.mark.parametrize("name", ["brain-studies/study-3/11_HCropVolume", "ct-dicom-j2k"])
def test_a_refusal_is_clean_under_dciodvfy(name: str, tmp_path: Path) -> None:
    needs("dciodvfy")
    assert errors_of(refusal(name, tmp_path)) == []


def filled(points: Sequence[Sequence[float]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Fill a polygon with Pillow, a reader of its own."""
    from PIL import Image, ImageDraw

    picture = Image.new("L", (shape[1] * 8, shape[0] * 8))
    ImageDraw.Draw(picture).polygon([((x + 0.5) * 8, (y + 0.5) * 8) for x, y in points], fill=1)
    return np.asarray(picture)[4::8, 4::8].astype(bool)


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
