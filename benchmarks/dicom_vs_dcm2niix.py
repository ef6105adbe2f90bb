"""Compare every series under the data folder with dcm2niix: voxels and affine, both brought to RAS.

    python -m benchmarks.dicom_vs_dcm2niix --data FOLDER

Prints the table and writes it to benchmarks/results/dicom_vs_dcm2niix.json. Series that are one regular stack are
compared voxel by voxel with the file that dcm2niix writes. For a tilted or uneven stack dcm2niix writes the slices as
they are, on an affine that does not hold, and a corrected file (`_Tilt`, `_Eq`), rounded to integers and usually on a
grid of its own. There the table has the slices as they are against the first, and the remark our regular volume,
interpolated at the corrected file's voxels in patient space: median and 99th percentile of the difference. Debian's
dcm2niix knows no JPEG-LS: those files are unpacked by DCMTK's dcmdjpls first.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import write
from dints_deploy.dicom.findings import REGULARISING, Policy
from dints_deploy.dicom.header import LPS_TO_RAS
from dints_deploy.dicom.pixels import decode
from dints_deploy.dicom.read import DicomVolume, read_series
from dints_deploy.dicom.series import Series, collect
from dints_deploy.errors import DintsError

POLICY = Policy(REGULARISING.actions, minimum_slices=2)
"""Read whatever can be read."""

SOURCE_STEP = 4
"""Every which pixel of a source slice is compared with a regular volume."""

ABOUT = (
    "Largest difference of a voxel and of a corner of the volume, both brought to RAS. A tilted or uneven stack is "
    "compared slice by slice as it is, and our regular volume with dcm2niix's corrected file at that file's voxels. "
    "(The tilted `refusals` hold noise, which any interpolation blurs.)"
)
COLUMNS = ["series", "shape", "voxels", "ulp", "corners, mm", "remark"]


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


def on_source(ours: DicomVolume, stack: NDArray[Any], data: NDArray[Any], affine: NDArray[np.float64]) -> float:
    """Return how well a volume (I, J, K) agrees with the source's slices where they lie: the lowest correlation.

    Args:
        ours: whose source counts.
        stack: (columns, rows, slices) values of the source.
        data, affine: the volume.
    """
    from scipy import ndimage

    column, row = np.mgrid[: stack.shape[0] : SOURCE_STEP, : stack.shape[1] : SOURCE_STEP]
    pixels = np.stack([column.ravel(), row.ravel(), np.zeros(column.size), np.ones(column.size)])
    found = []
    for place, plane in enumerate(ours.planes):
        voxels = np.linalg.inv(affine) @ LPS_TO_RAS @ plane.affine @ pixels
        sampled = ndimage.map_coordinates(data, voxels[:3], order=1, mode="nearest")
        source = stack[::SOURCE_STEP, ::SOURCE_STEP, place].ravel()
        found.append(float(np.corrcoef(sampled, source)[0, 1]))
    return min(found)


def _sampled(ours: DicomVolume, affine: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return our values at the voxels of another grid, NaN where we have none."""
    from scipy import ndimage

    to_ours = np.linalg.inv(ours.volume.affine) @ affine
    data = ours.volume.data[0].astype(np.float64)
    sampled = ndimage.affine_transform(data, to_ours[:3, :3], to_ours[:3, 3], shape, order=1, cval=np.nan)
    return np.asarray(sampled)


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of DICOM series")
    folder = parser.parse_args().data
    lines = []
    for inner in sorted({path.parent for path in folder.rglob("*") if path.is_file()}):
        try:
            study = collect([path for path in sorted(inner.iterdir()) if path.is_file()])
        except DintsError:
            continue
        for series in study.series:
            lines.append([inner.relative_to(folder).as_posix(), *row(series)])
            print(*lines[-1], sep=" | ")
    table = {"about": ABOUT, "columns": COLUMNS, "rows": lines}
    result = {"page": "dicom-measured", "title": "Every series against dcm2niix", "tables": [table]}
    write("dicom_vs_dcm2niix", result | {"facts": {"dcm2niix": version()}})


def version() -> str:
    """Return what dcm2niix calls itself."""
    said = subprocess.run(["dcm2niix", "-v"], capture_output=True, text=True, check=False).stdout
    return said.strip().splitlines()[-1]


def row(series: Series) -> list[str]:
    """Return shape, largest difference of a voxel, the same in ulp, of a corner in mm, and a remark."""
    try:
        ours = read_series(series, policy=POLICY)
    except DintsError as error:
        return ["", "", "", "", f"refused: `{error.code}`"]
    shape = " x ".join(str(n) for n in ours.volume.shape)
    with tempfile.TemporaryDirectory() as scratch:
        converted = convert(list(series.files), Path(scratch))
        if not converted:
            return [shape, "", "", "", "dcm2niix writes nothing"]
        if not ours.regularised:
            return [shape, *figures(compare(ours.volume.data[0], ours.volume.affine, converted[0])), ""]
        stack = decode([plane.header for plane in ours.planes]).transpose(2, 1, 0)
        voxels, ulps, _ = figures(compare(stack, LPS_TO_RAS @ ours.planes[0].affine, converted[0]))
        median, most = compare_regular(ours, converted[-1])
        other = nib.load(converted[-1])
        mine = on_source(ours, stack, ours.volume.data[0], ours.volume.affine)
        theirs = on_source(ours, stack, np.asarray(other.dataobj, dtype=np.float32), other.affine)
        remark = (
            f"regularised; against `{converted[-1].name}`: median {median:.2g}, 99 % within {most:.3g}; correlation "
            f"with the worst source slice, each in its place: ours {mine:.4f}, theirs {theirs:.4f}"
        )
        return [shape, voxels, ulps, "", remark]


def figures(result: Comparison) -> list[str]:
    """Return the cells of a comparison."""
    if not result.shapes_equal:
        return ["another shape", "", ""]
    return [f"{result.voxels:.4g}", f"{result.ulps:.2g}", f"{result.affine_mm:.2g}"]


if __name__ == "__main__":
    main()
