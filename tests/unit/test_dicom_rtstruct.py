"""Outlines enclose exactly the mask's pixels, half a pixel from their centres, in whatever way a reader fills them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from dints_deploy.dicom.contour import outlines
from dints_deploy.dicom.objects import encoded, write_checked
from dints_deploy.dicom.readback import inside
from dints_deploy.dicom.result import DicomResult
from dints_deploy.dicom.rtstruct import write_rtstruct
from dints_deploy.dicom.selfcheck import check_rtstruct
from dints_deploy.errors import OutputError
from tests.dicom_phantoms import straight, write, write_enhanced
from tests.dicom_results import read_object, result_of, shapes, volume_of

Mask = NDArray[np.bool_]


def winding(polygon: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return how often a polygon winds around each pixel centre: a slow way that shares nothing with the product."""
    rows, columns = np.indices(shape)
    turns = np.zeros(shape, dtype=np.int64)
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        crosses = (y1 <= rows) != (y2 <= rows)
        with np.errstate(divide="ignore", invalid="ignore"):
            right = x1 + (rows - y1) * (x2 - x1) / (y2 - y1) > columns
        turns += (crosses & right) * (1 if y2 > y1 else -1)
    return turns


@settings(max_examples=150, deadline=None)
@given(arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.booleans()))
def test_outlines_enclose_exactly_the_mask_by_parity_by_winding_and_as_a_union(mask: Mask) -> None:
    polygons = outlines(mask)
    parity, union, wound = np.zeros_like(mask), np.zeros_like(mask), np.zeros(mask.shape, dtype=np.int64)
    for polygon in polygons:
        filled = inside(polygon, (mask.shape[0], mask.shape[1]))
        parity ^= filled
        union |= filled
        wound += winding(polygon, mask.shape)
    np.testing.assert_array_equal(parity, mask)
    np.testing.assert_array_equal(union, mask)
    np.testing.assert_array_equal(wound != 0, mask)


@settings(max_examples=60, deadline=None)
@given(arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.booleans()))
def test_every_corner_is_half_a_pixel_from_a_centre_inside_and_one_outside(mask: Mask) -> None:
    """Except corners of keyholes, which run through the inside."""
    padded = np.pad(mask, 2)
    for polygon in outlines(mask):
        for column, row in polygon:
            if row % 0.5:  # the ends of a keyhole lie a quarter below a row
                continue
            near = [(round(row + dr), round(column + dc)) for dr, dc in ((-0.5, 0), (0.5, 0), (0, -0.5), (0, 0.5))]
            values = {bool(padded[r + 2, c + 2]) for r, c in near if abs(r - row) + abs(c - column) == 0.5}
            assert values == {True, False}


def test_a_ring_is_one_polygon_with_a_keyhole() -> None:
    mask = np.ones((7, 7), dtype=bool)
    mask[2:5, 2:5] = False
    mask[3, 3] = True  # an island in the hole
    ring, island = sorted(outlines(mask), key=len, reverse=True)
    area = 0.5 * abs(np.dot(ring[:, 0], np.roll(ring[:, 1], -1)) - np.dot(ring[:, 1], np.roll(ring[:, 0], -1)))
    assert area == pytest.approx((49 - 4 * 0.125) - (9 - 4 * 0.125))  # corners are cut by an eighth
    assert len(island) == 4


@pytest.fixture
def result(tmp_path: Path) -> DicomResult:
    phantom = straight(planes=5, rows=14, columns=12, row=(0.8, 0.6, 0.0), column=(0.0, 0.0, -1.0))
    write(tmp_path / "in", replace(phantom, between_rows=0.5, between_columns=2.5))
    volume = volume_of(tmp_path / "in")
    return result_of(volume, shapes(volume))


def test_contours_lie_on_their_slices_around_the_mask_in_patient_space(result: DicomResult, tmp_path: Path) -> None:
    plan = read_object(write_rtstruct(result, tmp_path / "rs.dcm"))
    sources = {str(ds.SOPInstanceUID): ds for ds in map(read_object, sorted((tmp_path / "in").iterdir()))}
    masks = {uid: np.zeros((14, 12), dtype=int) for uid in sources}
    for roi in plan.ROIContourSequence:
        for contour in roi.ContourSequence:
            source = sources[str(contour.ContourImageSequence[0].ReferencedSOPInstanceUID)]
            row, column = np.array(source.ImageOrientationPatient, dtype=float).reshape(2, 3)
            points = np.array(contour.ContourData, dtype=float).reshape(-1, 3) - source.ImagePositionPatient
            assert np.abs(points @ np.cross(row, column)).max() < 1e-3
            corners = np.stack(
                [points @ row / source.PixelSpacing[1], points @ column / source.PixelSpacing[0]], axis=1
            )
            masks[str(source.SOPInstanceUID)][winding(corners, (14, 12)) != 0] += roi.ReferencedROINumber
    mask = result.labels.data[0]
    to_voxel = np.linalg.inv(result.labels.affine)
    for uid, written in masks.items():
        source = sources[uid]
        row, column = np.array(source.ImageOrientationPatient, dtype=float).reshape(2, 3)
        for r, c in np.ndindex(14, 12):
            lps = np.array(source.ImagePositionPatient, dtype=float) + row * c * 2.5 + column * r * 0.5
            voxel = np.rint(to_voxel[:3] @ [*(lps * [-1, -1, 1]), 1]).astype(int)
            assert written[r, c] == mask[tuple(voxel)]


def test_a_structure_set_names_frame_series_images_and_rois(result: DicomResult, tmp_path: Path) -> None:
    plan = read_object(write_rtstruct(result, tmp_path / "rs.dcm"))
    source = read_object(tmp_path / "in" / "0000.dcm")
    frame = plan.ReferencedFrameOfReferenceSequence[0]
    series = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert frame.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert series.SeriesInstanceUID == source.SeriesInstanceUID
    assert len(series.ContourImageSequence) == 5
    assert [roi.ROIName for roi in plan.StructureSetROISequence] == ["Kidney, left", "Blob"]
    assert [list(roi.ROIDisplayColor) for roi in plan.ROIContourSequence] == [[200, 60, 40], [20, 120, 240]]
    assert plan.ApprovalStatus == "UNAPPROVED"
    assert "esearch use only" in plan.StructureSetDescription


def test_contours_of_a_multi_frame_source_name_their_frames(tmp_path: Path) -> None:
    phantom = straight(planes=4, rows=10, columns=10)
    (tmp_path / "in").mkdir()
    write_enhanced(tmp_path / "in" / "one.dcm", replace(phantom, positions=phantom.positions[::-1].copy()))
    volume = volume_of(tmp_path / "in")
    mask = np.zeros(volume.volume.shape, dtype=np.uint8)
    mask[2:5, 3:7, 0] = 1  # the lowest plane is the last frame
    plan = read_object(write_rtstruct(result_of(volume, mask), tmp_path / "rs.dcm"))
    (contour,) = plan.ROIContourSequence[0].ContourSequence
    assert contour.ContourImageSequence[0].ReferencedFrameNumber == 4
    assert "ContourSequence" not in plan.ROIContourSequence[1]


def test_a_contour_of_more_than_64_kib_is_written_whole(tmp_path: Path) -> None:
    write(tmp_path / "in", straight(planes=3, rows=128, columns=128))
    volume = volume_of(tmp_path / "in")
    mask = np.zeros(volume.volume.shape, dtype=np.uint8)
    mask[::2, :, 1] = 1  # a comb of 64 teeth
    mask[:, 0, 1] = 1
    mask[1::2, 3::4, 1] = 1  # with bridges between them: 2000 holes, all joined to one outline
    plan = read_object(write_rtstruct(result_of(volume, mask), tmp_path / "rs.dcm"))
    longest = max(plan.ROIContourSequence[0].ContourSequence, key=lambda one: one.NumberOfContourPoints)
    assert len(longest.ContourData) == 3 * longest.NumberOfContourPoints > 8000


def moved(plan: Any) -> None:
    contour = plan.ROIContourSequence[0].ContourSequence[0]
    contour.ContourData = [v + (1.5 if n % 3 < 2 else 0.0) for n, v in enumerate(map(float, contour.ContourData))]


def beside(plan: Any) -> None:
    contour = plan.ROIContourSequence[0].ContourSequence[0]
    contour.ContourData = [v + (0.0, 0.3, 0.0)[n % 3] for n, v in enumerate(map(float, contour.ContourData))]


def lost(plan: Any) -> None:
    del plan.ROIContourSequence[1].ContourSequence[0]


def exchanged(plan: Any) -> None:
    one, other = plan.ROIContourSequence
    one.ReferencedROINumber, other.ReferencedROINumber = 2, 1


@pytest.mark.parametrize("tamper", [moved, beside, lost, exchanged])
def test_a_tampered_structure_set_never_gets_its_name(
    tamper: Callable[[Any], None], result: DicomResult, tmp_path: Path
) -> None:
    write_rtstruct(result, tmp_path / "good.dcm")
    plan = read_object(tmp_path / "good.dcm")
    tamper(plan)
    with pytest.raises(OutputError, match="output-selfcheck"):
        write_checked(tmp_path / "bad.dcm", encoded(plan), lambda path: check_rtstruct(path, result))
    assert not (tmp_path / "bad.dcm").exists()
