"""Compare every series under the data folder with dcm2niix: voxels and affine, both brought to RAS.

    python -m benchmarks.dicom_vs_dcm2niix [FOLDER]

The folder is $DINTS_DATA or ../shared/data. Series that are one regular stack are compared voxel by voxel with the
file that dcm2niix writes. For a tilted or uneven stack dcm2niix writes the slices as they are, on an affine that does
not hold, and a corrected file (`_Tilt`, `_Eq`), rounded to integers and usually on a grid of its own. There the table
has the slices as they are against the first, and the remark our regular volume, interpolated at the corrected file's
voxels in patient space: median and 99th percentile of the difference. Debian's dcm2niix knows no JPEG-LS: those files
are unpacked by DCMTK's dcmdjpls first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from dints_deploy.dicom.findings import REGULARISING, Policy
from dints_deploy.dicom.header import LPS_TO_RAS
from dints_deploy.dicom.pixels import decode
from dints_deploy.dicom.read import DicomVolume, read_series
from dints_deploy.dicom.series import Series, collect
from dints_deploy.errors import DintsError

POLICY = Policy(REGULARISING.actions, minimum_slices=2)
"""Read whatever can be read."""


@dataclass(frozen=True)
class Comparison:
    """One series against dcm2niix.

    Attributes:
        shapes_equal: after both were brought to RAS.
        voxels: largest difference of a voxel.
        ulps: the same in units in the last place of float32.
        affine_mm: largest difference of a voxel corner's place, over the corners of the volume.
    """

    shapes_equal: bool
    voxels: float
    ulps: float
    affine_mm: float


def convert(files: list[Path], folder: Path) -> list[Path]:
    """Run dcm2niix on `files` and return the NIfTI files, the corrected ones last."""
    source, target = folder / "in", folder / "out"
    source.mkdir()
    target.mkdir()
    for number, path in enumerate(files):
        copy = source / f"{number:05d}.dcm"
        if not shutil.which("dcmdjpls") or subprocess.run(["dcmdjpls", path, copy], capture_output=True).returncode:
            shutil.copy(path, copy)
    command = ["dcm2niix", "-b", "n", "-z", "n", "-f", "out", "-o", str(target), str(source)]
    subprocess.run(command, capture_output=True, check=False)
    return sorted(target.glob("*.nii"), key=lambda path: (len(path.name), path.name))


def compare(data: NDArray[Any], affine: NDArray[np.float64], theirs: Path) -> Comparison:
    """Compare voxels (I, J, K) on an affine with a NIfTI file, both brought to RAS."""
    mine = nib.as_closest_canonical(nib.Nifti1Image(data, affine))
    other = nib.as_closest_canonical(nib.load(theirs))
    a = np.asarray(mine.dataobj, dtype=np.float32)
    b = np.asarray(other.dataobj, dtype=np.float32)
    if a.shape != b.shape:
        return Comparison(False, np.nan, np.nan, np.nan)
    difference = np.abs(a - b)
    ulps = float((difference / np.spacing(np.maximum(np.abs(a), np.abs(b)))).max())
    return Comparison(True, float(difference.max()), ulps, corner_distance(mine.affine, other.affine, a.shape))


def compare_regular(ours: DicomVolume, theirs: Path) -> tuple[float, float]:
    """Return median and 99th percentile of the difference at the voxels of another grid, where ours has values."""
    other = nib.load(theirs)
    b = np.asarray(other.dataobj, dtype=np.float64)
    difference = np.abs(_sampled(ours, other.affine, b.shape) - b)
    median, most = np.percentile(difference[np.isfinite(difference)], [50, 99])
    return float(median), float(most)


def corner_distance(a: NDArray[np.float64], b: NDArray[np.float64], shape: tuple[int, ...]) -> float:
    """Return how far apart two affines put the same corner of a volume, at most, in mm."""
    corners = np.stack(np.meshgrid(*[[0, n - 1] for n in shape], [1], indexing="ij"), axis=-1).reshape(-1, 4)
    return float(np.linalg.norm(corners @ (a - b).T, axis=1).max())


def _sampled(ours: DicomVolume, affine: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return our values at the voxels of another grid, NaN where we have none."""
    from scipy import ndimage

    to_ours = np.linalg.inv(ours.volume.affine) @ affine
    data = ours.volume.data[0].astype(np.float64)
    sampled = ndimage.affine_transform(data, to_ours[:3, :3], to_ours[:3, 3], shape, order=1, cval=np.nan)
    return np.asarray(sampled)


def main() -> None:
    """Print the table."""
    root = Path(__file__).parents[2] / "shared/data"
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DINTS_DATA", root)) / "scans"
    print(f"{'series':42} {'shape':>13} {'voxels differ':>13} {'ulp':>5} {'corners mm':>10}  remark")
    for inner in sorted({path.parent for path in folder.rglob("*") if path.is_file()}):
        try:
            study = collect([path for path in sorted(inner.iterdir()) if path.is_file()])
        except DintsError:
            continue
        for series in study.series:
            print(f"{inner.relative_to(folder).as_posix()[-42:]:42} {line(series)}")


def line(series: Series) -> str:
    """Return the table's line for a series."""
    try:
        ours = read_series(series, policy=POLICY)
    except DintsError as error:
        return f"{'-':>13} {'-':>13} {'-':>5} {'-':>10}  refused: {error.code}"
    shape = "x".join(str(n) for n in ours.volume.shape)
    with tempfile.TemporaryDirectory() as scratch:
        converted = convert(list(series.files), Path(scratch))
        if not converted:
            return f"{shape:>13} {'-':>13} {'-':>5} {'-':>10}  dcm2niix writes nothing"
        if not ours.regularised:
            result = compare(ours.volume.data[0], ours.volume.affine, converted[0])
            return f"{shape:>13} {result.voxels:>13.4g} {result.ulps:>5.2g} {result.affine_mm:>10.2g}"
        stack = decode([plane.header for plane in ours.planes]).transpose(2, 1, 0)
        result = compare(stack, LPS_TO_RAS @ ours.planes[0].affine, converted[0])
        median, most = compare_regular(ours, converted[-1])
        remark = f"regularised; {converted[-1].name}: median {median:.2g}, 99 % within {most:.3g}"
        return f"{shape:>13} {result.voxels:>13.4g} {result.ulps:>5.2g} {'-':>10}  {remark}"


if __name__ == "__main__":
    main()
