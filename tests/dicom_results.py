"""Results for tests of the written objects: an entry with public and private codes, masks on phantoms and scans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread

from dints_deploy.catalog.entry import Entry
from dints_deploy.dicom.capture import write_sc
from dints_deploy.dicom.findings import REGULARISING, Policy
from dints_deploy.dicom.measure import write_sr
from dints_deploy.dicom.read import DicomVolume, read_series
from dints_deploy.dicom.result import DicomResult, SegmentationType, dicom_result
from dints_deploy.dicom.rtstruct import write_rtstruct
from dints_deploy.dicom.seg import write_seg
from dints_deploy.dicom.series import collect
from dints_deploy.imaging.volume import Volume
from tests.dicom_phantoms import scans

WHEN = datetime(2026, 3, 4, 5, 6, 7)
ANY_COUNT = Policy(REGULARISING.actions, minimum_slices=1)

ENTRY = Entry.model_validate(
    {
        "schema_version": 1,
        "name": "two-shapes",
        "version": "1.2.3",
        "title": "Two shapes",
        "intended_use": "Tests.",
        "licence": "Apache-2.0",
        "channels": [
            {
                "name": "CT",
                "modality": "CT",
                "fill": "minimum",
                "intensity": {"scheme": "window", "lower": 0, "upper": 1},
            }
        ],
        "labels": [
            {
                "value": 1,
                "id": "kidney-left",
                "name": "Kidney, left",
                "colour": (200, 60, 40),
                "nsd_tolerance": 2.0,
                "category": {"value": "91772007", "scheme": "SCT", "meaning": "Organ"},
                "type": {"value": "64033007", "scheme": "SCT", "meaning": "Kidney"},
                "modifier": {"value": "7771000", "scheme": "SCT", "meaning": "Left"},
            },
            {
                "value": 2,
                "id": "blob",
                "name": "Blob",
                "colour": (20, 120, 240),
                "nsd_tolerance": 2.0,
                "category": {"value": "49755003", "scheme": "SCT", "meaning": "Morphologically Abnormal Structure"},
                "type": {"value": "blob", "scheme": "99DINTS", "meaning": "Blob"},
            },
        ],
        "window": (16, 16, 16),
        "accepts": {
            "modality": ("CT", "MR"),
            "extent_min": (1, 1, 1),
            "extent_max": (999, 999, 999),
            "spacing_min": (0.1, 0.1, 0.1),
            "spacing_max": (20, 20, 20),
        },
    }
)  # fmt: skip

RECORD: Mapping[str, Any] = {
    "model": {
        "entry": ENTRY.name,
        "version": ENTRY.version,
        "genotype_sha256": "9" * 64,
        "weights_sha256": ["a" * 64, "b" * 64],
    },
    "engine": {"name": "openvino", "version": "2025.1", "precision": "fp32"},
    "software": {"dints-deploy": "0.1.0"},
}

Writer = Callable[[DicomResult, Path], Path]
WRITERS: dict[str, Writer] = {
    "seg": write_seg,
    "sr": lambda result, path: write_sr(result, path, segmentation=True),
    "sr-alone": lambda result, path: write_sr(result, path, segmentation=False),
    "rtstruct": write_rtstruct,
    "sc": write_sc,
}


def volume_of(folder: Path) -> DicomVolume:
    """Read the only series of a folder, tilted and uneven ones regularised."""
    (series,) = [one for one in collect(folder).series if one.slices]
    return read_series(series, policy=ANY_COUNT)


def result_of(
    volume: DicomVolume,
    mask: NDArray[Any],
    *,
    record: Mapping[str, Any] = RECORD,
    when: datetime = WHEN,
    segmentation_type: SegmentationType = "BINARY",
) -> DicomResult:
    """Return the result of a mask (I, J, K) on the volume's grid."""
    labels = Volume(mask[np.newaxis].astype(np.uint8), volume.volume.affine)
    voxel = labels.grid.voxel_ml
    volumes = {label.id: float(np.count_nonzero(mask == label.value)) * voxel for label in ENTRY.labels}
    return dicom_result(
        [volume], labels, ENTRY, record, volumes_ml=volumes, when=when, segmentation_type=segmentation_type
    )


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


def shapes(volume: DicomVolume) -> NDArray[np.uint8]:
    """Return a mask without any symmetry: a box with a hole and an island in it, a diagonal of pixels, a lone voxel."""
    i, j, k = volume.volume.shape
    mask = np.zeros((i, j, k), dtype=np.uint8)
    last = max(2, k - 1)
    mask[1 : i - 1, 1 : max(2, j * 2 // 3), 1:last] = 1
    mask[3 : i - 2, 2 : max(3, j * 2 // 3 - 1), 1:last] = 0
    mask[4 : i - 3 : 2, max(3, j // 3), 1:last] = 2
    for step in range(min(i, j) // 3):
        mask[i - 1 - step, j - 1 - step, k // 2] = 2
    mask[0, j - 1, k - 1] = 1
    return mask


def thresholded(volume: DicomVolume, low: float = 75, high: float = 95) -> NDArray[np.uint8]:
    """Return a mask of the brighter voxels: 1 above one percentile, 2 above another; the first plane stays empty."""
    data = volume.volume.data[0]
    cuts = np.percentile(data, [low, high])
    mask = np.zeros(data.shape, dtype=np.uint8)
    mask[data > cuts[0]] = 1
    mask[data > cuts[1]] = 2
    if mask.shape[2] > 2:
        mask[:, :, 0] = 0
    return mask


def read_object(path: Path) -> Any:
    """Read a DICOM file; `Any`, because whether an attribute is there is what tests find out."""
    return dcmread(path)
