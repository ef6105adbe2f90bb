"""Pixels are decoded exactly in every transfer syntax, and nothing that a file claims can hurt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    HTJ2K,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from dints_deploy.dicom.bounded import Limits
from dints_deploy.dicom.decoder import PLUGINS
from dints_deploy.dicom.decoders import Decoders
from dints_deploy.dicom.findings import Policy
from dints_deploy.dicom.header import SliceHeader
from dints_deploy.dicom.pixels import decode, stored_values
from dints_deploy.dicom.read import read_series
from dints_deploy.dicom.series import Series, collect
from dints_deploy.errors import DintsError, ScanRefused
from tests.dicom_phantoms import Phantom, save, scans, straight, write, write_enhanced


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    with Decoders(2) as some:
        yield some


def only(folder: Path) -> Series:
    (series,) = collect(folder).series
    return series


def stack(folder: Path, decoders: Decoders) -> NDArray[np.float32]:
    """Return (planes, rows, columns) as `read_series` has them."""
    volume = read_series(only(folder), decoders=decoders).volume
    values: NDArray[np.float32] = volume.data[0].transpose(2, 1, 0)
    return values


def refused_code(act: Callable[[], object]) -> str:
    with pytest.raises(ScanRefused) as refused:
        act()
    return refused.value.code


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_plain_syntaxes_and_signs_give_slope_times_stored_plus_intercept(
    tmp_path: Path, decoders: Decoders, syntax: str, dtype: type[np.integer[Any]]
) -> None:
    pixels = np.random.default_rng(1).integers(-30000 if dtype is np.int16 else 0, 30000, (4, 5, 6))
    phantom = straight(planes=4, pixels=pixels.astype(dtype), slope=0.25, intercept=-7.5)
    write(tmp_path, phantom, syntax=syntax)
    np.testing.assert_array_equal(stack(tmp_path, decoders), phantom.values().astype(np.float32))


@pytest.mark.parametrize(
    ("syntax", "signed"),  # pydicom's JPEG-LS encoder does not take signed pixels
    [
        (JPEG2000Lossless, False),
        (JPEG2000Lossless, True),
        (JPEGLSLossless, False),
        (RLELossless, False),
        (RLELossless, True),
    ],
)
def test_compressed_syntaxes_give_the_pixels_they_were_made_from(
    tmp_path: Path, decoders: Decoders, syntax: str, signed: bool
) -> None:
    pixels = np.random.default_rng(2).integers(-2000 if signed else 0, 2000, (4, 32, 32))
    phantom = straight(planes=4, pixels=pixels.astype(np.int16 if signed else np.uint16), intercept=-1024.0)

    for path in write(tmp_path, phantom):
        ds = dcmread(path)
        ds.compress(syntax, generate_instance_uid=False)
        ds.save_as(path)
    np.testing.assert_array_equal(stack(tmp_path, decoders), phantom.values().astype(np.float32))


@pytest.mark.parametrize(
    ("syntax", "name"),
    [(HTJ2KLossless, "lossless"), (HTJ2KLosslessRPCL, "lossless-rpcl"), (HTJ2K, "lossy")],
)
def test_high_throughput_jpeg_2000_gives_the_pixels_that_openjph_encoded(
    tmp_path: Path, data: Path, decoders: Decoders, syntax: UID, name: str
) -> None:
    """Code streams of OpenJPH; the lossy one against what OpenJPH itself decodes (tests/data/htj2k)."""
    row, column = np.mgrid[:48, :40]
    image = 1000 + row * 37 + column * 21 + row * column % 13 * 40  # what was encoded
    if name == "lossy":
        image = np.frombuffer((data / "htj2k" / "lossy.pgm").read_bytes()[-image.size * 2 :], ">u2").reshape(48, 40)
    codestream = (data / "htj2k" / f"{name}.j2c").read_bytes()
    for path in write(tmp_path, straight(planes=3, rows=48, columns=40)):
        ds: Any = dcmread(path)
        ds.PixelData = encapsulate([codestream])
        ds["PixelData"].is_undefined_length = True
        ds.file_meta.TransferSyntaxUID = syntax
        ds.save_as(path)
    for plane in stack(tmp_path, decoders):
        np.testing.assert_allclose(plane, image, atol=1 if name == "lossy" else 0)


def test_one_image_in_nine_transfer_syntaxes_has_the_same_pixels(decoders: Decoders) -> None:
    """transfer-syntaxes: the files are mosaics, so the planes are decoded without the gate."""
    headers = only(scans("transfer-syntaxes")).slices
    assert len({header.layout.TransferSyntaxUID for header in headers}) >= 6
    images = [next(iter(stored_values([header], decoders))).astype(np.int64) for header in headers]
    assert np.ptp(images[0]) > 100
    for header, image in zip(headers, images, strict=True):
        lossy = image.shape != images[0].shape
        assert not lossy
        np.testing.assert_array_equal(image, images[0], err_msg=header.layout.TransferSyntaxUID)


def test_one_series_in_four_codecs_gives_one_volume(decoders: Decoders) -> None:
    volumes = [stack(scans("compressed", codec, "001"), decoders) for codec in ("rle", "jpeg", "jpegls", "j2k")]
    assert np.ptp(volumes[0]) > 100
    for volume in volumes[1:]:
        np.testing.assert_array_equal(volume, volumes[0])


def test_every_plugin_of_the_table_is_installed() -> None:
    from pydicom.pixels import get_decoder

    for syntax, plugin in PLUGINS.items():
        assert plugin in get_decoder(syntax).available_plugins, syntax


def test_each_slice_is_rescaled_by_its_own_slope_and_sign(tmp_path: Path, decoders: Decoders) -> None:
    phantom = straight(planes=4)

    def own(ds: Dataset, index: int) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = str(1 + index / 4), str(-index)
        if index == 2:
            ds.PixelRepresentation = 1

    write(tmp_path, phantom, change=own)
    expected = [plane * (1 + index / 4) - index for index, plane in enumerate(phantom.pixels)]
    np.testing.assert_allclose(stack(tmp_path, decoders), expected, rtol=1e-6)


def twelve_bits(**changes: Any) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, index: int) -> None:
        ds.BitsStored, ds.HighBit = 12, 11
        for keyword, value in changes.items():
            setattr(ds, keyword, value)

    return change


def test_twelve_stored_bits_are_read_with_their_sign_however_they_were_padded(
    tmp_path: Path, decoders: Decoders
) -> None:
    values = np.random.default_rng(3).integers(-2048, 2048, (3, 4, 5)).astype(np.int16)
    for name, pixels in {"extended": values.view(np.uint16), "zeroed": values.view(np.uint16) & 0xFFF}.items():
        write(tmp_path / name, straight(planes=3, pixels=pixels), change=twelve_bits(PixelRepresentation=1))
        np.testing.assert_array_equal(stack(tmp_path / name, decoders), values)


def test_values_beyond_the_stored_bits_are_refused_instead_of_read_as_bone(tmp_path: Path, decoders: Decoders) -> None:
    """-2000 as padding in 16 bits, declared as 12 unsigned bits, would read as 2096."""
    pixels = straight(planes=3).pixels.copy()
    pixels[1, 0, 0] = np.int16(-2000).view(np.uint16)
    write(tmp_path, straight(planes=3, pixels=pixels), change=twelve_bits())
    assert refused_code(lambda: stack(tmp_path, decoders)) == "dicom-pixels"


def test_a_padding_value_is_kept_and_told(tmp_path: Path, decoders: Decoders) -> None:
    pixels = np.full((3, 4, 5), 100, dtype=np.int16)
    pixels[:, 0] = -2000

    def padded(ds: Dataset, index: int) -> None:
        ds.add_new("PixelPaddingValue", "SS", -2000)

    write(tmp_path, straight(planes=3, pixels=pixels, intercept=-1024.0), change=padded)
    series = only(tmp_path)
    assert series.slices[0].PixelPaddingValue == -2000
    volume = read_series(series)
    assert volume.report.has("dicom-padding")
    assert volume.volume.data.min() == -3024


def test_a_910_byte_file_that_claims_65535_by_65535_is_refused_at_once(tmp_path: Path, decoders: Decoders) -> None:
    def huge(ds: Dataset, index: int) -> None:
        ds.Rows = ds.Columns = 65535

    for name, syntax in {"plain": ExplicitVRLittleEndian, "deflated": DeflatedExplicitVRLittleEndian}.items():
        write(tmp_path / name, straight(planes=3, rows=2, columns=2), change=huge, syntax=syntax)
        assert (tmp_path / name / "0000.dcm").stat().st_size < 1200
        start = time.perf_counter()
        assert refused_code(lambda name=name: stack(tmp_path / name, decoders)) == "dicom-too-large"  # type: ignore[misc]
        assert time.perf_counter() - start < 1.0


def test_a_file_that_claims_more_than_it_has_is_refused_before_memory_is_taken(
    tmp_path: Path, decoders: Decoders
) -> None:
    def lie(ds: Dataset, index: int) -> None:
        ds.Rows = ds.Columns = 8000

    write(tmp_path, straight(planes=3), change=lie)
    assert refused_code(lambda: stack(tmp_path, decoders)) == "dicom-pixels"
    whole = Limits(stack_bytes=4 * 3 * 6 * 7 - 1)
    good = write(tmp_path / "good", straight(planes=3))
    (series,) = collect(good).series
    assert refused_code(lambda: read_series(series, limits=whole)) == "dicom-too-large"


def test_frames_that_lie_about_their_number_are_refused(tmp_path: Path) -> None:
    def more(ds: Dataset) -> None:
        ds.NumberOfFrames = 2_000_000_000

    def fewer_groups(ds: Dataset) -> None:
        ds.PerFrameFunctionalGroupsSequence = (ds.PerFrameFunctionalGroupsSequence or [])[:2]

    for change, code in ((more, "dicom-too-large"), (fewer_groups, "dicom-attribute")):
        path = write_enhanced(tmp_path / "one.dcm", straight(planes=4), change=change)
        assert refused_code(lambda path=path: read_series(only(path))) == code  # type: ignore[misc]


def test_a_deflate_bomb_is_inflated_only_as_far_as_its_header_is_allowed_to_be(tmp_path: Path) -> None:
    def bomb(ds: Dataset, index: int) -> None:
        ds.add_new(0x00091010, "OB", b"\0" * 50_000_000)

    write(tmp_path, straight(planes=1), change=bomb, syntax=DeflatedExplicitVRLittleEndian)
    assert (tmp_path / "0000.dcm").stat().st_size < 100_000
    study = collect(tmp_path, limits=Limits(header_bytes=1 << 20))
    assert next(item.code for item in study.findings or study.series[0].findings) in (
        "dicom-too-large",
        "dicom-truncated",
        "dicom-corrupt",
    )


def compressed(folder: Path, count: int = 3) -> list[SliceHeader]:
    """Return headers of small JPEG 2000 slices."""
    phantom = straight(planes=count, rows=32, columns=32)
    for path in write(folder, phantom):
        ds = dcmread(path)
        ds.compress(JPEG2000Lossless, generate_instance_uid=False)
        ds.save_as(path)
    return list(only(folder).slices)


def test_a_damaged_frame_is_refused_and_the_decoders_serve_on(tmp_path: Path, decoders: Decoders) -> None:
    headers = compressed(tmp_path)
    data = headers[1].path.read_bytes()
    at = headers[1].layout.offset + 60
    headers[1].path.write_bytes(data[:at] + b"\x5a" * 400 + data[at + 400 :])
    assert refused_code(lambda: decode(headers, decoders=decoders)) == "dicom-pixels"
    assert decode([headers[0], headers[2]], decoders=decoders).shape == (2, 32, 32)


def test_a_codestream_of_another_size_than_the_header_is_refused(tmp_path: Path, decoders: Decoders) -> None:
    headers = compressed(tmp_path)
    lying = [replace(header, layout=replace(header.layout, Rows=16, Columns=16)) for header in headers]
    assert refused_code(lambda: decode(lying, decoders=decoders)) == "dicom-pixels"


def test_a_decoder_that_crashes_or_hangs_is_a_refusal_and_is_replaced(tmp_path: Path) -> None:
    headers = compressed(tmp_path)
    with Decoders(1) as own:
        assert decode(headers, decoders=own).shape == (3, 32, 32)
        worker = own._idle.get()
        assert worker is not None
        os.kill(worker.pid, signal.SIGKILL)
        own._idle.put(worker)
        assert refused_code(lambda: decode(headers, decoders=own)) == "dicom-pixels"
        assert decode(headers, decoders=own).shape == (3, 32, 32)
    with Decoders(1, limits=Limits(frame_seconds=0.0)) as hasty:
        assert refused_code(lambda: decode(headers, decoders=hasty)) == "dicom-pixels"


def test_where_the_process_that_forks_decoders_died_another_is_started(tmp_path: Path) -> None:
    headers = compressed(tmp_path)
    with Decoders(2) as own:
        assert decode(headers, decoders=own).shape == (3, 32, 32)
        nursery = own._nursery._popen
        assert nursery is not None
        nursery.kill()
        nursery.wait()
        for _ in range(own.count + 1):  # its workers die with it, soon; no sound file is refused for that
            assert decode(headers, decoders=own).shape == (3, 32, 32)


CALLER = """
import sys, time
from pathlib import Path
from dints_deploy.dicom.decoders import Decoders
from dints_deploy.dicom.pixels import decode
from dints_deploy.dicom.series import collect
own = Decoders(2)
decode(collect(Path(sys.argv[1])).series[0].slices, decoders=own)
workers = [worker.pid for worker in (own._idle.get() for _ in range(2)) if worker]
print(own._nursery._popen.pid, *workers, flush=True)
time.sleep(60)
"""


def test_no_decoding_process_outlives_its_caller(tmp_path: Path) -> None:
    """Not even one that is killed, while its decoder hangs."""
    compressed(tmp_path, count=4)
    with subprocess.Popen([sys.executable, "-c", CALLER, tmp_path], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        nursery, *workers = map(int, caller.stdout.readline().split())
        os.kill(workers[0], signal.SIGSTOP)
        caller.kill()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{process}").exists() for process in (nursery, *workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [process for process in (nursery, *workers) if Path(f"/proc/{process}").exists()] == []


def test_a_decoder_without_memory_to_start_is_no_fault_of_the_scan(tmp_path: Path) -> None:
    headers = compressed(tmp_path)
    with (
        Decoders(1, limits=Limits(decoder_bytes=20 << 20)) as starved,
        pytest.raises(DintsError, match="dicom-decoder") as failed,
    ):
        decode(headers, decoders=starved)
    assert not isinstance(failed.value, ScanRefused)


def test_planes_of_one_enhanced_file_are_decoded_in_any_order(tmp_path: Path, decoders: Decoders) -> None:
    phantom = straight(planes=21)
    path = write_enhanced(tmp_path / "one.dcm", phantom)
    ds = dcmread(path)
    ds.compress(RLELossless, generate_instance_uid=False)
    ds.save_as(path)
    headers = only(path).slices
    order = np.random.default_rng(5).permutation(21)
    found = decode([headers[index] for index in order], decoders=decoders)
    np.testing.assert_array_equal(found, phantom.pixels[order])


def test_single_slices_need_a_policy_and_a_thickness(tmp_path: Path) -> None:
    phantom: Phantom = straight(planes=1)
    write(tmp_path, phantom)
    assert refused_code(lambda: read_series(only(tmp_path))) == "dicom-too-few-slices"
    one = Policy(minimum_slices=1)
    assert refused_code(lambda: read_series(only(tmp_path), policy=one)) == "dicom-attribute"

    ds = dcmread(tmp_path / "0000.dcm")
    ds.SliceThickness = "2.5"
    save(ds, tmp_path / "0000.dcm")
    assert read_series(only(tmp_path), policy=one).volume.grid.spacing == (1.0, 1.0, 2.5)
