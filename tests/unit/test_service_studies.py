"""Revisions: one result for each content and route; late slices supersede, what comes again unchanged does nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dints_deploy.files import sha256_file
from dints_deploy.service.model import Evidence, Verdict
from dints_deploy.service.outbox import deliver_next
from dints_deploy.service.queue import Claimed, Produced, claim, finish
from dints_deploy.service.retention import retain
from dints_deploy.service.retry import Policy
from tests.service import Bench, retention, taken

POLICY = Policy(attempts=3, first_s=1.0)


def do_next(bench: Bench) -> Claimed:
    """Claim, finish and deliver the next job."""
    job = claim(bench.store)
    assert job is not None
    name = f"{job.id}.seg.dcm"
    folder = bench.folder / "results" / job.id
    folder.mkdir()
    (folder / name).write_bytes(b"result")
    assert finish(bench.store, job, Produced({name: sha256_file(folder / name)}))
    while deliver_next(bench.store, bench.folder, "pacs", taken, POLICY):
        pass
    return job


def test_a_late_slice_makes_a_new_revision_that_supersedes_the_old_result(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.take(1)
    bench.judge()
    first = do_next(bench)
    bench.take(2)
    bench.judge()
    assert bench.jobs() == [(1, "all", "superseded"), (2, "all", "queued")]
    second = do_next(bench)
    assert second.supersedes == first.id
    assert len(second.inputs) == 2
    assert bench.jobs() == [(1, "all", "superseded"), (2, "all", "done")]


def test_a_result_that_never_went_out_is_not_named_as_the_predecessor(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.take(1)
    bench.judge()
    bench.take(2)
    bench.judge()
    assert sorted(bench.rows("SELECT state FROM delivery")) == [("cancelled",), ("pending",)]
    assert do_next(bench).supersedes is None


def test_a_worker_whose_study_grew_cannot_bring_its_result_in(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.take(1)
    bench.judge()
    job = claim(bench.store)
    assert job is not None
    bench.take(2)
    bench.judge()
    assert not finish(bench.store, job, Produced({"a": "b"}))
    assert bench.jobs() == [(1, "all", "superseded"), (2, "all", "queued")]


def test_the_same_study_again_by_another_association_changes_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for number in (1, 2):
        bench.take(number)
    bench.judge()
    do_next(bench)
    before = bench.jobs(), bench.actions()
    for number in (1, 2):
        bench.take(number, association="a2")
    bench.judge()
    assert (bench.jobs(), bench.actions()) == before


def test_the_same_study_through_another_door_makes_a_job_for_its_route_only(tmp_path: Path) -> None:
    bench = Bench(tmp_path, routes=("liver", "head"))
    rules = bench.rules(doors={"LIVER": ["liver"], "HEAD": ["head"]})
    bench.take(1, door="LIVER")
    bench.judge(rules)
    assert bench.jobs() == [(1, "liver", "queued")]
    do_next(bench)
    bench.take(1, door="HEAD")
    bench.judge(rules)
    assert bench.jobs() == [(1, "head", "queued"), (1, "liver", "done")]


def test_what_arrives_while_a_study_is_judged_voids_the_judgement(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.take(1)

    def judge(evidence: Evidence, now_s: float) -> Verdict:
        if len(evidence.instances) == 1:
            bench.take(2)
        return Verdict(True, "too early")

    bench.judge(bench.rules(judge=judge))
    assert bench.jobs() == []
    bench.judge()
    assert bench.jobs() == [(1, "all", "queued")]
    assert bench.rows("SELECT count(*) FROM instance WHERE revision = 1") == [(2,)]


def test_the_judge_is_told_what_is_known(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    seen: list[Evidence] = []

    def judge(evidence: Evidence, now_s: float) -> Verdict:
        seen.append(evidence)
        return Verdict(False, "wait", again_s=now_s + 100)

    bench.take(1, association="a1")
    bench.take(2, association="a2", calling="MR2")
    bench.take(3, association="a3")
    bench.intake.association_closed("a1", clean=True)
    bench.intake.association_closed("a2", clean=False)
    bench.judge(bench.rules(judge=judge))
    (evidence,) = seen
    assert [one.InstanceNumber for one in evidence.instances] == [1, 2, 3]
    assert evidence.instances[0].ImagePositionPatient == (0.0, 0.0, 1.0)
    assert (evidence.open_associations, evidence.aborted_associations) == (1, 1)
    assert evidence.calling == ("MR1", "MR2")
    bench.judge(bench.rules(judge=judge))
    assert len(seen) == 1  # not before the time it named
    bench.intake.association_closed("a3", clean=True)
    bench.judge(bench.rules(judge=judge))
    assert seen[-1].open_associations == 0


def test_the_sender_is_asked_when_the_judge_says_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    asked: list[tuple[Any, ...]] = []

    def judge(evidence: Evidence, now_s: float) -> Verdict:
        return Verdict(evidence.counts == {"1.2.3.1": 1}, "counts", again_s=now_s + 9, ask=evidence.counts is None)

    def ask(calling: Any, study: str) -> dict[str, int]:
        asked.append((calling, study))
        return {"1.2.3.1": 1}

    bench.take(1)
    bench.judge(bench.rules(judge=judge, ask=ask))
    assert asked == [(("MR1",), "1.2.3")]
    assert bench.jobs() == [(1, "all", "queued")]


def test_one_study_that_cannot_be_judged_does_not_keep_others_waiting(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def judge(evidence: Evidence, now_s: float) -> Verdict:
        if evidence.instances[0].StudyInstanceUID == "6.6.6":
            raise ZeroDivisionError
        return Verdict(True, "fine")

    bench.take(1, study="6.6.6")
    bench.take(1, study="1.2.3")
    bench.judge(bench.rules(judge=judge))
    assert len(bench.jobs()) == 1
    assert bench.rows("SELECT reason FROM study WHERE state = 'receiving'") == [
        ("it could not be judged: see the log",)
    ]


def test_a_study_that_no_route_takes_is_complete_and_stays_known(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.take(1)
    bench.judge(bench.rules(choose=lambda facts: []))
    assert bench.jobs() == []
    assert bench.rows("SELECT state, revision FROM study") == [("complete", 1)]


def test_a_late_slice_of_a_study_whose_objects_expired_waits_for_an_operator(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.take(1)
    bench.judge()
    do_next(bench)
    bench.time.seconds += 10 * 86400
    retain(bench.store, tmp_path, retention(objects_days=7), bench.intake.remove_objects, 0)
    assert list((tmp_path / "objects").glob("*/*")) == []
    assert bench.take(1).outcome == "duplicate"  # it comes again: known, and stored again
    bench.judge()
    assert bench.jobs() == [(1, "all", "done")]
    retain(bench.store, tmp_path, retention(objects_days=7), bench.intake.remove_objects, 0)
    bench.time.seconds += 10 * 86400
    retain(bench.store, tmp_path, retention(objects_days=7), bench.intake.remove_objects, 0)
    bench.take(2)
    bench.judge()
    assert bench.jobs() == [(1, "all", "superseded"), (2, "all", "quarantined")]
    assert bench.rows("SELECT code FROM job WHERE revision = 2") == [("objects-expired",)]


EVENTS = st.lists(st.sampled_from(["new", "again", "judge", "work", "start", "deliver"]), max_size=25)


@settings(max_examples=25, deadline=None)
@given(events=EVENTS)
def test_whatever_the_order_there_is_one_current_result_of_all_that_arrived(tmp_path_factory: Any, events: Any) -> None:
    bench = Bench(tmp_path_factory.mktemp("order"))
    arrived, held = 0, []
    for event in [*events, "judge", "work"]:
        if event == "new" or (event == "again" and arrived == 0):
            arrived += 1
            bench.take(arrived)
        elif event == "again":
            bench.take(1)
        elif event == "judge":
            bench.judge()
        elif event == "start" and (job := claim(bench.store)) is not None:
            held.append(job)
        elif event == "work":
            while bench.rows("SELECT 1 FROM job WHERE state = 'queued'"):
                do_next(bench)
            for job in held:
                finish(bench.store, job, Produced({}, refusal=("scan-shape", "too few")))
            held = []
    jobs = bench.rows("SELECT revision, state FROM job ORDER BY revision")
    (study,) = bench.rows("SELECT revision, state FROM study") or [(0, "complete")]
    assert study[1] == "complete"
    assert [revision for revision, _ in jobs] == list(range(1, study[0] + 1))
    assert all((state == "superseded") == (revision < study[0]) for revision, state in jobs)
    assert {state for revision, state in jobs if revision == study[0]} <= {"done", "refused"}
    content = bench.rows("SELECT count(*) FROM instance WHERE revision <= ?", study[0])
    assert content == [(arrived,)]
    bench.store.close()
