"""What INT8 forms of a network lose and gain: the convolutions they leave in floating point, and what else they do.

    python -m benchmarks.int8_forms [--entry hippocampus] [--ends 1,1 --ends 3,3 ...] [--rounds 5]

`--ends F,L`: F convolutions from the input and L to the output stay. Each form is made for OpenVINO and compared on the
entry's own windows and on hostile ones; contenders take turns. Prints a table and writes
benchmarks/results/int8_forms_<entry>.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

from benchmarks.machine import write
from dints_deploy.catalog.catalog import load_entry
from dints_deploy.runtime.engine import Session, available_threads, build_engine
from dints_deploy.runtime.export import proofs_of
from dints_deploy.runtime.int8_forms import Int8Form
from dints_deploy.runtime.parity import compare, hostile_windows, run_windows
from dints_deploy.runtime.quantise import to_int8

ENDS = ("3,3", "2,1", "1,1")
KINDS = {
    "signed, outputs too": {"outputs": True},
    "unsigned, outputs too": {"outputs": True, "unsigned": True},
    "signed": {},
    "unsigned": {"unsigned": True},
}
COLUMNS = ["quantised", "ends", "labels off, of 10 000", "hostile, %", "mean logit error", "median s", "MB"]


def main() -> None:
    """Make the forms, compare, time, print, write."""
    options = arguments()
    entry = load_entry(options.entry)
    spec, proof = entry.spec, proofs_of(entry)[0]
    engine = build_engine("openvino", "cpu", options.threads)

    def opened(network: bytes, precision: str) -> Session:
        return engine.open(network, window=spec.window, batch=1, precision=precision, why="a benchmark")

    hostile = hostile_windows(proof.windows.shape[1:])
    harsh = run_windows(opened(proof.onnx, "fp32"), hostile)
    sessions, compared, sizes = [], [], []
    for kind, settings in KINDS.items():
        for ends in options.ends or ENDS:
            first, last = (int(n) for n in ends.split(","))
            form = Int8Form((first, last), plain_norms=True, **settings)
            network = to_int8(proof.onnx, proof.calibration, form)
            session = opened(network, "int8")
            found = compare(session, spec, proof.sha256, real=(proof.windows, proof.logits), hostile=(hostile, harsh))
            off, odd = 1 - found.label_agreement, 1 - found.hostile_label_agreement
            compared.append([kind, ends, f"{1e4 * off:.2f}", f"{100 * odd:.2f}", f"{found.mean_abs_logit:.3f}"])
            sizes.append(f"{len(network) / 1e6:.1f}")
            sessions.append(session)
    medians = [f"{seconds:.3f}" for seconds in in_turns(sessions, proof.windows[:1], options.rounds)]
    rows = [[*row, median, size] for row, median, size in zip(compared, medians, sizes, strict=True)]
    for row in (COLUMNS, *rows):
        print("  ".join(text.rjust(12) for text in row))
    title = f"Forms of INT8: {spec.name}"
    command = " ".join(["python -m benchmarks.int8_forms", *sys.argv[1:]])
    table = {"columns": COLUMNS, "rows": rows}
    write(f"int8_forms_{spec.name}", {"title": title, "command": command, "tables": [table]})


def in_turns(sessions: list[Session], window: Any, rounds: int) -> list[float]:
    """Return each session's median seconds for a window, run twice in a row: the second one counts."""
    seconds: list[list[float]] = [[] for _ in sessions]
    for _ in range(rounds):
        for session, taken in zip(sessions, seconds, strict=True):
            session.result(session.submit(window))  # brings its weights back into the cache
            begin = time.perf_counter()
            session.result(session.submit(window))
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken) for taken in seconds]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entry", default="hippocampus")
    parser.add_argument("--ends", action="append", metavar="F,L", help="repeatable")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=available_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
