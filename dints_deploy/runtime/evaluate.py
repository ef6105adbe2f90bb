"""Measure a network on labelled cases, on each scan's own grid. The hospital and the workshop use the same function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dints_deploy.catalog.dataset import Case, Dataset, read_case
from dints_deploy.catalog.entry import Entry
from dints_deploy.errors import DatasetError, ScanRefused
from dints_deploy.files import sha256_file
from dints_deploy.runtime.accepts import check_accepts
from dints_deploy.runtime.engine import Session
from dints_deploy.runtime.metrics import CaseScores, Summary, score_case, summarise
from dints_deploy.runtime.preprocess import prepare
from dints_deploy.runtime.segment import run


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores per case and their means."""

    cases: dict[str, CaseScores]
    summary: Summary

    def as_dict(self) -> dict[str, Any]:
        """Return everything ready for JSON."""
        return {
            "summary": self.summary.as_dict(),
            "cases": {case: scores.as_dict() for case, scores in self.cases.items()},
        }


def evaluate(
    cases: Sequence[Case],
    spec: Entry,
    sessions: Sequence[Session],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Segment every case and score it against its label.

    Args:
        cases: labelled, with the entry's label values.
        spec: the entry, or what a run would publish.
        sessions: its loaded networks.
        progress: called after every case.

    Raises:
        DatasetError: `case-invalid`, naming the case. ScanRefused: the entry does not accept a
            case; it is named.
    """
    names = {label.value: label.name for label in spec.labels}
    scores: dict[str, CaseScores] = {}
    for number, case in enumerate(cases, start=1):
        scan, reference = read_case(case, names)
        try:
            check_accepts(scan, spec)
            prepared = prepare(scan, spec.preparation)
        except ScanRefused as refusal:
            raise ScanRefused(refusal.code, f"case {case.id}: {refusal.message}") from refusal
        result = run(prepared, spec, sessions)
        scores[case.id] = score_case(
            result.labels.data[0],
            reference.data[0],
            labels=list(names),
            spacing=scan.grid.spacing,
            tolerances=[label.nsd_tolerance for label in spec.labels],
        )
        progress(number, len(cases))
    return Evaluation(scores, summarise(scores))


def check_labels(dataset: Dataset, spec: Entry) -> None:
    """Refuse a dataset whose labels are not the entry's; names may differ, values may not.

    Raises:
        DatasetError: `dataset-invalid`.
    """
    expected = {label.value: label.name for label in spec.labels}
    if set(dataset.labels) != set(expected):
        raise DatasetError(
            "dataset-invalid",
            f"expected the labels of {spec.name} ({expected}), found {dataset.labels} in dataset.json",
        )


def unseen_cases(dataset: Dataset, spec: Entry, fold: int | None) -> tuple[Case, ...]:
    """Return the cases to measure an entry on: a fold's validation part, or all that it was not trained on.

    Raises:
        DatasetError: `cases-seen` when the fold's validation part holds a case the entry was trained on, by id or by
            content, or when nothing is left.
    """
    training = spec.training
    ids, digests = (set(training.cases), set(training.cases.values())) if training else (set(), set())

    def seen(case: Case) -> bool:
        return case.id in ids or sha256_file(case.image) in digests

    if fold is None:
        unseen = tuple(case for case in dataset.cases if not seen(case))
        if not unseen:
            raise DatasetError("cases-seen", f"expected cases that {spec.name} was not trained on, found none")
        return unseen
    _, validation = dataset.fold(fold)
    if known := [case.id for case in validation if seen(case)]:
        raise DatasetError(
            "cases-seen",
            f"{spec.name} was trained on {len(known)} of these cases ({known[0]} ...): choose its fold",
        )
    return validation
