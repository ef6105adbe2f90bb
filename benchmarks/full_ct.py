"""A full CT on the CPU with a DiNTS network of about 140 GMAC a window, against MONAI's and nnU-Net's loops.

    python -m benchmarks.full_ct --data CT.nii.gz [--work FOLDER] [--part whole|eighth] [--rounds 3]
                                 [--contender NAME ...] [--nnunet-python PYTHON] [--factor 4] [--cpu]

The CT is resampled to `factor` times its voxels along each axis. Every contender gets the same weights, overlap 0.25
and float32, and starts from a fresh process with the scan's file. Contenders of one part run in turns; runs add up in
benchmarks/results/full_ct.json, so that a part or a contender can be run later, and all of them are printed as tables.
nnU-Net runs in the interpreter that has it (`--nnunet-python`), on the same torch. With --cpu every contender gets one
thread and the processor's seconds are counted, for a machine that others use too; those runs go to full_ct_cpu.json.
Before bf16 or int8 can take part, certify them:

    DINTS_ZOO=FOLDER/zoo DINTS_STATE=FOLDER/state dints-deploy export random-3 --openvino --precision int8
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from benchmarks import report
from benchmarks.machine import ROOT, origin, read, write
from benchmarks.made import make_ct, make_eighth, make_entry
from dints_deploy.runtime.window import window_starts

OVERLAP, CLASSES = 0.25, 3
OURS, MONAI, NNUNET = "dints-deploy (openvino)", "torch eager + MONAI", "torch eager + nnU-Net"
REDUCED = ("bf16", "int8")
WEIGHTS = (
    "made, not trained (benchmarks/tissue.py); bf16 and int8 are certified within limits that are looser for it "
    "(benchmarks/made.py) than an entry's defaults, which they would not keep"
)
STEPS = "its windows start elsewhere (its own steps), so its labels differ"
TITLE = "Full CT: one scan from a fresh process"


def main() -> None:
    options = arguments()
    work = options.work or Path(tempfile.mkdtemp())
    (work / "zoo").mkdir(parents=True, exist_ok=True)
    scans = {"whole": work / "whole.nii.gz", "eighth": work / "eighth.nii.gz"}
    if not scans["whole"].exists():
        make_ct(options.data, scans["whole"], options.factor)
        make_eighth(scans["whole"], scans["eighth"])
    entry, gmac = entry_of(work, options.multiplier, options.window, scans["whole"])
    commands = contenders(entry, scans[options.part], work, options)
    chosen = options.contender or [name for name in commands if name != NNUNET or options.nnunet_python]
    where, title = ("full_ct_cpu", f"{TITLE}, processor seconds on one thread") if options.cpu else ("full_ct", TITLE)
    for _ in range(options.rounds):
        for name in chosen:
            run = timed(commands[name], work, one_thread=options.cpu)
            run |= {"agreement": agreement(work, options.part, name), **origin()}
            result = read(where) or {"title": title, "runs": {"whole": {}, "eighth": {}}}
            result["runs"][options.part].setdefault(name, []).append(run)
            print(options.part, name, json.dumps(run), flush=True)
            about = {"GMAC per window": round(gmac, 1), "overlap": OVERLAP, "weights": WEIGHTS, "nnU-Net": STEPS}
            result["facts"] = {**about, **shapes(scans)}
            write(where, result)
    print("\n".join(report.full_ct(result)))


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a CT, NIfTI")
    parser.add_argument("--work", type=Path, help="keeps scans and networks between calls")
    parser.add_argument("--part", choices=("whole", "eighth"), default="eighth")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--contender", action="append", help="repeatable; all by default")
    parser.add_argument("--nnunet-python", type=Path, help="an interpreter with nnunetv2")
    parser.add_argument("--factor", type=float, default=4.0)
    parser.add_argument("--multiplier", type=float, default=1.0, help="of the network's channels")
    parser.add_argument("--window", type=int, default=96)
    parser.add_argument("--cpu", action="store_true", help="count processor seconds, on one thread")
    return parser.parse_args()


def entry_of(work: Path, multiplier: float, window: int, scan: Path) -> tuple[Path, float]:
    """Return the entry's folder and its GMAC, made where it is not there yet."""
    folder, note = work / "zoo" / f"random-{CLASSES}", work / "gmac.json"
    if not note.exists():
        _, gmac = make_entry(
            work / "zoo", classes=CLASSES, multiplier=multiplier, window=window, overlap=OVERLAP, scan=scan
        )
        note.write_text(json.dumps(gmac))
    return folder, float(json.loads(note.read_text()))


def contenders(entry: Path, scan: Path, work: Path, options: Any) -> dict[str, list[str]]:
    """Return name -> command line."""
    program = [str(Path(sys.executable).parent / "dints-deploy"), "segment", str(scan), "--model", entry.name, "--json"]

    def ours(name: str, engine: str, precision: str = "fp32") -> list[str]:
        out = labels_path(work, options.part, name)
        return [*program, "--engine", engine, "--precision", precision, "-o", str(out)]

    def torch_path(python: str, loop: str, name: str) -> list[str]:
        state = work / "zoo" / f"{entry.name}.state.pt"
        out = labels_path(work, options.part, name)
        size = ["--classes", str(CLASSES), "--multiplier", str(options.multiplier), "--window", str(options.window)]
        words = [loop, str(scan), str(state), str(out), *size, "--overlap", str(OVERLAP)]
        return [python, "-m", "benchmarks.torch_path", *words]

    windows = len(window_starts(nibabel.load(scan).shape, [options.window] * 3, OVERLAP))
    alone = [sys.executable, "-m", "benchmarks.alone", str(entry), "--product"]
    reduced = {f"dints-deploy ({p})": ours(f"dints-deploy ({p})", "openvino", p) for p in REDUCED if certified(work, p)}
    return {  # MONAI first: the others' labels are compared with its
        MONAI: torch_path(sys.executable, "monai", MONAI),
        OURS: ours(OURS, "openvino"),
        "dints-deploy (onnx)": ours("dints-deploy (onnx)", "onnx"),
        **reduced,
        "engine alone (openvino)": [*alone, "--of", str(windows)],  # a short run takes the network as it is written
        NNUNET: torch_path(str(options.nnunet_python), "nnunet", NNUNET),
    }


def certified(work: Path, precision: str) -> bool:
    """Say whether `dints-deploy export` certified a precision of the entry on this machine, into the work folder."""
    return any((work / "state").rglob(f"*-openvino-{precision}-*.json"))


def labels_path(work: Path, part: str, name: str) -> Path:
    """Return where a contender writes its labels."""
    return work / f"{part}-{''.join(c if c.isalnum() else '_' for c in name)}.nii.gz"


def timed(command: list[str], work: Path, *, one_thread: bool) -> dict[str, Any]:
    """Run a command in a fresh process and return its seconds and what it says of itself.

    Args:
        command: of the contender.
        work: the folder of its entry and certificates.
        one_thread: let it run on one thread, and count its processor's seconds instead of the clock's.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'search'}",
        "DINTS_ZOO": str(work / "zoo"),
        "DINTS_STATE": str(work / "state"),
    }
    if one_thread:
        environment["OMP_NUM_THREADS"] = "1"
        command = [*command, "--threads", "1"]
    clock = children_seconds if one_thread else time.perf_counter
    begin = clock()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = clock() - begin
    if done.returncode:
        raise SystemExit(f"expected {command[0]} to run, found: {done.stderr[-2000:]}")
    said = json.loads(done.stdout[done.stdout.index("{") :])
    if "cases" not in said:
        return {"seconds": seconds, **said}
    case = said["cases"][0]
    engine = case["engine"]
    told = {key: engine[key] for key in ("windows", "windows_run", "precision", "gmac_saved_per_window")}
    return {"seconds": seconds, **told, "stages": case["seconds"]}


def children_seconds() -> float:
    """Return the processor seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def agreement(work: Path, part: str, name: str) -> float | None:
    """Return the share of voxels with the label of the MONAI path; None while either is missing."""
    paths = [labels_path(work, part, name), labels_path(work, part, MONAI)]
    if not all(path.exists() for path in paths):
        return None
    ours, theirs = (np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj) for path in paths)
    return float((ours == theirs).mean())


def shapes(scans: dict[str, Path]) -> dict[str, list[int]]:
    """Return the voxels of both scans."""
    return {f"{part} scan, voxels": list(nibabel.load(path).shape) for part, path in scans.items()}


if __name__ == "__main__":
    main()
