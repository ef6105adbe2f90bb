"""Real series equal dcm2niix and a stored reference; what cannot be a volume is refused by its name."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.data import get_testdata_files
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut

from benchmarks.dicom_vs_dcm2niix import Comparison, compare, compare_regular, convert
from dints_deploy.dicom.decoders import Decoders
from dints_deploy.dicom.findings import REGULARISING, Policy
from dints_deploy.dicom.read import read_series
from dints_deploy.dicom.series import Series, collect
from dints_deploy.errors import REASONS, DintsError, ScanRefused
from tests.dicom_phantoms import scans, straight, write

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


def pydicoms_values(path: Path) -> NDArray[np.float32]:
    """Return the modality values of a single-frame file as pydicom decodes and rescales them."""
    ds: Any = dcmread(path)
    return np.asarray(apply_modality_lut(ds.pixel_array, ds), dtype=np.float32)


def test_mosaics_are_refused_by_name() -> None:
    with pytest.raises(ScanRefused, match="dicom-mosaic"):
        read_series(only(scans("transfer-syntaxes")))


@pytest.mark.parametrize(
    ("encode", "bits"),
    [
        (("dcmcjpeg", "+eb"), 8),  # JPEG Baseline
        (("dcmcjpeg", "+ee"), 8),  # JPEG Extended
        (("dcmcjpeg", "+el"), 16),  # JPEG Lossless
        (("dcmcjpeg", "+e1"), 16),  # JPEG Lossless, first-order prediction
        (("dcmcjpls", "+el"), 16),  # JPEG-LS Lossless
        (("dcmcjpls", "+en"), 12),  # JPEG-LS Near-Lossless
    ],
)
def test_frames_encoded_by_dcmtk_decode_as_dcmtk_decodes_them(
    tmp_path: Path, encode: tuple[str, str], bits: int
) -> None:
    packed, unpacked = (only(folder) for folder in dcmtk_phantom(tmp_path, encode, bits))
    ours, theirs = read_series(packed), read_series(unpacked)
    lossy = bits < 16
    np.testing.assert_allclose(ours.volume.data, theirs.volume.data, atol=1 if lossy else 0)
    assert np.ptp(ours.volume.data) > 100
    assert ours.report.has("dicom-lossy") == lossy


def test_lossy_jpeg_of_twelve_bits_is_decoded_only_where_its_decoder_is_installed(tmp_path: Path) -> None:
    packed, unpacked = (only(folder) for folder in dcmtk_phantom(tmp_path, ("dcmcjpeg", "+ee"), 12))
    if importlib.util.find_spec("libjpeg") is not None:
        np.testing.assert_allclose(read_series(packed).volume.data, read_series(unpacked).volume.data, atol=2)
        return
    with pytest.raises(ScanRefused, match=r"expected a decoder of 12 bits .* \[dicom-syntax\]"):
        read_series(packed)


def dcmtk_phantom(folder: Path, encode: tuple[str, str], bits: int) -> tuple[Path, Path]:
    """Write a smooth phantom encoded by a tool of DCMTK, and decoded by it again."""
    if shutil.which(encode[0]) is None:
        pytest.skip(f"{encode[0]} is not installed (Debian package dcmtk)")

    def narrow(ds: Dataset, index: int) -> None:
        ds.BitsStored, ds.HighBit = bits, bits - 1

    smooth = np.add.outer(np.arange(3) * 9, np.add.outer(np.arange(48), np.arange(40) * 2)) % 200
    pixels = (smooth << (bits - 8)).astype(np.uint8 if bits == 8 else np.uint16)
    packed, unpacked = folder / "packed", folder / "unpacked"
    packed.mkdir()
    unpacked.mkdir()
    for path in write(folder / "plain", straight(planes=3, pixels=pixels), change=narrow):
        subprocess.run([*encode, path, packed / path.name], check=True, capture_output=True)
        decode = encode[0].replace("cj", "dj")
        subprocess.run([decode, packed / path.name, unpacked / path.name], check=True, capture_output=True)
    return packed, unpacked


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
                    volume = read_series(series, policy=Policy(minimum_slices=1), decoders=decoders).volume
                    fates[path.name] = str(volume.shape)
                    np.testing.assert_array_equal(volume.data[0, ..., 0].T, pydicoms_values(path))
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
