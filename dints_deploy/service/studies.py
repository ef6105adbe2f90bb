"""Judge studies that come in, and seal what is complete: a revision of the study, and a job for each of its routes.

A late slice makes another revision, whose jobs supersede the earlier ones; what arrives again unchanged makes none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dints_deploy.config.delivery import Route
from dints_deploy.dicom.instance import Instance
from dints_deploy.dicom.series import Study, opened
from dints_deploy.errors import DintsError, ScanRefused
from dints_deploy.service.audit import record
from dints_deploy.service.fault import reach
from dints_deploy.service.intake import SHORT
from dints_deploy.service.model import Evidence, RouteMatch, StudyFacts, Verdict
from dints_deploy.service.objects import object_path
from dints_deploy.service.store import Row, Store

LOGGER: Final = logging.getLogger(__name__)

FAULT_S: Final = 60.0
"""Before a study is judged again that could not be judged by a fault of the software."""

AGAIN_S: Final = 0.05
"""Least time between two judgements of a study."""

Judge = Callable[[Evidence, float], Verdict]
Ask = Callable[[Sequence[str], str], Mapping[str, int]]
FactsOf = Callable[[Study, Sequence[str], Sequence[str]], StudyFacts]
Choose = Callable[[StudyFacts], Sequence[RouteMatch]]


@dataclass(frozen=True)
class Rules:
    """How studies are judged and routed: the edges' functions, bound to a configuration.

    Attributes:
        judge: evidence and time -> verdict.
        ask: the senders and a StudyInstanceUID -> SeriesInstanceUID -> number of instances.
        facts_of: a collected study, doors and senders -> what routes are chosen by.
        choose: facts -> which routes take the study.
        routes: by name.
    """

    judge: Judge
    ask: Ask
    facts_of: FactsOf
    choose: Choose
    routes: Mapping[str, Route]


def judge_due(store: Store, data_dir: Path, rules: Rules) -> float | None:
    """Judge every study whose time has come; return when the next one is due."""
    while (study := store.row("due_study", {"now": store.clock.now()})) is not None:
        try:
            _judge(store, data_dir, rules, study)
        except DintsError:
            raise
        except Exception:  # one study that cannot be judged must not keep the others waiting
            LOGGER.exception(
                "a study cannot be judged", extra={"action": "judge_failed", "study": study["key"][:SHORT]}
            )
            _later(store, study, store.clock.now() + FAULT_S, "it could not be judged: see the log")
    row = store.row("next_due_study")
    return None if row is None else row[0]


def _judge(store: Store, data_dir: Path, rules: Rules, study: Row) -> None:
    evidence = evidence_of(store, study)
    verdict = rules.judge(evidence, store.clock.now())
    if verdict.ask and evidence.instances:
        counts = rules.ask(evidence.calling, evidence.instances[0].StudyInstanceUID)
        verdict = rules.judge(replace(evidence, counts=counts), store.clock.now())
    if verdict.complete:
        _complete(store, data_dir, rules, study, verdict)
    else:
        _later(store, study, max(verdict.again_s, store.clock.now() + AGAIN_S), verdict.reason)


def _later(store: Store, study: Row, due_s: float, reason: str) -> None:
    values = {"id": study["id"], "changes": study["changes"], "due": due_s, "reason": reason}
    store.run("judge_later", values)


def evidence_of(store: Store, study: Row) -> Evidence:
    """Return what is known about a study."""
    values = {"study": study["id"]}
    associations = {row["state"]: row["number"] for row in store.rows("study_associations", values)}
    return Evidence(
        instances=tuple(_instances(store, study)),
        last_arrival_s=study["arrived_s"],
        open_associations=associations.get("open", 0),
        aborted_associations=associations.get("aborted", 0),
        calling=tuple(sorted({row["calling"] for row in store.rows("senders", values)} - {""})),
        revision=study["revision"],
    )


def _instances(store: Store, study: Row) -> list[Instance]:
    if study["kind"] == "nifti":
        return []
    rows = store.rows("content", {"study": study["id"], "revision": None})
    return [_instance(json.loads(row["header"])) for row in rows]


def _instance(fields: dict[str, Any]) -> Instance:
    """Return the header record that was stored as JSON, which knows no tuples."""
    known: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Instance(**known)


def _complete(store: Store, data_dir: Path, rules: Rules, study: Row, verdict: Verdict) -> None:
    """Choose the routes of a complete study, outside the transaction, and seal it."""
    facts = _facts(store, data_dir, rules, study)
    matches = rules.choose(facts)
    reach("seal-before")
    routes = [rules.routes[match.route] for match in matches if match.taken]
    if seal(store, study, verdict.reason, routes):
        reach("seal-after")
        about = {"action": "study_complete", "study": study["key"][:SHORT], "reason": verdict.reason}
        LOGGER.info("a study is complete", extra=about | {"routes": ", ".join(route.name for route in routes)})


def _facts(store: Store, data_dir: Path, rules: Rules, study: Row) -> StudyFacts:
    senders = store.rows("senders", {"study": study["id"]})
    doors = sorted({row["door"] for row in senders})
    calling = sorted({row["calling"] for row in senders} - {""})
    if study["kind"] == "dicom":
        rows = store.rows("content", {"study": study["id"], "revision": None})
        files = [object_path(data_dir, row["sha256"]) for row in rows if row["stored"]]
        with contextlib.suppress(ScanRefused), opened(files) as collected:
            return rules.facts_of(collected, doors, calling)
        return StudyFacts("dicom", tuple(doors), tuple(calling), ())
    return StudyFacts("nifti", tuple(doors), tuple(calling), ())


def seal(store: Store, study: Row, reason: str, routes: Sequence[Route]) -> bool:
    """Seal a study in one transaction; return whether nothing had arrived since it was judged.

    New content makes a revision and supersedes the jobs of earlier ones. The same content through another door makes
    jobs for routes that are new to it, and nothing else.
    """
    with store.transaction():
        if store.run("seal_study", {"id": study["id"], "changes": study["changes"], "reason": reason}) == 0:
            return False
        content = store.rows("content", {"study": study["id"], "revision": None})
        if not content:
            return True
        digest = hashlib.sha256("\n".join(sorted(row["sha256"] for row in content)).encode()).hexdigest()
        number = study["revision"]
        known = store.row("revision", {"study": study["id"], "number": number})
        if known is None or known["digest"] != digest:
            number += 1
            _add_revision(store, study, number, digest, reason, len(content))
        for route in routes:
            _add_job(store, study, number, digest, route, expired=not all(row["stored"] for row in content))
    return True


def _add_revision(store: Store, study: Row, number: int, digest: str, reason: str, objects: int) -> None:
    values = {"study": study["id"], "number": number, "digest": digest, "reason": reason, "at": store.clock.stamp()}
    store.run("add_revision", values)
    store.run("stamp_instances", values)
    store.run("stamp_study", values)
    name = (study["id"], study["key"][:SHORT])
    record(store, "complete", study=name, revision=number, content=digest, objects=objects, reason=reason)
    for job in store.rows("jobs_to_supersede", values):
        store.run("supersede_job", {"id": job["id"], "now": store.clock.now(), "at": store.clock.stamp()})
        store.run("cancel_deliveries", {"job": job["id"], "at": store.clock.stamp()})
        record(store, "superseded", study=name, job=job["id"], by_revision=number, was=job["state"])


def _add_job(store: Store, study: Row, revision: int, digest: str, route: Route, *, expired: bool) -> None:
    job = job_id(study["key"], digest, route)
    if store.row("job_of_route", {"study": study["id"], "revision": revision, "route": route.name}) is not None:
        return
    before = store.row("result_before", {"study": study["id"], "revision": revision, "route": route.name})
    values = {
        "id": job,
        "study": study["id"],
        "revision": revision,
        "route": route.name,
        "entry": route.entry,
        "outputs": json.dumps(route.outputs),
        "send_refusals": route.send_refusals,
        "priority": route.priority,
        "supersedes": None if before is None else before["id"],
        "state": "quarantined" if expired else "queued",
        "code": "objects-expired" if expired else "",
        "message": "expected every object of the study, found some removed: send it again, then retry" * expired,
        "now": store.clock.now(),
        "at": store.clock.stamp(),
    }
    store.run("add_job", values)
    for destination in route.destinations:
        store.run("add_delivery", {"job": job, "destination": destination})
    name = (study["id"], study["key"][:SHORT])
    record(store, "queued", study=name, job=job, revision=revision, route=route.name, entry=route.entry)


def job_id(study: str, content: str, route: Route) -> str:
    """Return the name of a job: a digest of what it does to what."""
    parts = (study, content, route.name, route.entry, *route.outputs)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]
