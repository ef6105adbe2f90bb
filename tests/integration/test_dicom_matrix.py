"""Every output for every trap of geometry, on phantoms whose every pixel has a known place, before every peer.

Where a pixel lies is computed from the phantom alone (PS3.3 equation C.7.6.2.1-1), which label it must have from the
mask and its affine; nothing of the code that places planes takes part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dints_deploy.dicom.readback import seg_planes
from dints_deploy.dicom.result import DicomResult
from tests.dicom_peers import ask, errors_of, filled, instance, needs, orthanc, store
from tests.dicom_phantoms import Phantom, straight, write, write_enhanced
from tests.dicom_results import WRITERS, read_object, result_of, shapes, volume_of

TURN, LEAN, TILT = np.radians([25.0, 15.0, 18.5])
OBLIQUE: dict[str, Any] = {
    "row": (np.cos(TURN), np.sin(TURN), 0.0),
    "column": (-np.sin(TURN) * np.cos(LEAN), np.cos(TURN) * np.cos(LEAN), -np.sin(LEAN)),
}


def stack(**changes: Any) -> Phantom:
    return straight(planes=9, rows=26, columns=21, step=2.5, **changes)


def tilted() -> Phantom:
    """Return a gantry tilted by 18.5 degrees: the table moves along z, by 4, 7 and 1.08 mm."""
    heights = np.concatenate([[0], np.cumsum([4, 4, 4, 7, 7, 7, 1.08, 1.08])])
    phantom = stack(column=(0.0, np.cos(TILT), np.sin(TILT)))
    return replace(phantom, positions=heights[:, np.newaxis] * np.array([0.0, 0.0, 1.0]))


GEOMETRIES = {
    "upright": stack(),
    "non-square pixels": stack(between_rows=1.6, between_columns=0.7),
    "oblique": stack(**OBLIQUE, between_rows=0.9, between_columns=1.3),
    "negated cosines": stack(row=(-1.0, 0.0, 0.0), column=(0.0, -1.0, 0.0)),
    "reversed order": stack(),
    "feet first": stack(row=(-1.0, 0.0, 0.0), column=(0.0, 1.0, 0.0)),
    "sagittal": stack(row=(0.0, 1.0, 0.0), column=(0.0, 0.0, -1.0), between_rows=1.2),
    "tilted, uneven": tilted(),
    "multi-frame": stack(**OBLIQUE, between_rows=1.6, between_columns=0.7),
}
LABELMAP = "labelmap"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    with orthanc(tmp_path_factory.mktemp("orthanc")) as running:
        yield running


@cache
def written(folder: Path, name: str) -> tuple[DicomResult, dict[str, Path]]:
    """Write a phantom's series, and every object of a mask on it, each of which checks itself."""
    phantom, source, out = GEOMETRIES[name], folder / name / "in", folder / name
    source.mkdir(parents=True)
    if name == "multi-frame":
        write_enhanced(source / "frames.dcm", phantom)
    else:
        order = range(len(phantom.pixels))
        write(source, phantom, order=list(reversed(order)) if name == "reversed order" else order, name=name)
    volume = volume_of(source)
    result = result_of(volume, shapes(volume))
    paths = {kind: writer(result, out / f"{kind}.dcm") for kind, writer in WRITERS.items()}
    paths[LABELMAP] = WRITERS["seg"](replace(result, segmentation_type="LABELMAP"), out / f"{LABELMAP}.dcm")
    return result, paths


def expected(result: DicomResult, phantom: Phantom) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return each source pixel's label (planes, rows, columns), and where it is sure: not midway between voxels."""
    to_voxel = np.linalg.inv(result.labels.affine)
    voxel = phantom.ras() @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    sure = (np.abs(voxel - np.floor(voxel) - 0.5) > 1e-3).all(axis=-1)
    mask: NDArray[Any] = result.labels.data[0][tuple(np.moveaxis(np.rint(voxel).astype(int), -1, 0))]
    return mask, sure


def plane_at(phantom: Phantom, first: NDArray[np.float64]) -> int:
    """Return the plane whose first pixel lies at a place (LPS mm)."""
    distances = np.linalg.norm(phantom.positions - first, axis=1)
    assert distances.min() < 1e-3
    return int(distances.argmin())


@pytest.mark.parametrize("kind", ["seg", LABELMAP])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_seg_maps_back_to_the_mask(name: str, kind: str, folder: Path) -> None:
    phantom = GEOMETRIES[name]
    result, paths = written(folder, name)
    mask, sure = expected(result, phantom)
    found = np.zeros_like(mask)
    for frame in seg_planes(read_object(paths[kind])).values():
        at = plane_at(phantom, frame.affine[:3, 3])
        found[at] = frame.segments
        rows, columns = np.indices(frame.segments.shape)
        lps = frame.affine[:3, :2] @ np.stack([columns, rows]).reshape(2, -1) + frame.affine[:3, 3:]
        np.testing.assert_allclose(lps.T * [-1, -1, 1], phantom.ras()[at].reshape(-1, 3), atol=1e-3)
    np.testing.assert_array_equal(found[sure], mask[sure])
    assert len(np.unique(found)) == 3
    if not result.volume.regularised:
        assert sure.all()
        assert np.count_nonzero(found) == np.count_nonzero(result.labels.data)


@pytest.mark.parametrize("kind", ["seg", LABELMAP])
@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name != "tilted, uneven"])
def test_highdicom_maps_a_seg_back_to_the_mask(name: str, kind: str, folder: Path) -> None:
    """By its own geometry; it makes no volume of a tilted stack."""
    from highdicom.seg import segread

    result, paths = written(folder, name)
    volume = segread(paths[kind]).get_volume(combine_segments=True)
    to_voxel = np.linalg.inv(result.labels.affine) @ np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    where = np.argwhere(volume.array)
    voxels = where @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    assert np.abs(voxels - np.rint(voxels)).max() < 0.01
    found = np.zeros(result.labels.shape, dtype=np.uint8)
    found[tuple(np.rint(voxels).astype(int).T)] = volume.array[tuple(where.T)]
    np.testing.assert_array_equal(found, result.labels.data[0])


@pytest.mark.parametrize("name", GEOMETRIES)
def test_contours_run_within_half_a_pixel_of_the_mask(name: str, folder: Path) -> None:
    """Filled by Pillow they are the mask: each runs between a pixel's centre inside and its neighbour's outside."""
    phantom = GEOMETRIES[name]
    result, paths = written(folder, name)
    mask, sure = expected(result, phantom)
    found = np.zeros_like(mask)
    for roi in read_object(paths["rtstruct"]).ROIContourSequence:
        for contour in roi.get("ContourSequence") or []:
            points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
            normal = np.cross(phantom.row, phantom.column)
            at = int(np.abs((phantom.positions - points[0]) @ normal).argmin())
            local = points - phantom.positions[at]
            assert np.abs(local @ normal).max() < 1e-3  # in the plane of its slice
            x, y = local @ phantom.row / phantom.between_columns, local @ phantom.column / phantom.between_rows
            found[at][filled(np.stack([x, y], axis=1).tolist(), found.shape[1:])] = roi.ReferencedROINumber
    np.testing.assert_array_equal(found[sure], mask[sure])


@pytest.mark.parametrize("name", GEOMETRIES)
def test_dciodvfy_finds_no_error(name: str, folder: Path) -> None:
    """The label map is checked by highdicom: dicom3tools of 2022 does not know the class."""
    needs("dciodvfy")
    _, paths = written(folder, name)
    assert {kind: errors_of(path) for kind, path in paths.items() if kind != LABELMAP and errors_of(path)} == {}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_orthanc_opens_every_object_in_the_sources_study(name: str, folder: Path, pacs: tuple[str, int]) -> None:
    address, port = pacs
    result, paths = written(folder, name)
    store(port, [path for kind, path in paths.items() if kind not in (LABELMAP, "sr-alone")])
    ask(f"{address}/instances", paths[LABELMAP].read_bytes())  # newer than dcmtk's list of classes
    for kind in ("seg", LABELMAP, "sr", "rtstruct", "sc"):
        stored = instance(address, str(read_object(paths[kind]).SOPInstanceUID))
        study = json.loads(ask(f"{address}/instances/{stored}/study"))
        assert study["MainDicomTags"]["StudyInstanceUID"] == result.study
