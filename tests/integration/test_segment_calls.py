"""The command line's contract: batches, places of outputs, wrong calls, and names of files that hold anything."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.command import FAILED, REFUSED, USAGE, Machine, files, good_scan, three_entries
from tests.tiny_entry import run_cli


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return three_entries(tmp_path_factory.mktemp("machine"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for outputs, beside the test's scans."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


# --- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_goes_on_after_a_refusal_and_ends_with_3(machine: Machine, tmp_path: Path, out: Path) -> None:
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"")
    done = machine.segment(
        good_scan(tmp_path, "a.nii.gz"), bad, good_scan(tmp_path, "b.nii"), "--model", "open", "-o", out
    )
    assert done.code == REFUSED
    assert [(c["case"], c["status"], c.get("code")) for c in done.cases] == [
        ("a.nii.gz", "done", None),
        ("bad.nii.gz", "refused", "scan-empty"),
        ("b.nii", "done", None),
    ]
    assert files(out) == ["a_seg.nii.gz", "b_seg.nii.gz"]
    assert len(done.err.splitlines()) == 1


def test_a_batch_with_a_failure_ends_with_1(machine: Machine, tmp_path: Path, out: Path) -> None:
    (out / "b_seg.nii.gz").mkdir()
    (tmp_path / "bad.nii.gz").write_bytes(b"")
    scans = [tmp_path / "bad.nii.gz", good_scan(tmp_path, "b.nii.gz"), good_scan(tmp_path, "c.nii.gz")]
    done = machine.segment(*scans, "--model", "open", "-o", out)
    assert done.code == FAILED
    assert [c["status"] for c in done.cases] == ["refused", "failed", "done"]
    assert files(out) == ["c_seg.nii.gz"]


# --- where outputs go -----------------------------------------------------------------------------------------------


def test_outputs_go_to_the_file_the_folder_or_the_current_folder(machine: Machine, tmp_path: Path) -> None:
    scan = good_scan(tmp_path)
    machine.segment(scan, "--model", "open", "-o", tmp_path / "new" / "mine.nii")
    machine.segment(scan, "--model", "open", "-o", tmp_path / "folder", "--to", "nifti,preview,html")
    machine.segment(scan, "--model", "open")
    here = machine.folder / "good_seg.nii.gz"
    assert files(tmp_path / "new") == ["mine.nii"]
    assert files(tmp_path / "folder") == ["good_seg.html", "good_seg.nii.gz", "good_seg.png"]
    first, second = nibabel.load(tmp_path / "new" / "mine.nii"), nibabel.load(here)
    np.testing.assert_array_equal(np.asarray(first.dataobj), np.asarray(second.dataobj))
    assert here.read_bytes() == (tmp_path / "folder" / "good_seg.nii.gz").read_bytes()
    here.unlink()
    picture = (tmp_path / "folder" / "good_seg.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert "Research use only" in (tmp_path / "folder" / "good_seg.html").read_text()


def test_a_scan_is_never_written_over(tmp_path: Path) -> None:
    scan, other = good_scan(tmp_path), good_scan(tmp_path, "good_seg.nii.gz")
    (tmp_path / "link.nii.gz").symlink_to(scan)
    before = scan.read_bytes()
    for words in ((scan, "-o", scan), (scan, "-o", tmp_path / "link.nii.gz"), (scan, other, "-o", tmp_path)):
        done = run_cli("segment", *words, "--model", "open", "--json")
        assert (done.code, json.loads(done.out)["error"]["code"]) == (USAGE, "usage")
    assert scan.read_bytes() == other.read_bytes() == before


WRONG: dict[str, list[str]] = {
    "usage": [
        "",
        "good.nii.gz --channel T1=good.nii.gz",
        "--channel T1",
        "--channel T1=a.nii --channel T1=b.nii",
        "good.nii.gz --to nifti,jpeg",
        "good.nii.gz --to ,",
        "good.nii.gz --max-ram much",
        "good.nii.gz good.nii",
        "good.nii.gz other.nii.gz -o labels.nii.gz",
        "good.nii.gz --model open --engine abacus",
        "good.nii.gz --model open --device tpu",
    ],
    "entry-unknown": ["good.nii.gz --model nobody"],
    "entry-ambiguous": ["good.nii.gz"],
}


@pytest.mark.parametrize(("code", "words"), [(code, words) for code, calls in WRONG.items() for words in calls])
def test_a_wrong_call_ends_with_2_and_one_line(
    code: str, words: str, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in machine.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    good_scan(tmp_path)
    done = run_cli("segment", *words.split(), "--json")
    assert done.code == USAGE
    assert re.fullmatch(rf"error: [^\n]*expected [^\n]+ \[{code}\]\n", done.err), done.err
    assert files(tmp_path) == ["good.nii.gz"]


# --- names of files -------------------------------------------------------------------------------------------------

NASTY = "[bold]\x1b[31m\n\udcff$(x).nii.gz"


def test_a_name_of_control_characters_and_markup_is_shown_as_escapes(
    machine: Machine, tmp_path: Path, out: Path
) -> None:
    (tmp_path / NASTY).write_bytes(b"")
    done = machine.segment(tmp_path / NASTY, "--model", "open", "-o", out)
    assert done.code == REFUSED
    assert done.err.startswith(r"error: [bold]\x1b[31m\n\udcff$(x).nii.gz: expected ")
    assert len(done.err.splitlines()) == 1
    good_scan(tmp_path, NASTY)
    done = machine.run("segment", tmp_path / NASTY, "--model", "open", "-o", out, "--engine", "onnx")
    assert (done.code, done.err) == (0, "")
    assert r"[bold]\x1b[31m\n\udcff$(x)_seg.nii.gz" in done.out


def test_a_progress_bar_on_a_terminal_takes_any_name(machine: Machine, tmp_path: Path, out: Path) -> None:
    scan = good_scan(tmp_path, "[slash]..[-x] [").rename(tmp_path / "[.nii.gz")
    leader, follower = pty.openpty()
    words = ["segment", str(scan), "--model", "open", "-o", str(out), "--engine", "onnx"]
    done = subprocess.run(
        [sys.executable, "-m", "dints_deploy", *words],
        cwd=machine.folder,
        env=machine.environment() | {"TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=follower,
        check=False,
        timeout=120,
    )
    os.close(follower)
    shown = os.read(leader, 1 << 16)
    os.close(leader)
    assert done.returncode == 0
    assert b"Traceback" not in shown
    assert files(out) == ["[_seg.nii.gz"]
