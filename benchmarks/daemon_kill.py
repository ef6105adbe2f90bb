"""Kill the daemon and its workers again and again while studies arrive; count what is lost, doubled, stuck or orphaned.

    python -m benchmarks.daemon_kill [--kills 300] [--seed 0] [--keep FOLDER]

Two senders push studies by C-STORE all the time and repeat what was not acknowledged; every third study gets its last
slice later, in another association, and every fourth is sent twice. Half of the turns aim at a named point of
`dints_deploy.service.fault`, the one that was hit least, until each was hit three times; the others kill a worker, the
daemon or both at a random time. Results go to a folder and to a DICOM port. At the end the daemon runs undisturbed
until nothing is under way, and everything is compared: what was acknowledged, what the database knows, what lies on
disk, what arrived.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import write
from dints_deploy.dicom.bounded import quiet
from dints_deploy.dicom.instance import identify
from dints_deploy.errors import DintsError
from dints_deploy.files import sha256_file
from dints_deploy.service.audit import verify_trail
from dints_deploy.service.fault import POINTS
from dints_deploy.service.jobs import mark_purged, open_existing
from dints_deploy.service.retention import orphans
from tests.daemons import Archive, Site, archive, site, study

IN_WORKER = frozenset({"work-start", "work-inputs", "work-end"})
EACH = 3
"""Hits of every named point before a run of many kills may end."""

BACKLOG = 6
"""Studies under way above which the senders wait."""


class Violation(Exception):  # noqa: N818  what this looks for
    """Something was lost, doubled, stuck or orphaned."""


@dataclass
class Senders:
    """Studies on their way to the daemon, and what of them it acknowledged.

    Attributes:
        whole: key of a study -> SOPInstanceUIDs, all acknowledged; nothing more of it will be sent.
        purged: keys of studies that were asked to be removed.
    """

    site: Site
    folder: Path
    seed: int
    whole: dict[str, frozenset[str]] = field(default_factory=dict)
    purged: set[str] = field(default_factory=set)
    errors: Counter[str] = field(default_factory=Counter)
    stopping: threading.Event = field(default_factory=threading.Event)
    paused: threading.Event = field(default_factory=threading.Event)
    started: int = 0

    def run(self, which: int, step: int) -> None:
        """Send study after study until told to stop; the one that is under way is finished."""
        rng = random.Random(f"{self.seed}-{which}")
        number = which
        while not self.stopping.is_set():
            if self.paused.is_set():
                time.sleep(0.05)
                continue
            self._one(number, rng)
            number += step

    def _one(self, number: int, rng: random.Random) -> None:
        files = study(self.folder / f"study-{number}", number)
        self.started += 1
        late = files[-1:] if number % 3 == 0 else []
        self._insist(files[: len(files) - len(late)])
        if late:
            time.sleep(rng.uniform(0.0, 1.5))
            self._insist(late)
        if number % 4 == 0:
            self._insist(files)
        with quiet():
            instances = [identify(file) for file in files]
        key = hashlib.sha256(f"dicom\n{instances[0].StudyInstanceUID}".encode()).hexdigest()
        self.whole[key] = frozenset(instance.SOPInstanceUID for instance in instances)
        shutil.rmtree(self.folder / f"study-{number}")

    def _insist(self, files: list[Path]) -> None:
        """Send files until every one is acknowledged."""
        while True:
            try:
                self.site.send(files, seconds=5.0)
                return
            except DintsError as error:
                self.errors[error.code] += 1
                time.sleep(0.1)


@dataclass
class Kills:
    """What was killed.

    Attributes:
        done: by victim and place.
    """

    done: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(POINTS, 0)))

    def next_point(self, rng: random.Random) -> str:
        """Return one of the named points that were hit least."""
        least = min(self.hits.values())
        return rng.choice([point for point, hits in self.hits.items() if hits == least])

    @property
    def total(self) -> int:
        return sum(self.done.values())


def run(folder: Path, *, kills: int, seed: int) -> dict[str, Any]:
    """Kill so many times and return the tally; raise `Violation` with the first thing that is not as it must be."""
    rng = random.Random(seed)
    begin = time.monotonic()
    with archive(folder / "pacs") as pacs:
        place = _site(folder, pacs)
        senders = Senders(place, folder / "outbound", seed)
        threads = [threading.Thread(target=senders.run, args=(which, 2), daemon=True) for which in range(2)]
        done = Kills()
        each = EACH if kills >= EACH * len(POINTS) else 0
        place.start()
        for thread in threads:
            thread.start()
        try:
            while done.total < kills or min(done.hits.values()) < each:
                _throttle(place, senders)
                _kill_once(place, rng, senders, done)
                if done.total % 10 == 0:
                    _purge_one(place, senders)
            senders.stopping.set()
            senders.paused.clear()
            _settle(place, threads)
            waited = place.stop()
            must(waited == 0, f"the daemon ended with {waited} when told to stop")
        finally:
            senders.stopping.set()
            place.stop(signal.SIGKILL)
        tally = check(place, pacs, senders.whole, senders.purged)
    facts = {"seed": seed, "kills": done.total, **dict(sorted(done.done.items()))}
    times = {"seconds": round(time.monotonic() - begin), "sends that had to be repeated": sum(senders.errors.values())}
    return facts | tally | times


def _site(folder: Path, pacs: Archive) -> Site:
    destination = {
        "kind": "dicom", "name": "pacs", "host": "127.0.0.1", "port": pacs.port, "ae_title": "PACS",
        "calling_ae_title": "DINTS", "timeout_seconds": 5.0,
    }  # fmt: skip
    place = site(folder / "site")
    (route,) = place.fields["routes"]
    place.configure(
        routes=[route | {"destinations": ["results", "pacs"]}],
        destinations=[*place.fields["destinations"], destination],
        worker=place.fields["worker"] | {"attempts": 1000, "retry_seconds": 0.1},
        completeness={"settled_seconds": 0.2, "released_seconds": 0.2, "quiet_seconds": 1.0},
    )
    return place


def _throttle(place: Site, senders: Senders) -> None:
    """Let the senders wait while the daemon has enough to do."""
    states = place.states()
    under_way = sum(number for state, number in states.items() if state not in ("done", "superseded"))
    (senders.paused.set if under_way > BACKLOG else senders.paused.clear)()


def _kill_once(place: Site, rng: random.Random, senders: Senders, done: Kills) -> None:
    if rng.random() < 0.5:
        point = done.next_point(rng)
        if point == "purge-rows" and not _purge_one(place, senders):
            return
        _kill_at(place, point, rng.randint(1, 3) if done.hits[point] else 1, done)
        return
    time.sleep(rng.uniform(0.0, 1.2))
    victim = rng.choice(("daemon", "worker", "both"))
    if victim != "daemon":
        workers = place.workers()
        for pid in workers:
            _kill_process(pid)
        if victim == "worker":
            done.done["worker, at a random time"] += len(workers)
            return
    place.stop(signal.SIGKILL)
    done.done[f"{victim}, at a random time"] += 1
    place.start()


def _kill_at(place: Site, point: str, nth: int, done: Kills) -> None:
    """Start the daemon anew with a fault set, and wait until it hits; then start it without."""
    place.stop(signal.SIGKILL)
    done.done["daemon, at a random time"] += 1
    size = place.log.stat().st_size
    process = place.start(DINTS_FAULT=f"{point}:{nth}:kill")
    end = time.monotonic() + 6.0
    while time.monotonic() < end and process.poll() is None:
        if point in IN_WORKER and _workers_ended(place.log, size):
            break
        time.sleep(0.05)
    where = "worker" if point in IN_WORKER else "daemon"
    hit = _workers_ended(place.log, size) > 0 if where == "worker" else process.poll() is not None
    if hit:
        done.done[f"{where}, at {point}"] += 1
        done.hits[point] += 1
    if process.poll() is None:
        place.stop(signal.SIGKILL)
        done.done["daemon, at a random time"] += 1
    place.process = None
    place.start()


def _workers_ended(log: Path, offset: int) -> int:
    with log.open("rb") as file:
        file.seek(offset)
        return file.read().count(b'"worker_ended"')


def _purge_one(place: Site, senders: Senders) -> bool:
    """Ask for one finished study to be removed; say whether there was one."""
    rows = place.rows(
        "SELECT s.key, max(j.id) FROM study s JOIN job j ON j.study_id = s.id WHERE s.state = 'complete'"
        " AND NOT s.purge GROUP BY s.id HAVING sum(j.state NOT IN ('done', 'superseded')) = 0 ORDER BY s.id"
    )
    rows = [row for row in rows if row[0] in senders.whole]
    if rows:
        store = open_existing(place.data_dir)
        try:
            mark_purged(store, rows[0][1])
        finally:
            store.close()
        senders.purged.add(rows[0][0])
    return bool(rows)


def _settle(place: Site, threads: list[threading.Thread]) -> None:
    """Let the senders finish and the daemon work off everything, undisturbed."""
    for thread in threads:
        thread.join(timeout=120)
        must(not thread.is_alive(), "a sender could not finish its study")
    end = time.monotonic() + 180
    while (left := place.states()).keys() - {"done", "superseded"} or place.rows("SELECT 1 FROM study WHERE purge"):
        must(time.monotonic() < end, f"stuck: {left}\n{place.log.read_text()[-4000:]}")
        time.sleep(0.2)


def must(true: bool, otherwise: str) -> None:
    """Raise `Violation` where something is not as it must be."""
    if not true:
        raise Violation(otherwise)


def _kill_process(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def check(place: Site, pacs: Archive, whole: dict[str, frozenset[str]], purged: set[str]) -> dict[str, Any]:
    """Compare everything that must agree, and return how much there was of it."""
    studies = _check_studies(place, whole, purged)
    jobs = place.rows("SELECT id, study_id, revision, state, files, attempts, interruptions, crashes FROM job")
    revisions = Counter((study_id, revision) for _, study_id, revision, *_ in jobs)
    must(set(revisions.values()) <= {1}, "a revision has two jobs")
    current = dict(place.rows("SELECT id, revision FROM study"))
    for name, study_id, revision, state, *_ in jobs:
        must((state == "done") == (revision == current[study_id]), f"job {name} of revision {revision} is {state}")
    _check_deliveries(place, pacs, jobs)
    store = open_existing(place.data_dir)
    try:
        must(not (left := list(orphans(store, place.data_dir))), f"orphans: {left}")
    finally:
        store.close()
    head = verify_trail(place.data_dir, Path(place.fields["audit_anchor"]))
    return {
        "studies": studies,
        "studies removed on request": len(purged),
        "revisions": len(revisions),
        "results delivered twice with the same bytes": pacs.repeated(),
        "attempts": sum(job[5] for job in jobs),
        "attempts that the daemon's end cut off": sum(job[6] for job in jobs),
        "attempts that a worker's end cut off": sum(job[7] for job in jobs),
        "audit lines": head.seq,
        "lost, doubled, stuck, orphaned": 0,
    }


def _check_studies(place: Site, whole: dict[str, frozenset[str]], purged: set[str]) -> int:
    """Every acknowledged instance is known, of its study, with its bytes on disk."""
    here: dict[str, set[str]] = {}
    instances = "SELECT s.key, uid, sha256, role FROM instance i JOIN study s ON s.id = i.study_id"
    for key, uid, digest, role in place.rows(instances):
        here.setdefault(key, set()).add(uid)
        must(role == "content", f"an object became {role}")
        path = place.data_dir / "objects" / digest[:2] / digest
        must(sha256_file(path) == digest, f"object {digest} is damaged")
    expected = {key: set(uids) for key, uids in whole.items() if key not in purged}
    must(here == expected, f"expected {len(expected)} whole studies, found {len(here)}, or parts")
    return len(whole)


def _check_deliveries(place: Site, pacs: Archive, jobs: list[tuple[Any, ...]]) -> None:
    """Every current result is at every destination, once, with the bytes that were stored."""
    sent: dict[str, set[str]] = {}
    for job, destination, state in place.rows("SELECT job_id, destination, state FROM delivery"):
        if state == "sent":
            sent.setdefault(job, set()).add(destination)
    arrived = place.delivered()
    for job, _, _, state, files, *_ in jobs:
        if state != "done":
            continue
        must(sent[job] == {"results", "pacs"}, f"job {job} is done, but only {sent[job]} have it")
        stored = json.loads(files)
        must({path.name: sha256_file(path) for path in arrived[job]} == stored, f"other files of {job} arrived")
        at_pacs = [pacs.has(place.data_dir / "results" / job / name) for name in stored]
        must(all(at_pacs), f"files of {job} did not reach the DICOM port")
    must(not (doubled := pacs.contradictions()), f"an instance came with other bytes: {doubled}")
    audit = place.data_dir / "audit" / "audit.jsonl"
    events = Counter(
        (event["job"], event["destination"])
        for event in map(json.loads, audit.read_text().splitlines())
        if event["action"] == "delivered"
    )
    must(set(events.values()) <= {1}, "a delivery was noted twice")


def main() -> None:
    """Run, print and write the tally."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="an empty folder to work in, kept")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="daemon-kill-"))
    folder.mkdir(parents=True, exist_ok=True)
    tally = run(folder, kills=options.kills, seed=options.seed)
    for name, value in tally.items():
        print(f"{name}: {value}")
    if options.keep is None:
        shutil.rmtree(folder)
    write("daemon_kill", {"page": "reliability", "title": "Kills", "facts": tally})
    sys.exit(0)


if __name__ == "__main__":
    main()
