"""Many scans in one call: networks stay loaded, results are those of single calls, and what fails stops nobody else."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from dints_deploy.catalog.catalog import LoadedEntry, load_entry
from dints_deploy.catalog.entry import Entry
from dints_deploy.cli.cases import PlannedCase
from dints_deploy.cli.segment import Entries
from dints_deploy.cli.segment import _run as run_planned
from dints_deploy.errors import DintsError, EngineError
from dints_deploy.imaging.volume import Volume
from dints_deploy.process.case import Outcome, Request, finish_case, process_case, read_case, read_cases
from dints_deploy.runtime.certified import side_by_side
from dints_deploy.runtime.engine import MOST_PER_CALL
from dints_deploy.runtime.memory import Plan
from dints_deploy.runtime.rss import resident_bytes
from dints_deploy.runtime.sessions import WarmSessions, windows_per_call
from tests.command import (
    FAILED,
    REFUSED,
    Machine,
    default_interrupt,
    files,
    good_scan,
    three_entries,
    values,
    write_scan,
)
from tests.tiny_entry import entry_fields, model, random_network, random_scan, scan_file, write_entry


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return three_entries(tmp_path_factory.mktemp("machine"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedEntry:
    """An ensemble of two, mirrored along i."""
    folder = tmp_path_factory.mktemp("zoo") / "tiny"
    networks = [random_network(seed).onnx() for seed in (0, 1)]
    return load_entry(write_entry(folder, entry_fields(ensemble=2, tta=["i"]), networks))


def requests_for(folder: Path, scans: list[Path], **more: Any) -> list[Request]:
    settings: dict[str, Any] = {"engine": "onnx", "threads": 1} | more
    return [Request({"": scan}, folder / scan.name.partition(".")[0], **settings) for scan in scans]


def run_all(requests: list[Request], entry: LoadedEntry, warm: WarmSessions) -> list[Outcome | DintsError]:
    outcomes: list[Outcome | DintsError] = []
    for case in read_cases(requests, {entry.spec.name: entry.spec}):
        with case:
            try:
                outcomes.append(finish_case(case, lambda name: entry, warm=warm))
            except DintsError as error:
                outcomes.append(error)
    return outcomes


def test_warm_networks_give_the_bytes_of_single_calls(tiny: LoadedEntry, tmp_path: Path) -> None:
    scans = [scan_file(tmp_path, random_scan(n, (20 + n, 19, 22)), f"s{n}.nii.gz") for n in range(3)]
    with WarmSessions() as warm:
        run_all(requests_for(tmp_path / "many", scans), tiny, warm)
    for request in requests_for(tmp_path / "single", scans):
        process_case(request, {"tiny": tiny.spec}, lambda name: tiny)
    assert files(tmp_path / "many") == files(tmp_path / "single") == [f"s{n}.nii.gz" for n in range(3)]
    for name in files(tmp_path / "single"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "single" / name).read_bytes()


def test_networks_are_loaded_once_per_entry_and_setting(tiny: LoadedEntry) -> None:
    with WarmSessions() as warm:
        first = warm.open(tiny, windows=3, engine="onnx", threads=1)
        assert len(first.sessions) == 2
        assert warm.open(tiny, windows=500, engine="onnx", threads=1) is first
        assert warm.open(tiny, windows=3, engine="openvino", threads=1) is not first
    assert warm.open(tiny, windows=3, engine="onnx", threads=1) is not first


@pytest.mark.parametrize(
    ("windows", "threads", "changes", "at_once"),
    [
        (31, 2, {}, 1),
        (32, 2, {}, 2),
        (500, 8, {}, 2),
        (500, 3, {}, 1),
        (500, 1, {}, 1),
        (500, 2, {"ensemble": 2}, 1),
        (500, 2, {"window": [96, 96, 96], "classes": 18}, 2),
        (500, 2, {"window": [96, 96, 96], "classes": 19}, 1),
    ],
)
def test_two_windows_of_a_long_run_compute_at_a_time(
    windows: int, threads: int, changes: dict[str, Any], at_once: int
) -> None:
    assert side_by_side(Entry.model_validate(entry_fields(**changes)), windows, threads) == at_once


def test_a_long_run_and_a_short_one_share_no_network_where_they_would_round_differently(tmp_path: Path) -> None:
    alone = load_entry(write_entry(tmp_path / "zoo", entry_fields(), [random_network(0).onnx()]))
    with WarmSessions() as warm:
        short, long = (warm.open(alone, windows=n, engine="openvino", threads=2) for n in (1, 500))
        assert (short.under_way, long.under_way) == (2, 3)
        assert warm.open(alone, windows=31, engine="openvino", threads=2) is short
        assert warm.open(alone, windows=32, engine="openvino", threads=2) is long
        first = warm.open(alone, windows=1, engine="onnx", threads=2)
        assert warm.open(alone, windows=500, engine="onnx", threads=2) is first


@pytest.mark.parametrize("window", [(16, 16, 16), (40, 56, 40), (96, 96, 96), (256, 256, 256)])
def test_a_call_has_no_more_windows_than_a_plan_is_made_for(window: tuple[int, int, int]) -> None:
    assert windows_per_call(window, "cpu") == 1 <= windows_per_call(window, "cuda:0") <= MOST_PER_CALL


def test_a_case_that_was_worked_on_holds_no_scan(tiny: LoadedEntry, tmp_path: Path) -> None:
    [request] = requests_for(tmp_path / "out", [scan_file(tmp_path, random_scan(0))])
    with read_case(request, {"tiny": tiny.spec}) as case:
        assert case.found is not None
        scan = weakref.ref(case.found[0])
    gc.collect()
    assert scan() is None


class Broken(Entries):
    """Entries that cannot be loaded."""

    def __init__(self, fault: Exception) -> None:
        super().__init__(None)
        self.fault = fault

    def load(self, name: str) -> LoadedEntry:
        raise self.fault from ValueError()


@pytest.mark.parametrize(
    ("fault", "code"), [(MemoryError(), "engine-memory"), (EngineError("engine-failed", "found none"), "engine-failed")]
)
def test_a_scan_that_fails_is_told_and_its_error_holds_no_frame(
    fault: Exception, code: str, tiny: LoadedEntry, tmp_path: Path
) -> None:
    [request] = requests_for(tmp_path / "out", [scan_file(tmp_path, random_scan(0))])
    case = PlannedCase(request.channels, "scan", request.stem, None)
    read = read_case(request, {"tiny": tiny.spec})
    with WarmSessions() as warm:
        error = run_planned(case, read, Broken(fault), warm, quiet=True)
    assert isinstance(error, EngineError)
    assert error.code == code
    assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


def test_the_number_of_windows_counts_members_and_mirrors_for_the_choice_of_engine(tiny: LoadedEntry) -> None:
    with WarmSessions() as warm:
        assert warm.open(tiny, windows=1, threads=1).sessions[0].info.engine == "onnx"  # 1 window, run 4 times
        info = warm.open(tiny, windows=2, threads=1).sessions[0].info
        assert (info.engine, info.why) == ("openvino", "fastest on this CPU, for 8 windows")


def test_a_scan_that_is_refused_or_fails_in_the_middle_leaves_the_others(tiny: LoadedEntry, tmp_path: Path) -> None:
    scans = [scan_file(tmp_path, random_scan(n), f"s{n}.nii.gz") for n in range(4)]
    scans[1].write_bytes(b"")
    (tmp_path / "out" / "s2.nii.gz").mkdir(parents=True)
    with WarmSessions() as warm:
        results = run_all(requests_for(tmp_path / "out", scans), tiny, warm)
    codes = [result.code if isinstance(result, DintsError) else "done" for result in results]
    assert codes == ["done", "scan-empty", "output-unwritable", "done"]
    assert files(tmp_path / "out") == ["s0.nii.gz", "s3.nii.gz"]


def test_an_engine_that_fails_in_the_middle_leaves_nothing_half_written(tmp_path: Path) -> None:
    root = helper.make_node("Sqrt", ["scan"], ["root"])
    join = helper.make_node("Concat", ["root"] * 3, ["logits"], axis=1)
    network = model([root, join], [], 1, 3)
    broken = load_entry(write_entry(tmp_path / "zoo" / "broken", entry_fields("broken"), [network]))
    voxels = np.abs(random_scan(0, (30, 30, 30)).data)
    voxels[0, 20, 20, 20] = -1  # the square root of one voxel in the middle is no number
    scan = scan_file(tmp_path, Volume(voxels, np.eye(4)))
    with pytest.raises(EngineError) as caught:
        process_case(
            Request({"": scan}, tmp_path / "out" / "x", ("nifti", "html"), engine="onnx", threads=1),
            {"broken": broken.spec},
            lambda name: broken,
        )
    assert caught.value.code == "engine-output"
    assert files(tmp_path / "out") == []


def test_a_memory_limit_is_kept_in_blocks_with_the_same_labels(tmp_path: Path) -> None:
    """100 classes: beyond what the process holds, the limit leaves less than one sweep takes."""
    fields = entry_fields(classes=100, window=[24, 24, 24], overlap=0.25)
    entry = load_entry(write_entry(tmp_path / "zoo" / "tiny", fields, [random_network(3, classes=100).onnx()]))
    scan = scan_file(tmp_path, random_scan(1, (72, 72, 72)))
    plans: list[Plan] = []
    bytes_written = []
    with WarmSessions() as warm:
        for name, limit in (("free", None), ("bound", 0)):
            limit = limit if limit is None else resident_bytes() + int(0.9 * plans[0].peak_bytes)
            request = Request({"": scan}, tmp_path / name, engine="onnx", threads=1, max_ram_bytes=limit)
            outcome = process_case(request, {"tiny": entry.spec}, lambda _: entry, warm=warm, planned=plans.append)
            bytes_written.append(outcome.files["nifti"].read_bytes())
    assert len(plans[0].blocks) == 1 < len(plans[1].blocks)
    assert plans[1].again > 0
    assert bytes_written[0] == bytes_written[1]


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_ctrl_c_in_the_middle_of_a_run_ends_it_and_leaves_nothing(
    engine: str, machine: Machine, tmp_path: Path
) -> None:
    scan = write_scan(tmp_path / "large.nii.gz", values(160, 160, 160))
    words = ["segment", scan, "--model", "open", "-o", tmp_path / "out", "--engine", engine, "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dints_deploy", *map(str, words)],
        env=machine.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=default_interrupt,
    )
    while not (tmp_path / "out").exists():  # made just before the run
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode not in (0, -signal.SIGSEGV)
    assert b"Traceback" not in said
    assert files(tmp_path / "out") == []


# --- the command line -----------------------------------------------------------------------------------------------


def test_a_folder_stands_for_its_nifti_files_and_ends_in_one_table(machine: Machine, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a.nii.gz", "b.nii"):
        good_scan(folder, name)
    (folder / "c.nii.gz").write_bytes(b"")
    (folder / "notes.txt").write_text("not a scan")
    done = machine.run("segment", folder, "--model", "open", "-o", tmp_path / "out", "--engine", "onnx")
    assert done.code == REFUSED
    assert files(tmp_path / "out") == ["a_seg.nii.gz", "b_seg.nii.gz"]
    rows = [line for line in done.out.splitlines() if ".nii" in line and ("done" in line or "refused" in line)]
    assert [("a.nii.gz" in row, "b.nii" in row, "c.nii.gz" in row) for row in rows] == [
        (True, False, False), (False, True, False), (False, False, True),
    ]  # fmt: skip
    assert "scan-empty" in rows[2]
    assert done.err.count("\n") == 1
    assert "Research use only" in done.out


def test_a_folder_of_nifti_and_dicom_files_is_a_wrong_call(machine: Machine, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    good_scan(folder)
    (folder / "slice").write_bytes(bytes(128) + b"DICM")
    done = machine.segment(folder, "--model", "open", "-o", tmp_path / "out")
    assert (done.code, done.json["error"]["code"]) == (2, "usage")


def test_a_scan_that_no_entry_takes_is_refused_and_does_not_stop_a_batch(machine: Machine, tmp_path: Path) -> None:
    four = write_scan(tmp_path / "four.nii.gz", np.stack([values(18, 20, 17)] * 4, axis=-1))
    done = machine.segment(four, "-o", tmp_path / "out")
    assert (done.code, done.cases[0]["code"]) == (REFUSED, "scan-no-entry")
    assert all(name in done.cases[0]["message"] for name in ("open", "crop", "pair"))


def test_labels_named_like_a_picture_are_a_wrong_call(machine: Machine, tmp_path: Path) -> None:
    done = machine.segment(good_scan(tmp_path), "--model", "open", "-o", tmp_path / "x.png")
    assert (done.code, done.json["error"]["code"]) == (2, "usage")
    assert files(tmp_path) == ["good.nii.gz"]


def test_a_limit_that_splits_a_scan_tells_its_price_before_the_run(machine: Machine, tmp_path: Path) -> None:
    done = machine.segment(good_scan(tmp_path), "--model", "open", "-o", tmp_path / "out", "--max-ram", "8G")
    assert done.code == 0
    assert done.cases[0]["plan"]["blocks"] == 1
    assert done.cases[0]["engine"]["network_bytes"] > 0
    refused = machine.segment(good_scan(tmp_path), "--model", "open", "-o", tmp_path / "no", "--max-ram", "1M")
    assert (refused.code, refused.cases[0]["code"]) == (FAILED, "memory-limit")
