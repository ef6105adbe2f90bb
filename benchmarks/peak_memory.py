"""Peak memory for a scan of 512 x 512 x 600 and 3, 14 and 118 classes, with and without --max-ram, and of MONAI.

    python -m benchmarks.peak_memory [--work FOLDER] [--shape 512,512,600] [--classes 3,14,118] [--max-ram 4G]
                                     [--contender NAME ...] [--peer-limit-gib 10]

The network is a DiNTS network of about 2 GMAC with random weights, the scan is noise: every window runs. A peak is
VmHWM of the process, read until it ends; the baseline is that of a process that loads the engine and runs warm-up
windows. A peer is stopped when it holds more than --peer-limit-gib, and reported as such. Prints a table of all
runs that benchmarks/results/peak_memory.json has gathered.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.machine import ROOT, origin, read, write
from benchmarks.made import make_entry, make_noise

GIB = 1 << 30
OVERLAP = 0.25
WINDOW = {3: 96, 14: 96, 118: 64}
"""Classes -> voxels along each axis of a window: 118 classes over 96 are 418 MB a window."""

MULTIPLIER = 0.125
POLL_SECONDS = 0.02
BASELINE, OURS, BOUND, MONAI = "baseline", "dints-deploy", "dints-deploy --max-ram", "torch eager + MONAI"
TITLE = "Peak memory"


def main() -> None:
    options = arguments()
    work = options.work or Path(tempfile.mkdtemp())
    (work / "zoo").mkdir(parents=True, exist_ok=True)
    shape = tuple(int(n) for n in options.shape.split(","))
    scan = work / f"noise-{'x'.join(map(str, shape))}.nii.gz"
    if not scan.exists():
        make_noise(scan, (shape[0], shape[1], shape[2]))
    for classes in (int(n) for n in options.classes.split(",")):
        window, entry = WINDOW[classes], work / "zoo" / f"random-{classes}"
        if not (entry / "SHA256SUMS").exists():
            make_entry(work / "zoo", classes=classes, multiplier=MULTIPLIER, window=window, overlap=OVERLAP)
        for name, command in contenders(entry, scan, classes, work, options).items():
            if options.contender and name not in options.contender:
                continue
            run = watched(command, work, int(options.peer_limit_gib * GIB) if name == MONAI else None)
            run |= {"contender": name, "classes": classes, "window": window, "shape": list(shape)}
            run |= origin()
            run["labels_sha256"] = digest(labels_path(work, classes, name)) if run["fits"] else None
            print(json.dumps(run), flush=True)
            result = read("peak_memory") or {"title": TITLE, "runs": []}  # now: another call may have added to it
            same = (run["contender"], classes, run["shape"])
            result["runs"] = [r for r in result["runs"] if (r["contender"], r["classes"], r["shape"]) != same] + [run]
            write("peak_memory", result)
    print("\n".join(report.peak_memory(read("peak_memory") or {"runs": []})))


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="keeps scans and networks between calls")
    parser.add_argument("--shape", default="512,512,600")
    parser.add_argument("--classes", default="3,14,118")
    parser.add_argument("--max-ram", default="4G")
    parser.add_argument("--contender", action="append", help="repeatable; all by default")
    parser.add_argument("--peer-limit-gib", type=float, default=10.0)
    parser.add_argument("--engine", default="openvino")
    return parser.parse_args()


def contenders(entry: Path, scan: Path, classes: int, work: Path, options: Any) -> dict[str, list[str]]:
    """Return name -> command line."""

    def ours(name: str, *more: str) -> list[str]:
        program = [str(Path(sys.executable).parent / "dints-deploy"), "segment", str(scan), "--model", entry.name]
        out = labels_path(work, classes, name)
        return [*program, "--json", "--engine", options.engine, "-o", str(out), *more]

    state, out = work / "zoo" / f"{entry.name}.state.pt", labels_path(work, classes, MONAI)
    size = ["--classes", str(classes), "--multiplier", str(MULTIPLIER), "--window", str(WINDOW[classes])]
    torch_path = [sys.executable, "-m", "benchmarks.torch_path", "monai", str(scan), str(state), str(out), *size]
    alone = [sys.executable, "-m", "benchmarks.alone", str(entry), "--engine", options.engine, "--windows", "1"]
    return {
        BASELINE: alone,
        OURS: ours(OURS),
        f"{BOUND} {options.max_ram}": ours(BOUND, "--max-ram", options.max_ram),
        MONAI: [*torch_path, "--overlap", str(OVERLAP)],
    }


def labels_path(work: Path, classes: int, name: str) -> Path:
    """Return where a contender writes its labels."""
    return work / f"{classes}-{''.join(c if c.isalnum() else '_' for c in name.split(' --max')[0])}.nii.gz"


def watched(command: list[str], work: Path, limit_bytes: int | None) -> dict[str, Any]:
    """Run a command and return its peak and seconds; stop it where it holds more than the limit."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'search'}", "DINTS_ZOO": str(work / "zoo")}
    begin, peak, stopped = time.perf_counter(), 0, False
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=said)
        while process.poll() is None:
            held, most = resident_and_peak(process.pid)
            peak = max(peak, most)
            if limit_bytes is not None and held > limit_bytes and not stopped:
                process.kill()
                stopped = True
            time.sleep(POLL_SECONDS)
        run: dict[str, Any] = {"peak_bytes": peak, "seconds": time.perf_counter() - begin}
        out.seek(0)
        said.seek(0)
        text = out.read()
        if stopped:
            return {**run, "fits": False}
        if process.returncode:
            return {**run, "fits": False, "error": said.read().strip().splitlines()[-1]}
    told = json.loads(text[text.index("{") :])
    if "cases" not in told:
        return {**run, "fits": True}
    plan = told["cases"][0]["plan"]
    planned = {"blocks": plan["blocks"], "windows_again": plan["windows_again"], "planned_bytes": plan["peak_bytes"]}
    return {**run, "fits": True, **planned}


def resident_and_peak(pid: int) -> tuple[int, int]:
    """Return VmRSS and VmHWM of a process (proc(5)); zeros where it has ended."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(lines["VmRSS"].split()[0]) * 1024, int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return 0, 0


def digest(path: Path) -> str | None:
    """Return the digest of a contender's labels, where it wrote some."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


if __name__ == "__main__":
    main()
