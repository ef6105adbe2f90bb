"""Every scan that cannot be segmented ends in one sentence, its reason code, its exit code, and no file."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.command import (
    FAILED,
    REFUSED,
    THRESHOLD,
    Machine,
    assert_one_sentence,
    files,
    good_scan,
    three_entries,
    values,
    write_scan,
)
from tests.nifti_files import BROKEN
from tests.phantoms import affine
from tests.small_disk import fill, small_disk


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return three_entries(tmp_path_factory.mktemp("machine"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for outputs, beside the test's scans."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


# --- scans that are odd, but segmented ------------------------------------------------------------------------------

ODD: dict[str, tuple[NDArray[Any], NDArray[np.float64]]] = {
    "smaller-than-the-window": (values(5, 6, 7), affine("LPS", origin=(5, 6, 7))),
    "one-voxel-thick": (values(20, 18, 1), affine("RAS", (1, 1, 3))),
    "one-line": (values(1, 1, 40), affine("SRA", (1, 1, 1))),
    "huge-anisotropy": (values(30, 25, 3), affine("PIR", (0.3, 0.3, 10), angles=(0.2, 0.1, -0.2))),
    "oblique-and-flipped": (values(18, 21, 16), affine("ILA", (1, 2, 3), angles=(0.3, -0.2, 0.1))),
}


def test_odd_scans_are_segmented_on_their_own_grids(machine: Machine, tmp_path: Path, out: Path) -> None:
    scans = [write_scan(tmp_path / f"{name}.nii.gz", *scan) for name, scan in ODD.items()]
    done = machine.segment(*scans, "--model", "open", "-o", out)
    assert (done.code, done.err) == (0, "")
    for case, (name, (data, matrix)) in zip(done.cases, ODD.items(), strict=True):
        image = nibabel.load(out / f"{name}_seg.nii.gz")
        np.testing.assert_array_equal(np.asarray(image.dataobj), data > THRESHOLD)
        np.testing.assert_allclose(image.affine, matrix, atol=1e-4)
        millilitres = np.count_nonzero(data > THRESHOLD) * abs(np.linalg.det(matrix[:3, :3])) / 1000
        assert case["structures"][0]["volume_ml"] == pytest.approx(millilitres, abs=1e-4)
        assert case["scan"]["shape"] == list(data.shape)
        assert (case["case"], case["status"]) == (f"{name}.nii.gz", "done")
        assert case["research_use"].startswith("Research use only")


# --- refusals -------------------------------------------------------------------------------------------------------


def with_value(value: float) -> NDArray[np.float32]:
    data = values(16, 16, 16).astype(np.float32)
    data[3, 4, 5] = value
    return data


SCANS: dict[str, tuple[str, Callable[[], NDArray[Any]], tuple[float, float, float], str]] = {
    "nan": ("open", lambda: with_value(np.nan), (1, 1, 1), "scan-nonfinite"),
    "inf": ("open", lambda: with_value(-np.inf), (1, 1, 1), "scan-nonfinite"),
    "constant": ("open", lambda: np.full((16, 16, 16), 7, np.int16), (1, 1, 1), "scan-constant"),
    "labels": ("open", lambda: (values(16, 16, 16) > 500).astype(np.uint8), (1, 1, 1), "scan-looks-like-labels"),
    "three-channels": ("pair", lambda: values(16, 16, 16, 3), (1, 1, 1), "scan-channels"),
    "one-channel": ("pair", lambda: values(16, 16, 16), (1, 1, 1), "scan-channels"),
    "whole-head": ("crop", lambda: values(180, 20, 18), (1, 1, 1), "scan-extent"),
    "one-voxel-thick": ("crop", lambda: values(20, 20, 1), (1, 1, 1), "scan-shape"),
    "huge-anisotropy": ("crop", lambda: values(20, 20, 8), (0.5, 0.5, 10), "scan-spacing"),
}


@pytest.mark.parametrize("model", ["open", "crop", "pair"])
def test_scans_that_the_entry_is_not_for_are_refused_each_by_its_reason(
    model: str, machine: Machine, tmp_path: Path, out: Path
) -> None:
    expected = {f"{name}.nii.gz": code for name, (entry, _, _, code) in SCANS.items() if entry == model}
    for name, (_, build, spacing, _) in SCANS.items():
        write_scan(tmp_path / f"{name}.nii.gz", build(), affine("RAS", spacing))
    done = machine.segment(*[tmp_path / name for name in expected], "--model", model, "-o", out)
    assert {case["case"]: case["code"] for case in done.cases} == expected
    assert (done.code, files(out)) == (REFUSED, [])
    for line, (name, code) in zip(done.err.splitlines(), expected.items(), strict=True):
        assert re.fullmatch(rf"error: {name}: expected .+ \[{code}\]", line)


def test_a_whole_head_is_refused_where_a_crop_is_expected(machine: Machine, tmp_path: Path, out: Path) -> None:
    scan = write_scan(tmp_path / "head.nii.gz", values(180, 220, 18))
    done = machine.segment(scan, "--model", "crop", "-o", out, "--to", "nifti,preview,html")
    assert_one_sentence(done, "scan-extent", REFUSED, "head.nii.gz")
    assert "8 to 90 mm of extent left-right for crop (a crop, not a whole head), found 180" in done.err
    assert files(out) == []


FILES = ["empty", "gzip-bomb", "claims-32767-cubed", "two-axes"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_scan_is_refused(name: str, machine: Machine, tmp_path: Path, out: Path) -> None:
    build, code = BROKEN[name]
    scan = tmp_path / f"{name}.nii.gz"
    scan.write_bytes(build())
    done = machine.segment(scan, "--model", "open", "-o", out)
    assert_one_sentence(done, code, REFUSED, scan.name)
    assert files(out) == []


def test_a_batch_of_all_broken_files_gives_each_its_code_and_no_file(
    machine: Machine, tmp_path: Path, out: Path
) -> None:
    for name, (build, _) in BROKEN.items():
        (tmp_path / f"{name}.nii.gz").write_bytes(build())
    missing = tmp_path / "missing.nii.gz"
    scans = [*sorted(tmp_path.glob("*.nii.gz")), missing]
    done = machine.segment(*scans, "--model", "open", "-o", out)
    found = {case["case"].removesuffix(".nii.gz"): case["code"] for case in done.cases}
    assert found == {name: code for name, (_, code) in BROKEN.items()} | {"missing": "scan-missing"}
    assert done.code == REFUSED
    assert len(done.err.splitlines()) == len(scans)
    assert files(out) == []


def test_channels_on_different_grids_are_refused_by_the_channels_name(
    machine: Machine, tmp_path: Path, out: Path
) -> None:
    first = good_scan(tmp_path, "a.nii.gz")
    moved = write_scan(tmp_path / "b.nii.gz", values(18, 20, 17), affine(origin=(0.5, 0, 0)))
    channels = ("--channel", f"T1={first}", "--channel", f"T2={moved}")
    done = machine.segment(*channels, "--model", "pair", "-o", out)
    assert_one_sentence(done, "frame-mismatch", REFUSED, "a.nii.gz")
    assert "channel T2" in done.err
    swapped = machine.segment("--channel", f"T2={first}", "--channel", f"T1={first}", "--model", "pair", "-o", out)
    assert_one_sentence(swapped, "scan-channels", REFUSED, "a.nii.gz")
    assert files(out) == []


# --- outputs that cannot be written ---------------------------------------------------------------------------------


def test_an_output_that_cannot_be_written_fails_and_leaves_nothing(machine: Machine, tmp_path: Path) -> None:
    scan = good_scan(tmp_path)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "taken_seg.nii.gz").mkdir()
    shutil.copy(scan, tmp_path / "taken.nii.gz")
    before = files(tmp_path)
    for words in (
        (scan, "-o", tmp_path / "file" / "labels.nii.gz"),
        (scan, "-o", tmp_path / "file"),
        (tmp_path / "taken.nii.gz", "-o", tmp_path),
    ):
        done = machine.segment(*words, "--model", "open")
        assert_one_sentence(done, "output-unwritable", FAILED, words[0].name)
    assert files(tmp_path) == before


def test_a_limit_on_file_sizes_fails_as_a_full_disk_and_leaves_nothing(
    machine: Machine, tmp_path: Path, out: Path
) -> None:
    done = machine.segment(good_scan(tmp_path), "--model", "open", "-o", out, file_bytes=100)
    assert_one_sentence(done, "disk-full", FAILED, "good.nii.gz")
    assert files(out) == []


def test_a_full_disk_fails_and_leaves_nothing(machine: Machine, tmp_path: Path) -> None:
    scan = good_scan(tmp_path)
    with small_disk(tmp_path / "disk", kilobytes=48) as disk:
        # The labels fit, the pictures do not: both go.
        done = machine.segment(scan, "--model", "open", "-o", disk, "--to", "nifti,preview,html")
        assert_one_sentence(done, "disk-full", FAILED, "good.nii.gz")
        assert files(disk) == []
        fill(disk)
        done = machine.segment(scan, "--model", "open", "-o", disk / "labels.nii.gz")
        assert_one_sentence(done, "disk-full", FAILED, "good.nii.gz")
        assert files(disk) == ["filler"]


def test_when_the_last_output_fails_none_is_left(machine: Machine, tmp_path: Path, out: Path) -> None:
    (out / "good_seg.html").mkdir()
    done = machine.segment(good_scan(tmp_path), "--model", "open", "-o", out, "--to", "nifti,preview,html")
    assert_one_sentence(done, "output-unwritable", FAILED, "good.nii.gz")
    assert files(out) == []


def test_more_memory_than_allowed_fails_before_the_run(machine: Machine, tmp_path: Path, out: Path) -> None:
    done = machine.segment(good_scan(tmp_path), "--model", "open", "-o", out, "--max-ram", "1M")
    assert_one_sentence(done, "memory-limit", FAILED, "good.nii.gz")
    assert files(out) == []
