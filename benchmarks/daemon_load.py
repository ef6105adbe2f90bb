"""How fast objects come in, against DCMTK's storescp and Orthanc, and what the daemon adds to a study.

    python -m benchmarks.daemon_load [--instances 240] [--rounds 5] [--studies 10]

CT objects of 512x512 are sent by 1 and by 8 `dcmsend` to each receiver in turn, in one run; only ours makes every
object durable before it answers. The order changes from round to round, and what one left to be written is written
before the next begins. Then studies are sent one after the other, and the time from the last slice to the
result in a folder is taken, without the engine's seconds and the configured silence. Writes
benchmarks/results/daemon_load.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.machine import write as write_result
from tests.daemons import Site, daemon, study
from tests.dicom_phantoms import straight, write
from tests.peers import free_port, orthanc, running, wait_until

SENDERS = (1, 8)
OURS = "dints-deploy watch"
SETTLED_SECONDS = 0.3
"""The silence that the studies of the overhead must keep."""


@dataclass(frozen=True)
class Receiver:
    """A running receiver: its port, and how many objects it holds."""

    port: int
    count: Callable[[], int]


@contextmanager
def ours(folder: Path) -> Iterator[Receiver]:
    """Run the daemon with a route that takes none of these objects."""
    never = {"name": "never", "entry": "bright", "destinations": ["results"], "series": [{"modality": ["XX"]}]}
    with daemon(folder, routes=[never]) as site:
        yield Receiver(site.port, lambda: int(site.rows("SELECT count(*) FROM instance")[0][0]))


@contextmanager
def storescp(folder: Path) -> Iterator[Receiver]:
    """Run DCMTK's storescp, which makes a process for each association."""
    (folder / "out").mkdir(parents=True)
    port = free_port()
    with running("storescp", "--fork", "--output-directory", folder / "out", port, port=port):
        yield Receiver(port, lambda: len(list((folder / "out").iterdir())))


@contextmanager
def orthanc_here(folder: Path) -> Iterator[Receiver]:
    """Run Orthanc as Debian configures it."""
    with orthanc(folder) as one:
        yield Receiver(one.dicom_port, lambda: int(one.get("statistics")["CountInstances"]))


RECEIVERS = {OURS: ours, "storescp --fork": storescp, "Orthanc": orthanc_here}


def push(folders: Sequence[Path], port: int) -> float:
    """Send each folder by a dcmsend of its own, all at once; return seconds."""
    begin = time.perf_counter()
    words = ["dcmsend", "-aet", "CT1", "-aec", "DINTS", "127.0.0.1", str(port), "+sd"]
    senders = [subprocess.Popen([*words, str(folder)]) for folder in folders]
    if codes := [code for sender in senders if (code := sender.wait())]:
        raise RuntimeError(f"expected every sender to end with 0, found {codes}")
    return time.perf_counter() - begin


def scans(folder: Path, instances: int) -> dict[int, list[Path]]:
    """Write CT objects for 1 and for 8 senders, all different; return the folders by number of senders."""
    chance = np.random.default_rng(0)
    found: dict[int, list[Path]] = {}
    for senders in SENDERS:
        found[senders] = [folder / f"{senders}-{number}" for number in range(senders)]
        for part in found[senders]:
            planes = instances // senders
            pixels = chance.integers(0, 4000, (planes, 512, 512)).astype(np.uint16)
            write(part, straight(planes=planes, pixels=pixels), name=part.name)
    return found


def intake(folder: Path, instances: int, rounds: int) -> dict[str, dict[int, list[float]]]:
    """Return instances per second: receiver -> senders -> one figure for each round."""
    sources = scans(folder / "scans", instances)
    rates: dict[str, dict[int, list[float]]] = {name: {senders: [] for senders in SENDERS} for name in RECEIVERS}
    names = list(RECEIVERS)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for senders in SENDERS:
                rate = measure(name, folder / "receiver", sources[senders], instances // senders * senders)
                rates[name][senders].append(rate)
                print(f"{name}, {senders} senders: {rate:.0f}/s", flush=True)
    return rates


def measure(name: str, place: Path, folders: Sequence[Path], sent: int) -> float:
    """Return the instances per second of one receiver, once it holds them all."""
    os.sync()
    with RECEIVERS[name](place) as receiver:
        seconds = push(folders, receiver.port)
        wait_until(lambda: receiver.count() == sent, what=f"{name}: {sent} objects")
    shutil.rmtree(place)
    return sent / seconds


def overhead(folder: Path, studies: int) -> list[float]:
    """Return seconds from the last slice to the result, without engine and silence, of one study after the other."""
    with daemon(folder / "overhead") as site:
        found = [added(site, folder / f"study-{number}", number) for number in range(studies + 1)]
    return found[1:]  # the first one starts the worker


def added(site: Site, folder: Path, number: int) -> float:
    """Send one study and return what the daemon adds to it."""
    paths = study(folder, number, planes=40, size=48)
    before = engine_seconds(site)
    site.send(paths)
    begin = time.perf_counter()
    wait_until(lambda: len(site.delivered()) == number + 1, seconds=120, what="the result")
    took = time.perf_counter() - begin
    site.wait_done(number + 1)
    return took - (engine_seconds(site) - before) - SETTLED_SECONDS


def engine_seconds(site: Site) -> float:
    """Return the seconds that the daemon spent in the network since its start."""
    with urllib.request.urlopen(f"http://127.0.0.1:{site.http_port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [sample for family in families for sample in family.samples]
    wanted = ("dints_deploy_stage_seconds_sum", {"stage": "engine"})
    return sum(sample.value for sample in samples if (sample.name, sample.labels) == wanted)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=240, help="objects for each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--studies", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="daemon-load-") as folder:
        rates = intake(Path(folder), options.instances, options.rounds)
        seconds = overhead(Path(folder), options.studies)
    median = {name: {s: statistics.median(values) for s, values in by.items()} for name, by in rates.items()}
    rows = [
        [
            name,
            *(f"{median[name][s]:.0f}" for s in SENDERS),
            *(f"{median[OURS][s] / median[name][s]:.2f}" for s in SENDERS),
        ]
        for name in RECEIVERS
    ]
    columns = ["receiver", *(f"{s} senders" for s in SENDERS), *(f"ours / it, {s} senders" for s in SENDERS)]
    for line in (columns, *rows):
        print("  ".join(f"{cell:>22}" for cell in line))
    print(f"overhead per study: median {statistics.median(seconds):.2f} s, most {max(seconds):.2f} s")
    write_result(
        "daemon_load",
        {
            "title": "The daemon under load: 512x512 CT objects per second, and what it adds to a study",
            "instances": options.instances,
            "rates": {name: {str(s): values for s, values in by.items()} for name, by in rates.items()},
            "overhead_seconds": seconds,
            "tables": [{"columns": columns, "rows": rows}],
            "facts": {
                "objects in each measurement, rounds": f"{options.instances}, {options.rounds}; medians count",
                "durable before the answer": "ours; the others leave the bytes to the system's cache",
                "overhead per study, median and most, seconds": f"{statistics.median(seconds):.2f}, {max(seconds):.2f}",
                "what the overhead is": "last slice to the SEG in a folder, 40 slices, without engine and silence",
            },
        },
    )


if __name__ == "__main__":
    main()
