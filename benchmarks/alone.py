"""An entry's engine alone: seconds per window with nothing around it, the floor under a whole scan.

Beside it the processor's own peak, by a large matrix product in float32: what no engine in fp32 can go far beyond.

python -m benchmarks.alone ENTRY_FOLDER [--engine openvino] [--precision fp32] [--windows 8] [--product]
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from pathlib import Path

import numpy as np

from benchmarks.product import peak_gmac_per_second
from dints_deploy.catalog.catalog import load_entry
from dints_deploy.runtime.engine import Batch, Handle, Session
from dints_deploy.runtime.sessions import open_sessions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry", type=Path)
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--of", type=int, default=1000, help="windows of the run that they stand for")
    parser.add_argument("--product", action="store_true", help="measure the matrix product too")
    parser.add_argument("--threads", type=int, help="all by default")
    options = parser.parse_args()
    entry = load_entry(options.entry)
    (session,) = open_sessions(
        entry, windows=options.of, engine=options.engine, precision=options.precision, threads=options.threads
    )
    rng = np.random.default_rng(0)
    window = rng.uniform(size=(1, len(entry.spec.channels), *entry.spec.window)).astype(np.float32)
    run_all(session, [window] * session.under_way)  # warms up
    begin = time.perf_counter()
    run_all(session, [window] * options.windows)
    told = {"seconds_per_window": (time.perf_counter() - begin) / options.windows}
    if options.product:  # last: it takes memory that the engine alone does not
        told["peak_gmac_per_second"] = peak_gmac_per_second()
    print(json.dumps(told))


def run_all(session: Session, windows: list[Batch]) -> None:
    """Run windows as a scan's are run: as many submitted at a time."""
    waiting: deque[Handle] = deque()
    for window in windows:
        waiting.append(session.submit(window))
        if len(waiting) == session.under_way:
            session.result(waiting.popleft())
    while waiting:
        session.result(waiting.popleft())


if __name__ == "__main__":
    main()
