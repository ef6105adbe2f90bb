"""Real series equal dcm2niix and a stored reference; what cannot be a volume is refused by its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.data import get_testdata_files

from benchmarks.dicom_vs_dcm2niix import Comparison, compare, compare_regular, convert
from dints_deploy.dicom.decoders import Decoders
from dints_deploy.dicom.findings import REGULARISING, Policy
from dints_deploy.dicom.read import read_series
from dints_deploy.dicom.series import Series, collect
from dints_deploy.errors import REASONS, DintsError, ScanRefused
from tests.dicom_phantoms import scans

TWO_SLICES = Policy(minimum_slices=2)
REGULAR = [
    "brain-studies/study-1/13_HCropVolume",
    "brain-studies/study-3/11-T1post-18670",
    "brain-studies/study-3/11_HCropVolume",
    "brain-studies/study-3/36468-FLAIRreg-58706",
    "brain-studies/study-3/37830-T2reg-78532",
    "compressed/j2k/001",
    "compressed/jpeg/001",
    "compressed/rle/001",
    "ct-3slice",
    "ct-dicom-j2k",
    "enhanced-ct",
    "enhanced-mr",
    "negated-cosines",
    "non-square-pixels",
    "oblique-non-square",
    "refusals/slicecount/001",
]
REFUSED = {
    "gantrytilting/001": "dicom-tilt",
    "notavolume/001": "dicom-duplicate-position",
    "slicecount/001": "dicom-too-few-slices",
    "sliceincrement/001": "dicom-missing-slice",
    "sliceincrement/002": "dicom-missing-slice",
    "sliceorientation/001": "dicom-mixed-orientation",
}


def only(folder: Path) -> Series:
    (series,) = collect(folder).series
    return series


def needs_dcm2niix() -> None:
    if shutil.which("dcm2niix") is None:
        pytest.skip("dcm2niix is not installed (Debian package dcm2niix)")


@pytest.mark.parametrize("name", REGULAR)
def test_a_regular_series_equals_dcm2niix_to_the_last_place_and_a_micrometre(name: str, tmp_path: Path) -> None:
    series = only(scans(name))
    needs_dcm2niix()
    volume = read_series(series, policy=TWO_SLICES).volume
    (theirs, *more) = convert(list(series.files), tmp_path)
    assert not more
    found = compare(volume.data[0], volume.affine, theirs)
    assert found.shapes_equal
    assert found.ulps <= 1
    assert found.affine_mm < 1e-3


@pytest.mark.parametrize("name", ["gantrytilting/001", "sliceincrement/001", "sliceincrement/002"])
def test_a_regularised_series_equals_the_corrected_file_of_dcm2niix_within_its_rounding(
    name: str, tmp_path: Path
) -> None:
    """dcm2niix rounds what it interpolates to integers. (Its file for gantry-tilt-ge has a wrong affine.)"""
    series = only(scans("refusals", name))
    needs_dcm2niix()
    volume = read_series(series, policy=REGULARISING)
    assert volume.regularised
    theirs = convert(list(series.files), tmp_path)[-1]
    assert "_Tilt" in theirs.name or "_Eq" in theirs.name
    _, most = compare_regular(volume, theirs)
    assert most < 0.51


def test_the_enhanced_mr_equals_its_stored_reference() -> None:
    (reference,) = scans("enhanced-mr-reference").glob("*.nii")
    volume = read_series(only(scans("enhanced-mr"))).volume
    found = compare(volume.data[0], volume.affine, reference)
    assert (found.shapes_equal, found.voxels) == (True, 0.0)
    assert found.affine_mm < 1e-3


def test_the_comparison_sees_a_mirrored_and_a_shifted_volume(tmp_path: Path) -> None:
    """The measure itself: a flip along an axis and a millimetre must show."""
    data = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii")
    assert compare(data, np.eye(4), tmp_path / "a.nii") == Comparison(True, 0.0, 0.0, 0.0)
    assert compare(data[::-1], np.eye(4), tmp_path / "a.nii").voxels == 12
    shifted = np.eye(4)
    shifted[1, 3] = 1.0
    assert compare(data, shifted, tmp_path / "a.nii").affine_mm == 1.0


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_each_series_that_is_no_regular_volume_is_refused_by_name(name: str) -> None:
    with pytest.raises(ScanRefused) as refused:
        read_series(only(scans("refusals", name)))
    assert refused.value.code == REFUSED[name]


def test_mosaics_are_refused_by_name() -> None:
    with pytest.raises(ScanRefused, match="dicom-mosaic"):
        read_series(only(scans("transfer-syntaxes")))


def test_every_file_of_pydicoms_own_test_set_ends_in_a_volume_or_a_code() -> None:
    """Truncated, lying, odd, big-endian, colour, waveform, DICOMDIR: nothing but `DintsError` may come out."""
    files = [Path(name) for name in get_testdata_files() if Path(name).is_file()]
    assert len(files) > 100
    fates: dict[str, str] = {}
    with Decoders(2) as decoders:
        for path in files:
            try:
                study = collect([path])
                for item in study.findings:
                    fates[path.name] = item.code
                for series in study.series:
                    policy = Policy(minimum_slices=1)
                    fates[path.name] = str(read_series(series, policy=policy, decoders=decoders).volume.shape)
            except DintsError as error:
                fates[path.name] = error.code
    assert all(fate in REASONS or fate.startswith("(") for fate in fates.values())
    expected = {
        "CT_small.dcm": "(128, 128, 1)",
        "MR_small.dcm": "(64, 64, 1)",
        "MR_small_bigendian.dcm": "(64, 64, 1)",
        "MR_small_RLE.dcm": "(64, 64, 1)",
        "MR_small_jp2klossless.dcm": "(64, 64, 1)",
        "MR_small_jpeg_ls_lossless.dcm": "(64, 64, 1)",
        "MR_small_padded.dcm": "dicom-excess-pixels",
        "MR_truncated.dcm": "dicom-truncated",
        "meta_missing_tsyntax.dcm": "dicom-syntax",
        "no_meta.dcm": "dicom-no-images",
        "rtplan_truncated.dcm": "dicom-sop-class",
        "DICOMDIR": "dicom-no-images",
        "README.txt": "dicom-no-images",
    }
    assert {name: fates[name] for name in expected} == expected
