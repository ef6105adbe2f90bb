"""Send many studies through one daemon: does its memory stay flat?

    python -m benchmarks.daemon_long [--studies 2000] [--senders 3]

Small studies arrive by C-STORE, are segmented with a network of one convolution and delivered to a folder. Resident
memory of the daemon and of its worker is read along the way.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.machine import write
from dints_deploy.service.supervise import resident_bytes
from tests.daemons import Site, daemon, study
from tests.peers import wait_until

BACKLOG: Final = 10
"""Studies under way above which the senders wait."""

LOOKS: Final = 20
"""Times that the memory is read."""

GROWTH: Final = 0.05
"""Of the memory, from the middle to the end, that still counts as flat."""


def run(folder: Path, *, studies: int, senders: int) -> dict[str, Any]:
    """Send the studies and return what was seen."""
    begin = time.monotonic()
    with daemon(folder / "site") as place:
        threads = [
            threading.Thread(target=_send, args=(place, folder, range(n, studies, senders)), daemon=True)
            for n in range(senders)
        ]
        for thread in threads:
            thread.start()
        looks = list(_watch(place, studies))
        for thread in threads:
            thread.join()
        place.wait_done(studies, seconds=300)
        looks.append(_look(place))
        delivered = len(place.delivered())
        status = place.stop()
    half = [look for look in looks if look["studies"] >= studies / 2]
    grown = {who: half[-1][who] / max(1, half[0][who]) - 1 for who in ("daemon MB", "worker MB")}
    return {
        "looks": looks,
        "flat": status == 0 and delivered == studies and max(grown.values()) < GROWTH,
        "facts": {
            "studies": studies,
            "results delivered": delivered,
            **{f"growth of {who[:-3]}'s memory over the second half": f"{share:+.1%}" for who, share in grown.items()},
            "seconds": round(time.monotonic() - begin),
        },
    }


def _send(place: Site, folder: Path, numbers: range) -> None:
    for number in numbers:
        wait_until(lambda: _under_way(place) < BACKLOG, seconds=300)
        files = study(folder / f"study-{number}", number)
        place.send(files)
        shutil.rmtree(folder / f"study-{number}")


def _under_way(place: Site) -> int:
    return sum(number for state, number in place.states().items() if state != "done")


def _watch(place: Site, studies: int) -> Any:
    """Yield memory and studies done, LOOKS times."""
    for look in range(LOOKS):
        _wait_for(place, max(1, studies * look // LOOKS))
        yield _look(place)


def _wait_for(place: Site, done: int) -> None:
    wait_until(lambda: place.states().get("done", 0) >= done, seconds=1200)


def _look(place: Site) -> dict[str, int]:
    workers = place.workers()
    daemon_pid = place.process.pid if place.process else 0
    return {
        "studies": place.states().get("done", 0),
        "daemon MB": resident_bytes(daemon_pid) >> 20,
        "worker MB": max((resident_bytes(pid) for pid in workers), default=0) >> 20,
        "database MB": (place.data_dir / "appliance.sqlite").stat().st_size >> 20,
    }


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--senders", type=int, default=3)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="daemon-long-"))
    found = run(folder, studies=options.studies, senders=options.senders)
    shutil.rmtree(folder)
    for look in found["looks"]:
        print(look)
    for name, value in found["facts"].items():
        print(f"{name}: {value}")
    columns = list(found["looks"][0])
    table = {"about": "Memory along the way:", "columns": columns, "rows": [list(x.values()) for x in found["looks"]]}
    title = "Memory over many studies"
    write("daemon_long", {"page": "reliability", "title": title, "facts": found["facts"], "tables": [table]})
    sys.exit(not found["flat"])


if __name__ == "__main__":
    main()
