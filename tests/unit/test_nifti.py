"""NIfTI files read as nibabel reads them, write as they read, and broken ones are refused by name within bounds."""

from __future__ import annotations

import os
import struct
import tempfile
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.nifti1 import Nifti1Image
from nibabel.nifti2 import Nifti2Image
from numpy.typing import NDArray

from dints_deploy.errors import OutputError, ScanRefused
from dints_deploy.imaging.nifti import read_grid, read_nifti, write_nifti
from dints_deploy.imaging.volume import Volume
from tests.nifti_files import BROKEN, bomb, header, nifti, packed, plain
from tests.phantoms import affine, noise, volumes

EXAMPLES = settings(max_examples=30, deadline=None)
IMAGES = {1: Nifti1Image, 2: Nifti2Image}
INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
TYPES: list[Any] = [*INTEGERS, np.float32, np.float64]
OBLIQUE = affine("LSA", (0.7, 1.1, 3.5), origin=(-30, 12, 44), angles=(0.1, -0.2, 0.3))
MEMORY_BYTES = 24 << 20
"""What reading a small hostile file may hold at its peak."""


def read(raw: bytes, **options: Any) -> Volume:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.nii.gz"  # content decides, not the name
        path.write_bytes(raw)
        return read_nifti(path, **options)


def stored(dtype: Any, shape: tuple[int, ...] = (3, 4, 5), seed: int = 0) -> NDArray[Any]:
    """Return voxels over the whole range of a type."""
    generator = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.floating):
        return generator.normal(0, 1000, shape).astype(dtype)
    limits = np.iinfo(dtype)
    return generator.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


# --- reading, with nibabel as the oracle ----------------------------------------------------------------------------


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_version_and_byte_order_reads_as_nibabel_reads_it(
    dtype: Any, version: int, endian: str, gzipped: bool
) -> None:
    raw = nifti(stored(dtype), version=version, endian=endian, sform=OBLIQUE)
    oracle = IMAGES[version].from_bytes(raw)
    volume = read(packed(raw) if gzipped else raw)
    expected = np.asarray(oracle.dataobj)
    assert volume.data.dtype == (dtype if np.issubdtype(dtype, np.integer) else np.float32)
    np.testing.assert_array_equal(volume.data[0], expected.astype(volume.data.dtype))
    np.testing.assert_array_equal(volume.affine, oracle.affine)


@pytest.mark.parametrize(("slope", "inter"), [(2.0, 0.0), (0.5, -1024.0), (-1.0, 100.0), (1.0, 3.0)])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", TYPES)
def test_scaled_voxels_are_float32_of_slope_times_value_plus_intercept(
    dtype: Any, version: int, slope: float, inter: float
) -> None:
    data = stored(dtype)
    volume = read(nifti(data, version=version, scl_slope=slope, scl_inter=inter))
    assert volume.data.dtype == np.float32
    expected = data.astype(np.float64) * slope + inter
    np.testing.assert_allclose(volume.data[0], expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("slope", [0.0, np.nan])
def test_a_slope_of_zero_or_nan_means_no_scaling(slope: float) -> None:
    volume = read(nifti(stored(np.int16), scl_slope=slope, scl_inter=5))
    assert volume.data.dtype == np.int16
    np.testing.assert_array_equal(volume.data[0], stored(np.int16))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_the_fourth_axis_holds_the_channels(dtype: Any) -> None:
    data = stored(dtype, (3, 4, 5, 2))
    volume = read(nifti(data))
    assert (volume.channels, volume.shape) == (2, (3, 4, 5))
    for channel in range(2):
        np.testing.assert_array_equal(volume.data[channel], data[..., channel])


@pytest.mark.parametrize("shape", [(3, 4, 1), (1, 4, 5), (3, 4, 5, 1), (1, 1, 1)])
def test_axes_of_one_voxel_stay(shape: tuple[int, ...]) -> None:
    volume = read(nifti(stored(np.int16, shape)))
    assert (volume.channels, volume.shape) == (1, shape[:3])
    np.testing.assert_array_equal(volume.data[0], stored(np.int16, shape).reshape(shape[:3]))


def test_a_float64_that_float32_cannot_hold_becomes_infinite_and_not_an_error() -> None:
    volume = read(nifti(np.array([[[1e300, -1e300, 2.0]]])))
    np.testing.assert_array_equal(volume.data.ravel(), np.array([np.inf, -np.inf, 2], np.float32))


@pytest.mark.parametrize("code", [2, 4, 6])
def test_header_extensions_of_any_content_are_stepped_over(code: int) -> None:
    """Code 2 is DICOM, which nibabel hands to a parser; only the voxels matter here."""
    content = b"\x08\x00\x05\x00SQ\x00\x00\xff\xff\xff\xff" * 2
    extension = struct.pack("<ii", 32, code) + content
    data = stored(np.int16)
    head = header(data.shape, np.int16, vox_offset=352 + 32)
    raw = head[:-4] + b"\x01\0\0\0" + extension + data.tobytes(order="F")
    np.testing.assert_array_equal(read(raw).data[0], data)


# --- sform and qform ------------------------------------------------------------------------------------------------


def test_the_sform_wins_where_both_are_set_for_different_spaces() -> None:
    """Scanner space in the qform (code 1), an atlas in the sform (code 4): both are right, the sform is meant."""
    raw = nifti(stored(np.int16), sform=affine("RAS", (2, 2, 2)), qform=affine("LPS"), sform_code=4)
    np.testing.assert_array_equal(read(raw).affine, affine("RAS", (2, 2, 2)))


def test_the_qform_is_used_where_it_stands_alone() -> None:
    raw = nifti(stored(np.int16), qform=OBLIQUE)
    np.testing.assert_allclose(read(raw).affine, OBLIQUE, atol=1e-5)


def test_an_sform_with_code_zero_does_not_count() -> None:
    raw = nifti(stored(np.int16), sform=affine("LPS", (9, 9, 9)), qform=OBLIQUE, sform_code=0)
    np.testing.assert_allclose(read(raw).affine, OBLIQUE, atol=1e-5)


@pytest.mark.parametrize(("shift", "refused"), [(0.4, False), (0.6, True)])
def test_sform_and_qform_of_one_space_may_differ_by_less_than_half_a_voxel(shift: float, refused: bool) -> None:
    raw = nifti(stored(np.int16), sform=affine(), qform=affine(origin=(shift, 0, 0)))
    if refused:
        with pytest.raises(ScanRefused, match=r"sform and qform .* to agree"):
            read(raw)
    else:
        np.testing.assert_array_equal(read(raw).affine, affine())


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_hostile_file_is_refused_by_name_in_bounded_memory(name: str, tmp_path: Path) -> None:
    build, code = BROKEN[name]
    path = tmp_path / f"{name}.nii.gz"
    path.write_bytes(build())
    tracemalloc.start()
    try:
        with pytest.raises(ScanRefused) as refusal:
            read_nifti(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refusal.value.code == code
    assert refusal.value.message.startswith("expected ")
    assert "\n" not in refusal.value.message
    assert path.name in refusal.value.message or code == "scan-affine"
    assert peak < MEMORY_BYTES


def test_the_bomb_of_these_tests_unpacks_to_gigabytes() -> None:
    assert len(bomb()) < 64 << 20
    import zlib

    first = zlib.decompressobj(31)
    first.decompress(bomb())
    second = zlib.decompressobj(31)
    assert len(second.decompress(first.unused_data)) * 64 >= 4 << 30


def test_a_file_above_the_callers_limit_is_refused() -> None:
    assert read(plain(), max_bytes=len(plain())).shape == (6, 7, 8)
    with pytest.raises(ScanRefused) as refusal:
        read(packed(plain()), max_bytes=len(plain()) - 1)
    assert refusal.value.code == "scan-too-large"


def test_a_missing_file_a_folder_and_a_pipe_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    for path in (tmp_path / "none.nii", tmp_path, tmp_path / "pipe.nii", Path("/dev/zero"), tmp_path / "loop.nii"):
        with pytest.raises(ScanRefused) as refusal:
            read_nifti(path)
        assert refusal.value.code == "scan-missing"


@pytest.mark.parametrize("code", [1, 3, 4, 7])
def test_an_image_that_is_not_in_millimetres_is_refused(tmp_path: Path, code: int) -> None:
    path = tmp_path / "scan.nii"
    path.write_bytes(nifti(np.ones((4, 5, 6), np.int16), xyzt_units=code))
    with pytest.raises(ScanRefused, match="expected millimetres") as refusal:
        read_nifti(path)
    assert refusal.value.code == "scan-affine"


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([1, 2]),
    st.lists(st.tuples(st.integers(4, 543), st.integers(0, 255)), min_size=1, max_size=4),
    st.sampled_from([affine(), None]),
)
def test_a_header_with_any_bytes_changed_gives_a_volume_or_a_named_refusal(
    version: int, changes: list[tuple[int, int]], qform: NDArray[np.float64] | None
) -> None:
    raw = bytearray(nifti(stored(np.int16), version=version, sform=affine(), qform=qform))
    for at, value in changes:
        raw[at % (348 if version == 1 else 540) or 5] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nibabel's and numpy's words about odd numbers
        try:
            volume = read(bytes(raw))
        except ScanRefused:
            return
    assert volume.data.dtype.kind in "fiu"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.nii"
        path.write_bytes(raw)
        assert read_grid(path).same_as(volume.grid)  # the header alone says as much


SOUND_HEADERS = {
    *("voxels-cut-before-packing", "gzip-bomb", "two-megabytes-behind-the-voxels"),
    *("complex64", "complex128", "colour"),
}
"""Of the broken files those whose header is not to blame."""


@pytest.mark.parametrize("name", BROKEN)
def test_a_grid_is_read_of_what_has_one_and_else_refused_as_the_whole_file_is(name: str, tmp_path: Path) -> None:
    build, code = BROKEN[name]
    path = tmp_path / f"{name}.nii.gz"
    path.write_bytes(build())
    found = None
    try:
        read_grid(path)
    except ScanRefused as refusal:
        found = refusal.code
    assert found == (None if name in SOUND_HEADERS else code)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_gzip_stream_with_any_bytes_changed_gives_the_same_voxels_or_a_named_refusal(
    changes: list[tuple[int, int]],
) -> None:
    raw = bytearray(packed(plain()))
    for at, value in changes:
        raw[at % len(raw)] = value
    try:
        volume = read(bytes(raw))
    except ScanRefused:
        return
    np.testing.assert_array_equal(volume.data, read(plain()).data)


# --- writing --------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(volumes(sheared=True), st.sampled_from(TYPES), st.sampled_from([".nii", ".nii.gz", ".NII.GZ"]))
def test_what_is_written_reads_back_the_same_here_and_in_nibabel(volume: Volume, dtype: Any, suffix: str) -> None:
    volume = Volume(volume.data.astype(dtype), volume.affine)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"labels{suffix}"
        write_nifti(path, volume)
        assert (path.read_bytes()[:2] == b"\x1f\x8b") == suffix.lower().endswith(".gz")
        found, oracle = read_nifti(path), nibabel.load(path.rename(path.with_name(f"labels{suffix.lower()}")))
        theirs = np.asarray(oracle.dataobj).reshape((*volume.shape, volume.channels))
    expected = volume.data.astype(np.float32) if np.issubdtype(dtype, np.floating) else volume.data
    assert found.data.dtype == expected.dtype
    np.testing.assert_array_equal(found.data, expected)
    np.testing.assert_array_equal(np.moveaxis(theirs, -1, 0), volume.data)
    np.testing.assert_allclose(found.affine, volume.affine, rtol=1e-6, atol=1e-6 * np.abs(volume.affine).max())
    np.testing.assert_array_equal(oracle.affine, found.affine)


@pytest.mark.parametrize(("shear", "code"), [(0.0, 1), (0.1, 0)])
def test_the_qform_says_the_same_as_the_sform_or_is_not_set(shear: float, code: int, tmp_path: Path) -> None:
    matrix = affine("PIR", (0.5, 1, 2), origin=(-80, 20, 10), angles=(0.2, 0.1, -0.3), shear=shear)
    write_nifti(tmp_path / "labels.nii", noise((20, 30, 40), matrix))
    image = nibabel.load(tmp_path / "labels.nii")
    assert int(image.header["qform_code"]) == code
    assert int(image.header["sform_code"]) == 1
    if code:
        np.testing.assert_allclose(image.get_qform(), matrix, atol=1e-5)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_two_writes_are_equal_byte_by_byte(suffix: str, tmp_path: Path) -> None:
    labels = Volume((noise((9, 8, 7), OBLIQUE).data > 100).astype(np.uint8), OBLIQUE)
    first, second = tmp_path / f"a{suffix}", tmp_path / f"another-name{suffix}"
    write_nifti(first, labels)
    os.utime(first, (0, 0))
    write_nifti(second, labels)
    assert first.read_bytes() == second.read_bytes()
    if suffix == ".nii.gz":
        assert first.read_bytes()[4:8] == bytes(4)  # no time stamp


@pytest.mark.parametrize(("dtype", "written"), [(bool, np.uint8), (np.float16, np.float32)])
def test_types_that_nifti_does_not_have_are_written_as_the_next_larger(
    dtype: Any, written: Any, tmp_path: Path
) -> None:
    volume = Volume((noise((4, 5, 6), affine()).data > 100).astype(dtype), affine())
    write_nifti(tmp_path / "labels.nii.gz", volume)
    found = read_nifti(tmp_path / "labels.nii.gz")
    assert found.data.dtype == written
    np.testing.assert_array_equal(found.data, volume.data)


def test_an_axis_longer_than_nifti_1_can_say_is_written_as_nifti_2(tmp_path: Path) -> None:
    volume = Volume(np.arange(40_000, dtype=np.uint16).reshape(1, 40_000, 1, 1), affine())
    write_nifti(tmp_path / "labels.nii.gz", volume)
    found = read_nifti(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(found.data, volume.data)
    assert isinstance(nibabel.load(tmp_path / "labels.nii.gz"), Nifti2Image)


@pytest.mark.parametrize("place", ["none/labels.nii.gz", "file/labels.nii.gz", "folder"])
def test_a_place_that_cannot_be_written_is_an_output_error_and_leaves_nothing(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError) as failure:
        write_nifti(tmp_path / place, noise((4, 4, 4), affine()))
    assert failure.value.code == "output-unwritable"
    assert sorted(tmp_path.rglob("*")) == before


def test_real_scans_read_as_nibabel_reads_them(data: Path) -> None:
    for path in sorted(data.rglob("*.nii.gz")):
        oracle = nibabel.load(path)
        volume = read_nifti(path)
        np.testing.assert_array_equal(volume.data[0], np.asarray(oracle.dataobj, dtype=volume.data.dtype))
        np.testing.assert_array_equal(volume.affine, oracle.affine)
        assert read_grid(path).same_as(volume.grid, 1e-9)
