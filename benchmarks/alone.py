"""An entry's engine alone: seconds per window with nothing around it, the floor under a whole scan.

python -m benchmarks.alone ENTRY_FOLDER [--engine openvino] [--precision fp32] [--windows 6]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from dints_deploy.catalog.catalog import load_entry
from dints_deploy.runtime.sessions import open_sessions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry", type=Path)
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--windows", type=int, default=6)
    options = parser.parse_args()
    entry = load_entry(options.entry)
    (session,) = open_sessions(entry, windows=1000, engine=options.engine, precision=options.precision)
    rng = np.random.default_rng(0)
    window = rng.uniform(size=(1, len(entry.spec.channels), *entry.spec.window)).astype(np.float32)
    seconds = []
    for _ in range(options.windows + 1):  # the first warms up
        begin = time.perf_counter()
        session.result(session.submit(window))
        seconds.append(time.perf_counter() - begin)
    print(json.dumps({"seconds_per_window": statistics.median(seconds[1:])}))


if __name__ == "__main__":
    main()
