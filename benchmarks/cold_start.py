"""Cold start: one hippocampus scan from a fresh process, against the usual way with torch and MONAI, in one run.

    python -m benchmarks.cold_start [--rounds 5]

Contenders alternate; medians count. Prints a table and writes benchmarks/results/cold_start.json.
"""

from __future__ import annotations

import argparse
import compileall
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np

from benchmarks.machine import ROOT, write
from dints_deploy.catalog.catalog import load_entry

CASE = "hippocampus_038"
SCAN = ROOT / "tests" / "data" / "Task04_Hippocampus" / "imagesTr" / f"{CASE}.nii.gz"
ENTRY = ROOT / "zoo" / "hippocampus"


def contenders(out: Path) -> dict[str, list[str]]:
    """Return name -> command line."""
    ours = [str(Path(sys.executable).parent / "dints-deploy"), "segment", str(SCAN), "--model", "hippocampus"]
    return {
        "dints-deploy (auto)": [*ours, "-o", str(out / "auto.nii.gz")],
        "dints-deploy (openvino)": [*ours, "--engine", "openvino", "-o", str(out / "openvino.nii.gz")],
        "dints-deploy (onnx)": [*ours, "--engine", "onnx", "-o", str(out / "onnx.nii.gz")],
        "torch + MONAI": [
            sys.executable,
            str(ROOT / "benchmarks" / "monai_path.py"),
            str(SCAN),
            str(out / "network.ts"),
            str(out),
            *load_entry(ENTRY).spec.tta,
        ],
    }


def main() -> None:
    """Run, compare the labels, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    compileall.compile_dir(ROOT / "dints_deploy", quiet=1)  # as pip does at an installation, the peers' too
    with tempfile.TemporaryDirectory() as folder:
        commands = contenders(Path(folder))
        traced = [sys.executable, "-m", "benchmarks.torch_network", str(ENTRY), str(Path(folder) / "network.ts")]
        subprocess.run(traced, check=True, capture_output=True, cwd=ROOT)
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "search")}
        for _ in range(rounds):
            for name, command in commands.items():
                begin = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True, env=environment)
                seconds[name].append(time.perf_counter() - begin)
        theirs = np.asarray(nibabel.load(next(Path(folder).glob("*_monai.nii.gz"))).dataobj).squeeze()
        ours = np.asarray(nibabel.load(Path(folder) / "auto.nii.gz").dataobj)
        agreement = float((ours == theirs).mean())
    median = {name: statistics.median(values) for name, values in seconds.items()}
    peer = median["torch + MONAI"]
    print(f"{'contender':<26}{'median s':>10}{'ratio':>8}")
    for name, value in median.items():
        print(f"{name:<26}{value:>10.2f}{peer / value:>8.1f}")
    print(f"labels equal in {agreement:.4%} of voxels")
    write(
        "cold_start",
        {
            "title": "Cold start: one hippocampus scan from a fresh process",
            "rounds": rounds,
            "seconds": seconds,
            "median": median,
            "ratio": {name: peer / value for name, value in median.items()},
            "facts": {"labels equal to the peer's, share of voxels": agreement},
        },
    )


if __name__ == "__main__":
    main()
