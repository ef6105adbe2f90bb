"""Bring each fault upon a running daemon that hospitals know, and note what happens beside what was expected.

    python -m benchmarks.daemon_faults [--only WORD]

Every fault gets a daemon of its own in a process, real ports and real files. Crashes, hangs and hunger of a model are
brought about at the worker's named fault points; the wall clock is moved by a preloaded library (needs a C compiler),
the full disk is a small tmpfs (needs root). Writes benchmarks/results/daemon_faults.json, from which
`python -m benchmarks.report` makes docs/reliability.md.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.dicom_fuzz import damage
from benchmarks.machine import write
from dints_deploy.errors import DeliveryError
from tests.command import good_scan
from tests.daemons import Archive, Site, archive, site, study
from tests.peers import free_port, wait_until
from tests.small_disk import fill, small_disk

MOVED_CLOCK: Final = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
static long shift(void) {
  FILE *file = fopen(getenv("SHIFT_FILE"), "r");
  long seconds = 0;
  if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
  return seconds;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  int result = real(clock, now);
  if (clock == CLOCK_REALTIME) now->tv_sec += shift();
  return result;
}
"""
"""A library that moves the wall clock of one process, and no other clock, by the seconds that a file says."""


@dataclass(frozen=True)
class Outcome:
    """What happened, in one sentence, and whether it is what was expected."""

    happened: str
    good: bool


@dataclass(frozen=True)
class Fault:
    """One fault: what is expected, and what brings it about."""

    expected: str
    bring: Callable[[Path], Outcome]


@contextmanager
def up(folder: Path, *, environment: dict[str, str] | None = None, **changes: Any) -> Iterator[Site]:
    """Run a daemon on a site of its own."""
    place = site(folder / "site", **changes)
    place.environment = environment or {}
    place.start()
    try:
        yield place
    finally:
        place.stop(signal.SIGKILL)


def to_pacs(port: int, **more: Any) -> dict[str, Any]:
    """Return the fields of a configuration whose only destination is a DICOM port."""
    destination = {
        "kind": "dicom", "name": "results", "host": "127.0.0.1", "port": port, "ae_title": "PACS",
        "calling_ae_title": "DINTS", "timeout_seconds": 2.0, **more,
    }  # fmt: skip
    return {"destinations": [destination]}


def states(place: Site) -> str:
    return ", ".join(f"{number} {state}" for state, number in sorted(place.states().items()))


def delivery(place: Site) -> tuple[str, int, str]:
    """Return state, attempts and reason code of the only delivery."""
    ((state, attempts, code),) = place.rows("SELECT state, attempts, code FROM delivery")
    return str(state), int(attempts), str(code)


# the PACS


def pacs_down(folder: Path) -> Outcome:
    port = free_port()
    with up(folder, **to_pacs(port)) as place:
        place.send(study(folder, 1))
        wait_until(lambda: bool(place.rows("SELECT 1 FROM delivery WHERE attempts >= 3")), seconds=60)
        state, attempts, code = delivery(place)
        with archive(folder, port=port) as pacs:
            place.wait_done(1)
            wait_until(lambda: len(pacs.uids()) == 1)
        said = f"{attempts} attempts failed with `{code}` ({state}); delivered once it was back"
        return Outcome(said, pacs.repeated() == 0)


def _answering(folder: Path, status: int, *, good: Callable[[Site, Archive], Outcome]) -> Outcome:
    with archive(folder) as pacs, up(folder, **to_pacs(pacs.port)) as place:
        pacs.answer = status
        place.send(study(folder, 1))
        wait_until(lambda: bool(place.states()) and "receiving" not in place.states(), seconds=60)
        return good(place, pacs)


def pacs_out_of_resources(folder: Path) -> Outcome:
    def then(place: Site, pacs: Archive) -> Outcome:
        wait_until(lambda: delivery(place)[1] >= 2, seconds=60)
        code = delivery(place)[2]
        pacs.answer = 0
        place.wait_done(1)
        return Outcome(f"tried again after `{code}`, delivered when it took it", len(pacs.uids()) == 1)

    return _answering(folder, 0xA700, good=then)


def pacs_refuses(folder: Path) -> Outcome:
    def then(place: Site, pacs: Archive) -> Outcome:
        wait_until(lambda: "quarantined" in place.states(), seconds=60)
        code = delivery(place)[2]
        pacs.answer = 0
        ((job,),) = place.rows("SELECT id FROM job")
        retried = place.run("jobs", "retry", job).returncode
        place.wait_done(1)
        return Outcome(f"in quarantine with `{code}`; delivered after `jobs retry`", retried == 0)

    return _answering(folder, 0xA900, good=then)


def pacs_hangs(folder: Path) -> Outcome:
    with archive(folder) as pacs, up(folder, **to_pacs(pacs.port)) as place:
        pacs.delay_s = 4.0
        place.send(study(folder, 1))
        wait_until(lambda: bool(place.rows("SELECT 1 FROM delivery WHERE attempts > 0")), seconds=60)
        code = delivery(place)[2]
        pacs.delay_s = 0.0
        place.wait_done(1)
        time.sleep(4.0)  # what it was still at
        same = not pacs.contradictions()
        return Outcome(
            f"given up after 2 s with `{code}`, delivered later; {pacs.repeated()} repeats, same bytes", same
        )


def pacs_aborts(folder: Path) -> Outcome:
    """A port that takes a connection and closes it in the middle, until it is replaced by one that works."""
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as broken, up(folder, **to_pacs(port)) as place:
        broken.settimeout(0.2)
        place.send(study(folder, 1))
        cut = 0
        end = time.monotonic() + 60
        while time.monotonic() < end and cut < 3:
            try:
                connection, _ = broken.accept()
            except TimeoutError:
                continue
            connection.recv(64)
            connection.close()
            cut += 1
        wait_until(lambda: bool(place.rows("SELECT 1 FROM delivery WHERE attempts >= 3")), seconds=60)
        code = delivery(place)[2]
        broken.close()
        with archive(folder, port=port):
            place.wait_done(1)
    return Outcome(f"{cut} connections cut, `{code}` each time; delivered when it held", cut == 3)


# disk, clock, database


def disk_full(folder: Path) -> Outcome:
    with small_disk(folder / "disk", kilobytes=6000) as disk:
        (disk / "site").mkdir()
        with up(disk, disk={"free_bytes": 1_000_000}) as place:
            place.send(study(folder / "a", 1))
            place.wait_done(1)
            filler = fill(disk)
            time.sleep(1.0)
            refused = ""
            try:
                place.send(study(folder / "b", 2))
            except DeliveryError as error:
                refused = error.code
            alive = place.process is not None and place.process.poll() is None
            filler.unlink()
            time.sleep(6.0)
            place.send(study(folder / "b", 2))
            place.wait_done(2)
            ready = place.stop() == 0
        log_says = "0xA700" if refused else "nothing"
    return Outcome(f"sender told {log_says} (`{refused}`), daemon alive; taken and done after space was made",
                   bool(refused) and alive and ready)  # fmt: skip


def quota_reached(folder: Path) -> Outcome:
    with up(folder, disk={"free_bytes": 0, "quota_bytes": 10_000}) as place:
        studies = [study(folder / str(number), number) for number in range(4)]
        refused = sum(not _taken(place, files) for files in studies)
        wait_until(lambda: _settled(place), seconds=60)
        ((held,),) = place.rows("SELECT sum(size_bytes) FROM instance")
        place.configure(disk={"free_bytes": 0})
        if place.process is not None:
            place.process.send_signal(signal.SIGHUP)
        wait_until(lambda: '"reloaded"' in place.log.read_text())
        again = sum(_taken(place, files) for files in studies)
        place.wait_done(4)
        whole = place.rows(
            "SELECT count(*) FROM study WHERE (SELECT count(*) FROM instance WHERE study_id = study.id) = 4"
        )
    said = f"{refused} of 4 senders refused at {held} of 10000 bytes; all 4 studies whole and done after it was raised"
    return Outcome(said, refused > 0 and held <= 10_000 and again == 4 and whole == [(4,)])


def _taken(place: Site, files: list[Path]) -> bool:
    try:
        place.send(files)
    except DeliveryError:
        return False
    return True


def clock_jumps(folder: Path) -> Outcome:
    source, library, shift = folder / "shift.c", folder / "shift.so", folder / "shift"
    folder.mkdir(exist_ok=True)
    source.write_text(MOVED_CLOCK)
    shift.write_text("0")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    environment = {"LD_PRELOAD": str(library), "SHIFT_FILE": str(shift)}
    with up(folder, environment=environment) as place:
        for number, seconds in enumerate((0, 10 * 365 * 86400, -10 * 365 * 86400, 3600, -3600)):
            shift.write_text(str(seconds))
            place.send(study(folder / str(number), number))
            place.wait_done(number + 1)
        ((first, last),) = place.rows("SELECT min(created_at), max(created_at) FROM job")
        kept = place.rows("SELECT count(*) FROM instance WHERE stored")[0][0]
        verified = place.run("audit", "verify").returncode == 0
    said = f"5 studies done in turn, stamped from {first[:4]} to {last[:4]}; no object expired, trail unbroken"
    return Outcome(said, verified and kept == 20 and int(last[:4]) - int(first[:4]) >= 20)


def corrupt_page(folder: Path) -> Outcome:
    with up(folder) as place:
        for number in range(3):
            place.send(study(folder / str(number), number, planes=20))
        place.wait_done(3)
        place.stop()
        database = place.data_dir / "appliance.sqlite"
        before = database.read_bytes()
        damaged = bytearray(before)
        page = 4096
        damaged[6 * page : 6 * page + page] = random.Random(0).randbytes(page)
        database.write_bytes(damaged)
        said = place.run("watch")
        database.write_bytes(before)
        place.start()
        works = place.process is not None and place.process.poll() is None
    named = "store-corrupt" in said.stderr and str(database) in said.stderr
    return Outcome(f"exit {said.returncode}, `store-corrupt` with file and page; works again with the backup",
                   said.returncode == 1 and named and works)  # fmt: skip


def second_daemon(folder: Path) -> Outcome:
    with up(folder) as place:
        said = place.run("watch")
        place.send(study(folder, 1))
        place.wait_done(1)
    return Outcome(f"exit {said.returncode}, `daemon-running` with the process's number; the first one works on",
                   said.returncode == 1 and "daemon-running" in said.stderr)  # fmt: skip


# the model


def _troubled(folder: Path, fault: str, code: str, **worker: Any) -> Outcome:
    """Run two jobs with a worker that fails on its first task each time, then without."""
    fields = {"attempts": 2, "retry_seconds": 0.2} | worker
    place = site(folder / "site")
    place.configure(worker=place.fields["worker"] | fields)
    place.start(DINTS_FAULT=fault)
    try:
        place.send(study(folder, 1))
        wait_until(lambda: "quarantined" in place.states(), seconds=120, what="quarantine")
        ((found, attempts),) = place.rows("SELECT code, attempts FROM job")
        daemon = place.process is not None and place.process.poll() is None
        place.stop()
        place.start()
        ((job,),) = place.rows("SELECT id FROM job")
        place.run("jobs", "retry", job)
        place.wait_done(1)
    finally:
        place.stop(signal.SIGKILL)
    said = f"only the worker ended; `{found}` after {attempts} attempts, then quarantine; done after `jobs retry`"
    return Outcome(said, found == code and daemon and attempts == 2)


def model_crashes(folder: Path) -> Outcome:
    return _troubled(folder, "work-inputs:1:kill", "worker-crashed")


def model_hangs(folder: Path) -> Outcome:
    return _troubled(folder, "work-inputs:1:hang", "worker-hung", job_seconds=5.0)


def model_hungry(folder: Path) -> Outcome:
    return _troubled(folder, "work-inputs:1:grow", "worker-memory", memory_bytes=1 << 30)


# the folder


@contextmanager
def watching(folder: Path, **changes: Any) -> Iterator[tuple[Site, Path]]:
    """Run a daemon that watches a folder; scans of it become NIfTI, DICOM becomes SEG."""
    inbox = folder / "inbox"
    inbox.mkdir(parents=True)
    place = site(folder / "site")
    (route,) = place.fields["routes"]
    scans = route | {"name": "scans", "outputs": ["nifti"]}
    watched = {"path": str(inbox), "scan_seconds": 0.5, "settle_seconds": 1.0}
    titles = [{"ae_title": "DINTS", "callers": ["*"], "routes": ["all"]}]
    listener = place.fields["listeners"][0] | {"titles": titles}
    place.configure(routes=[route, scans], folders=[watched | changes], listeners=[listener])
    place.start()
    try:
        yield place, inbox
    finally:
        place.stop(signal.SIGKILL)


def junk_files(folder: Path, *, count: int = 10_000) -> Outcome:
    rng = random.Random(0)
    with watching(folder, routes=["scans"]) as (place, inbox):
        for number in range(count):
            name = rng.choice(("a{}.txt", "b{}.dcm", "c{}.nii", "d{}.nii.gz", "{}", "e{}.zip")).format(number)
            (inbox / name).write_bytes(rng.randbytes(rng.choice((0, 3, 200, 5000))))
        good_scan(inbox, "good.nii.gz")
        begin = time.monotonic()
        place.wait_done(1, seconds=300)
        taken = place.rows("SELECT count(*) FROM instance")[0][0]
        rss = _rss_mb(place)
    said = f"{count} passed over, the scan among them done after {time.monotonic() - begin:.0f} s; {rss} MB resident"
    return Outcome(said, taken == 1)


def links_outside(folder: Path) -> Outcome:
    outside = folder / "outside"
    outside.mkdir(parents=True)
    secret = good_scan(outside, "secret.nii.gz")
    with watching(folder, routes=["scans"]) as (place, inbox):
        (inbox / "link.nii.gz").symlink_to(secret)
        (inbox / "folder").symlink_to(outside)
        good_scan(inbox, "good.nii.gz")
        place.wait_done(1)
        time.sleep(3.0)
        names = {row[0] for row in place.rows("SELECT name FROM instance")}
    return Outcome(f"taken: {', '.join(sorted(names))}; no link followed", names == {"good.nii.gz"})


def half_copied(folder: Path) -> Outcome:
    with watching(folder, routes=["scans"]) as (place, inbox):
        data = good_scan(folder, "whole.nii.gz").read_bytes()
        with (inbox / "slow.nii.gz").open("wb") as file:
            for part in range(8):
                file.write(data[part * len(data) // 8 : (part + 1) * len(data) // 8])
                file.flush()
                time.sleep(1.7 if part == 3 else 0.4)  # once it looks settled, and is not whole
        place.wait_done(1)
        ((size,),) = place.rows("SELECT size_bytes FROM instance")
    return Outcome(f"taken once, with all {size} bytes", size == len(data))


def many_studies(folder: Path, *, count: int = 200) -> Outcome:
    with watching(folder, routes=["all"]) as (place, inbox):
        for number in range(count):
            study(inbox / str(number), number)
        begin = time.monotonic()
        place.wait_done(count, seconds=900)
        delivered = len(place.delivered())
        seconds = time.monotonic() - begin
    said = f"{delivered} of {count} results, {seconds / count:.2f} s a study; {_quarantined(place)} in quarantine"
    return Outcome(said, delivered == count)


def hostile_dicom(folder: Path, *, count: int = 300) -> Outcome:
    rng = random.Random(0)
    with watching(folder, routes=["all"]) as (place, inbox):
        for number in range(count):
            files = study(folder / "made", number % 10)
            target = inbox / f"h{number}"
            target.mkdir()
            for file in files:
                data = file.read_bytes()
                (target / file.name).write_bytes(damage(data, rng) if rng.random() < 0.5 else data)
        for file in study(folder / "made", 999):
            (inbox / f"good-{file.name}").write_bytes(file.read_bytes())
        wait_until(lambda: _settled(place), seconds=600, what="everything to settle")
        alive = place.process is not None and place.process.poll() is None
        restarts = place.log.read_text().count('"ready"') - 1
        codes = place.rows("SELECT code, count(*) FROM job GROUP BY code ORDER BY 2 DESC")
        objects = place.rows("SELECT role, count(*) FROM instance GROUP BY role")
    said = (
        f"{count} studies with damaged objects: {', '.join(f'{n} {role}' for role, n in objects)}; jobs: "
        + ", ".join(f"{n} `{code or 'done'}`" for code, n in codes)
        + f"; daemon restarts: {restarts}"
    )
    unfit = {"worker-crashed", "worker-failed", "worker-hung"} & {code for code, _ in codes}
    return Outcome(said, alive and restarts == 0 and not unfit)


def hostile_network(folder: Path) -> Outcome:
    rng = random.Random(0)
    with up(folder) as place:
        for _ in range(200):
            with socket.create_connection(("127.0.0.1", place.port), timeout=5) as one:
                one.sendall(
                    rng.choice((b"\1\0", b"\4\0", b"GET / HTTP/1.0\r\n", b"")) + rng.randbytes(rng.randint(0, 4000))
                )
        begin = time.monotonic()
        files = study(folder, 1)
        wait_until(lambda: _taken(place, files), seconds=60)
        seconds = time.monotonic() - begin
        place.wait_done(1)
        objects = place.rows("SELECT count(*) FROM instance")[0][0]
    return Outcome(f"200 connections of noise; the study after them taken within {seconds:.0f} s", objects == 4)


def _settled(place: Site) -> bool:
    found = place.states()
    return bool(found) and not found.keys() & {"receiving", "queued", "running", "delivering"} and _quiet(place)


def _quiet(place: Site) -> bool:
    """Say whether nothing arrived for a while."""
    before = place.rows("SELECT count(*) FROM instance")
    time.sleep(4.0)
    return before == place.rows("SELECT count(*) FROM instance") and "receiving" not in place.states()


def _quarantined(place: Site) -> int:
    return place.states().get("quarantined", 0)


def _rss_mb(place: Site) -> int:
    pages = Path(f"/proc/{place.process.pid}/statm").read_text().split()[1] if place.process else "0"
    return int(pages) * 4096 >> 20


FAULTS: Final[dict[str, Fault]] = {
    "PACS down for a while": Fault("the delivery waits, longer each time, and goes out when it is back", pacs_down),
    "PACS out of resources": Fault("tried again until it takes it", pacs_out_of_resources),
    "PACS refuses the object": Fault("no second attempt by itself: quarantine with a code", pacs_refuses),
    "PACS hangs": Fault("given up after the timeout, tried again with the same bytes", pacs_hangs),
    "PACS aborts mid-transfer": Fault("tried again until it holds", pacs_aborts),
    "disk full": Fault("senders are told 0xA700, the daemon lives, all goes on when there is room", disk_full),
    "quota reached": Fault("no more is taken; what was taken is done", quota_reached),
    "clock jumps by years and hours": Fault("nothing waits, expires or repeats because of it", clock_jumps),
    "corrupt database page": Fault("the daemon refuses to start and names file and page", corrupt_page),
    "second daemon on the data folder": Fault("it refuses to start and says so", second_daemon),
    "model crashes": Fault("only the worker ends; retried, then quarantined; the daemon lives", model_crashes),
    "model hangs in native code": Fault("ended after its time; retried, then quarantined", model_hangs),
    "model out of memory": Fault("ended at its limit; retried, then quarantined", model_hungry),
    "10 000 junk files in the folder": Fault("passed over; a scan among them is done", junk_files),
    "links that point outside": Fault("not followed", links_outside),
    "half-copied files": Fault("taken once, when whole", half_copied),
    "200 studies at once": Fault("each gets its result, none is lost", many_studies),
    "hostile DICOM": Fault("each object or study ends with a code; no crash of daemon or worker", hostile_dicom),
    "noise on the DICOM port": Fault("connections closed; the next study is taken", hostile_network),
}  # fmt: skip


def main() -> None:
    """Run, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose name has this word")
    options = parser.parse_args()
    rows, bad = [], 0
    for name, fault in FAULTS.items():
        if options.only not in name:
            continue
        folder = Path(tempfile.mkdtemp(prefix="daemon-fault-"))
        try:
            outcome = fault.bring(folder)
        except Exception as error:  # noqa: BLE001  one fault that ends badly must not hide the others
            outcome = Outcome(f"{type(error).__name__}: {str(error)[:300]}", good=False)
        shutil.rmtree(folder, ignore_errors=True)
        bad += not outcome.good
        rows.append([name, fault.expected, outcome.happened, "yes" if outcome.good else "NO"])
        print(f"{'as expected' if outcome.good else 'NOT AS EXPECTED'}: {name}: {outcome.happened}", flush=True)
    table = {"columns": ["fault", "expected", "happened", "as expected"], "rows": rows}
    if not options.only:
        write("daemon_faults", {"page": "reliability", "title": "Faults", "tables": [table]})
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
