"""The queue, deliveries, retries and retention: leases, back-off, poison, several destinations each alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dints_deploy.errors import REASONS, DeliveryError, OutputError, ServiceError, WorkerError
from dints_deploy.files import sha256_file
from dints_deploy.service.deliver import Receipt
from dints_deploy.service.jobs import list_jobs, mark_purged, quarantine_job, retry_job, show_job
from dints_deploy.service.outbox import deliver_next
from dints_deploy.service.queue import LEASE_S, Claimed, Produced, claim, expire, extend, fail, finish, recover, release
from dints_deploy.service.retention import clean_start, orphans, retain
from dints_deploy.service.retry import (
    ANOTHER_TIME,
    DELIVERY_CEILING_S,
    INTERRUPTIONS_PER_ATTEMPT,
    JOB_CEILING_S,
    NOT_THE_JOBS,
    Policy,
    after_failure,
    after_interruption,
    after_refusal,
)
from tests.service import Bench, retention, route, taken

POLICY = Policy(attempts=3, first_s=2.0)
CRASH = WorkerError("worker-crashed", "expected an answer, found none")


def queued(bench: Bench, study: str = "1.2.3", *, destinations: Sequence[str] = ("pacs",), priority: int = 0) -> None:
    """Queue a job of a study of its own."""
    bench.take(1, study=study)
    bench.judge(bench.rules(routes={"all": route("all", *destinations, priority=priority)}))


def claimed(bench: Bench) -> Claimed:
    job = claim(bench.store)
    assert job is not None
    return job


def produced(bench: Bench, job: Claimed, data: bytes = b"result") -> None:
    """Finish a job with one file."""
    folder = bench.folder / "results" / job.id
    folder.mkdir(exist_ok=True)
    (folder / "result.seg.dcm").write_bytes(data)
    assert finish(bench.store, job, Produced({"result.seg.dcm": sha256_file(folder / "result.seg.dcm")}))


def state(bench: Bench) -> str:
    ((found,),) = bench.rows("SELECT state FROM job")
    return str(found)


def deliveries(bench: Bench) -> dict[str, str]:
    return dict(bench.rows("SELECT destination, state FROM delivery"))


class Refusing:
    """A destination that refuses."""

    def __init__(self, code: str = "delivery-unreachable", *, retryable: bool = True) -> None:
        self.error = DeliveryError(code, "expected an answer, found none", retryable=retryable)

    def __call__(self, destination: str, files: Sequence[Path], job: str) -> Receipt:
        raise self.error


def test_higher_priority_goes_first_then_the_older_job(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for study, priority in (("1.1", 0), ("1.2", 5), ("1.3", 0), ("1.4", 5)):
        queued(bench, study, priority=priority)
    order = [claimed(bench).study[0] for _ in range(4)]
    assert order == [2, 4, 1, 3]
    assert claim(bench.store) is None


def test_a_job_has_one_lease_and_only_its_holder_ends_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    queued(bench)
    first = claimed(bench)
    assert claim(bench.store) is None
    assert extend(bench.store, first)
    assert fail(bench.store, first, CRASH, POLICY, crashed=True) == "again"
    bench.time.seconds += 2.0
    second = claimed(bench)
    assert second.lease != first.lease
    assert not extend(bench.store, first)
    assert not finish(bench.store, first, Produced({"a": "b"}))
    assert fail(bench.store, first, CRASH, POLICY, crashed=True) == "lost"
    assert state(bench) == "running"
    produced(bench, second)
    assert state(bench) == "delivering"


def test_failures_wait_longer_each_time_and_end_in_quarantine_with_the_code(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    queued(bench)
    for wait_s in (2.0, 4.0):
        assert fail(bench.store, claimed(bench), CRASH, POLICY, crashed=True) == "again"
        bench.time.seconds += wait_s - 0.5
        assert claim(bench.store) is None
        bench.time.seconds += 0.6
    assert fail(bench.store, claimed(bench), CRASH, POLICY, crashed=True) == "quarantine"
    assert bench.rows("SELECT state, code, crashes FROM job") == [("quarantined", "worker-crashed", 3)]
    assert bench.actions()[-1] == "quarantined"


def test_an_error_that_would_come_again_goes_to_quarantine_at_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    queued(bench)
    error = ServiceError("entry-checksum", "expected other bytes")
    assert fail(bench.store, claimed(bench), error, POLICY, crashed=False) == "quarantine"


def test_what_was_running_when_the_daemon_ended_runs_again_and_counts_as_no_failure(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    queued(bench)
    for _ in range(2):
        claimed(bench)
        bench.reopen()
        assert recover(bench.store, POLICY) == 1
        assert state(bench) == "queued"
    assert fail(bench.store, claimed(bench), CRASH, POLICY, crashed=True) == "again"


def test_a_job_that_always_runs_when_the_daemon_ends_is_put_aside(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    queued(bench)
    for _ in range(POLICY.attempts * INTERRUPTIONS_PER_ATTEMPT):
        bench.time.seconds += JOB_CEILING_S
        claimed(bench)
        recover(bench.store, POLICY)
    assert state(bench) == "quarantined"


def test_a_job_given_back_at_shutdown_counts_as_no_attempt(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    queued(bench)
    release(bench.store, claimed(bench))
    assert bench.rows("SELECT state, attempts FROM job") == [("queued", 0)]


def test_a_job_whose_lease_ran_out_is_taken_by_another(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    queued(bench)
    lost = claimed(bench)
    bench.time.seconds += LEASE_S - 1
    assert expire(bench.store) == 0
    assert extend(bench.store, lost)
    bench.time.seconds += LEASE_S + 1
    assert expire(bench.store) == 1
    assert not extend(bench.store, lost)
    assert claimed(bench).id == lost.id


def test_a_full_disk_is_not_the_jobs_fault(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    queued(bench)
    error = OutputError("disk-full", "expected room, found none")
    for _ in range(POLICY.attempts + 3):
        assert fail(bench.store, claimed(bench), error, POLICY, crashed=False) == "again"
        bench.time.seconds += DELIVERY_CEILING_S
    assert state(bench) == "queued"


def test_a_clock_of_the_wall_that_jumps_moves_no_lease_and_no_retry(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    queued(bench)
    fail(bench.store, claimed(bench), CRASH, POLICY, crashed=True)
    bench.time.seconds, bench.time.name = 3.0, "boot-2"  # the machine was off for a year
    bench.reopen()
    assert claim(bench.store) is None
    bench.time.seconds += 2.0
    assert claim(bench.store) is not None


@given(st.integers(1, 500), st.floats(0.1, 100))
def test_waiting_never_shrinks_and_never_exceeds_the_ceiling(failures: int, first_s: float) -> None:
    endless = Policy(attempts=10_000, first_s=first_s)
    counts = range(1, failures + 2)
    of_jobs = [after_failure("worker-crashed", n, endless).wait_s for n in counts]
    of_deliveries = [after_refusal(n, endless, retryable=True).wait_s for n in counts]
    for waits, ceiling in ((of_jobs, JOB_CEILING_S), (of_deliveries, DELIVERY_CEILING_S)):
        assert waits[0] == min(first_s, ceiling)
        assert all(a <= b <= ceiling for a, b in pairwise(waits))


def test_every_code_that_is_tried_again_exists_and_interruptions_end() -> None:
    assert set(REASONS) >= ANOTHER_TIME | NOT_THE_JOBS
    assert after_interruption(1, POLICY).wait_s == 0.0
    assert after_interruption(POLICY.attempts * INTERRUPTIONS_PER_ATTEMPT, POLICY).act == "quarantine"
    assert after_refusal(1000, POLICY, retryable=True).act == "again"
    assert after_refusal(1, POLICY, retryable=False).act == "quarantine"


def test_each_destination_is_tried_alone_and_the_job_is_done_when_all_have_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    queued(bench, destinations=("down", "up"))
    produced(bench, claimed(bench))
    assert deliver_next(bench.store, tmp_path, "up", taken, POLICY) is not None
    sent = deliver_next(bench.store, tmp_path, "down", Refusing(), POLICY)
    assert sent is not None
    assert sent.code == "delivery-unreachable"
    assert (deliveries(bench), state(bench)) == ({"down": "pending", "up": "sent"}, "delivering")
    assert deliver_next(bench.store, tmp_path, "down", taken, POLICY) is None  # not before its time
    assert deliver_next(bench.store, tmp_path, "up", taken, POLICY) is None  # not twice
    bench.time.seconds += 2.0
    assert deliver_next(bench.store, tmp_path, "down", taken, POLICY) is not None
    assert (deliveries(bench), state(bench)) == ({"down": "sent", "up": "sent"}, "done")


def test_a_refused_delivery_waits_for_an_operator_and_retry_sends_the_stored_file(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    queued(bench)
    job = claimed(bench)
    produced(bench, job)
    deliver_next(bench.store, tmp_path, "pacs", Refusing("delivery-unsupported", retryable=False), POLICY)
    assert bench.rows("SELECT state, code FROM job") == [("quarantined", "delivery-unsupported")]
    assert retry_job(bench.store, job.id[:6]) == "delivering"
    deliver_next(bench.store, tmp_path, "pacs", taken, POLICY)
    assert state(bench) == "done"


def test_a_result_with_other_bytes_than_were_stored_is_never_sent(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    queued(bench)
    job = claimed(bench)
    produced(bench, job)
    (tmp_path / "results" / job.id / "result.seg.dcm").write_bytes(b"rotten")
    sent: list[str] = []

    def send(destination: str, files: Sequence[Path], name: str) -> Receipt:
        sent.append(name)
        return Receipt(destination, ())

    deliver_next(bench.store, tmp_path, "pacs", send, POLICY)
    assert sent == []
    assert bench.rows("SELECT state, code FROM job") == [("quarantined", "object-damaged")]
    assert retry_job(bench.store, job.id) == "queued"  # sending again could not help: it runs again


def test_a_refusal_goes_out_only_where_the_route_asks_for_it(tmp_path: Path) -> None:
    for asked, wanted in ((True, ("delivering", {"pacs": "pending"})), (False, ("refused", {"pacs": "cancelled"}))):
        bench = Bench(tmp_path / str(asked))
        bench.take(1)
        bench.judge(bench.rules(routes={"all": route(send_refusals=asked)}))
        job = claimed(bench)
        finish(bench.store, job, Produced({"result.sr.dcm": "0" * 64}, refusal=("scan-shape", "too few slices")))
        assert (state(bench), deliveries(bench)) == wanted
        assert bench.rows("SELECT code, refused FROM job") == [("scan-shape", 1)]


def test_an_operator_sees_stops_retries_and_removes_a_job(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    queued(bench)
    job = claimed(bench)
    with pytest.raises(ServiceError, match="found it running") as caught:
        mark_purged(bench.store, job.id)
    assert caught.value.code == "job-state"
    quarantine_job(bench.store, job.id)
    assert not extend(bench.store, job)  # the worker loses it
    assert retry_job(bench.store, job.id) == "queued"
    produced(bench, claimed(bench))
    deliver_next(bench.store, tmp_path, "pacs", taken, POLICY)
    shown = show_job(bench.store, job.id)
    assert shown["state"] == "done"
    assert shown["complete_because"] == "said so"
    assert [event["action"] for event in shown["history"]][-2:] == ["delivered", "closed"]
    (line,) = list_jobs(bench.store)
    assert line["id"] == job.id
    mark_purged(bench.store, job.id)
    assert retain(bench.store, tmp_path, retention(), bench.intake.remove_objects, 0) == 1
    assert bench.rows("SELECT 1 FROM study") == []
    assert list((tmp_path / "results").iterdir()) == []
    assert list((tmp_path / "objects").glob("*/*")) == []


@pytest.mark.parametrize("name", ["", "zzz", "0' OR 1=1 --", "*", "[a-z]"])
def test_an_unknown_job_is_named_as_such(name: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    queued(bench, "1.1")
    queued(bench, "1.2")
    with pytest.raises(ServiceError) as caught:
        show_job(bench.store, name)
    assert caught.value.code == "job-unknown"


def test_retention_keeps_what_is_under_way_or_waits_and_what_others_need(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    queued(bench, "1.1")
    produced(bench, claimed(bench))
    deliver_next(bench.store, tmp_path, "pacs", taken, POLICY)
    queued(bench, "1.2")
    fail(bench.store, claimed(bench), ServiceError("entry-invalid", "broken"), POLICY, crashed=False)
    queued(bench, "1.3")
    bench.time.seconds += 40 * 86400
    policy = retention(objects_days=7, results_days=30)
    assert retain(bench.store, tmp_path, policy, bench.intake.remove_objects, 0) == 1
    assert sorted(state for (state,) in bench.rows("SELECT state FROM job")) == ["quarantined", "queued"]
    assert len(list((tmp_path / "objects").glob("*/*"))) == 2
    patient = retention(quarantine_days=30)
    assert retain(bench.store, tmp_path, patient, bench.intake.remove_objects, 0) == 1
    assert bench.rows("SELECT state FROM job") == [("queued",)]


def test_what_a_crash_left_is_removed_at_the_start_and_nothing_else(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    queued(bench)
    produced(bench, claimed(bench))
    (tmp_path / "incoming" / "x.part").write_bytes(b"half")
    (tmp_path / "work" / "lease" / "in").mkdir(parents=True)
    (tmp_path / "objects" / "ab").mkdir(exist_ok=True)
    (tmp_path / "objects" / "ab" / ("ab" + "0" * 62)).write_bytes(b"never acknowledged")
    (tmp_path / "results" / "0123").mkdir()
    assert len(list(orphans(bench.store, tmp_path))) == 4
    assert clean_start(bench.store, tmp_path) == {"scratch": 2, "objects": 1, "results": 1}
    assert list(orphans(bench.store, tmp_path)) == []
    deliver_next(bench.store, tmp_path, "pacs", taken, POLICY)
    assert state(bench) == "done"
