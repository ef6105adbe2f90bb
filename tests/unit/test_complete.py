"""Completeness: what counts as evidence, in which order, and what is stored as the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dints_deploy.config.intake import Completeness
from dints_deploy.dicom.instance import Instance
from dints_deploy.service.complete import judge, weigh
from dints_deploy.service.model import Evidence

RULES = Completeness(settled_seconds=2.0, released_seconds=5.0, quiet_seconds=60.0)
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def series(count: int, *, uid: str = "1.2.3", step: float = 2.0, **changes: Any) -> list[Instance]:
    """Return an even stack of slices with instance numbers from 1."""
    return [
        Instance(
            SOPClassUID="1.2.840.10008.5.1.4.1.1.4",
            SOPInstanceUID=f"{uid}.{number}",
            StudyInstanceUID="1.2",
            SeriesInstanceUID=uid,
            TransferSyntaxUID="1.2.840.10008.1.2.1",
            Modality="MR",
            InstanceNumber=number,
            ImageOrientationPatient=AXIAL,
            ImagePositionPatient=(0.0, 0.0, number * step),
            frames=1,
            **changes,
        )
        for number in range(1, count + 1)
    ]


def evidence(instances: Sequence[Instance], **changes: Any) -> Evidence:
    return replace(Evidence(tuple(instances), last_arrival_s=100.0, calling=("MR1",)), **changes)


def test_a_stack_without_gaps_whose_association_was_released_is_complete_when_it_has_settled() -> None:
    full = evidence(series(20))
    early = judge(full, 101.0, RULES)
    assert (early.complete, early.again_s) == (False, 102.0)
    uncounted = judge(full, 102.0, RULES)
    assert (uncounted.complete, uncounted.again_s) == (False, 105.0)
    assert "nobody counts" in uncounted.reason
    late = judge(full, 105.0, RULES)
    assert late.complete
    assert late.reason == "every association was released; 1 series without a gap"


def test_an_open_association_is_waited_for() -> None:
    verdict = judge(evidence(series(20), open_associations=1), 500.0, RULES)
    assert not verdict.complete
    assert verdict.again_s > 500.0


@pytest.mark.parametrize(
    ("instances", "doubt"),
    [
        (series(20)[:9] + series(20)[10:], "gap in its instance numbers"),
        (series(20)[1:], "gap in its instance numbers"),
        (series(20, expected=24), "has 20 of 24 instances"),
        ([replace(one, InstanceNumber=None) for one in series(20)[:9] + series(20)[10:]], "gap between its slices"),
        (series(1), "neither counts nor slices"),
        ([replace(one, ImagePositionPatient=None) for one in series(5)], "neither counts nor slices"),
        (series(20) + series(3, uid="1.2.4")[:1] + series(3, uid="1.2.4")[2:], "gap in its instance numbers"),
    ],
)
def test_without_evidence_only_silence_completes_and_the_doubt_is_stored(
    instances: Sequence[Instance], doubt: str
) -> None:
    waiting = judge(evidence(instances), 103.0, RULES)
    assert (waiting.complete, waiting.again_s) == (False, 160.0)
    assert doubt in waiting.reason
    done = judge(evidence(instances), 160.0, RULES)
    assert done.complete
    assert done.reason.startswith("nothing came for 60 s")
    assert doubt in done.reason


def test_an_aborted_association_makes_a_full_stack_wait() -> None:
    verdict = judge(evidence(series(20), aborted_associations=1), 103.0, RULES)
    assert not verdict.complete
    assert "without being released" in verdict.reason


def test_a_count_in_the_headers_is_enough_where_slices_say_nothing() -> None:
    shuffled = [replace(one, ImagePositionPatient=None, InstanceNumber=None) for one in series(5, expected=5)]
    verdict = judge(evidence(shuffled), 103.0, RULES)
    assert verdict.complete
    assert "with all that their headers count" in verdict.reason


QUERY = {"sender": "MR1", "host": "mr1", "port": 104, "ae_title": "MR1", "calling_ae_title": "DINTS"}
ASKING = Completeness.model_validate({"queries": [QUERY]})


def test_a_sender_that_can_be_asked_is_asked_first_and_its_counts_decide() -> None:
    full = evidence(series(20))
    asked = judge(full, 103.0, ASKING)
    assert (asked.complete, asked.ask) == (False, True)
    assert judge(replace(full, counts={"1.2.3": 20}), 103.0, ASKING).reason.startswith("the sender counts 20 instances")
    short = judge(replace(full, counts={"1.2.3": 20, "1.2.4": 3}), 103.0, ASKING)
    assert not short.complete
    assert "0 of 3" in short.reason
    assert judge(replace(full, counts={"1.2.3": 20, "1.2.4": 3}), 160.0, ASKING).complete
    assert judge(replace(full, counts={}), 110.0, ASKING).reason.startswith("every association was released")


def test_counts_of_the_sender_complete_even_what_was_aborted_or_has_gaps() -> None:
    gap = evidence(series(20)[:9] + series(20)[10:], aborted_associations=1, counts={"1.2.3": 19})
    assert judge(gap, 103.0, ASKING).complete


def test_another_sender_is_not_asked() -> None:
    assert judge(evidence(series(20), calling=("CT1",)), 110.0, ASKING).complete


def test_a_nifti_file_is_complete_at_once() -> None:
    assert judge(evidence([]), 100.0, RULES).complete


def test_time_points_at_the_same_places_are_no_gap() -> None:
    twice = series(20) + [replace(one, SOPInstanceUID=f"{one.SOPInstanceUID}.9") for one in series(20)]
    assert weigh(twice).stacked


@given(st.integers(3, 60), st.data())
def test_a_missing_inner_slice_always_shows(count: int, data: st.DataObject) -> None:
    full = series(count + 1)
    missing = data.draw(st.integers(1, count - 1))
    here = full[:missing] + full[missing + 1 :]
    assert weigh(full).sure
    assert weigh(here).gap != ""
    order = data.draw(st.permutations(here))
    assert weigh(order).gap == weigh(here).gap


@given(st.floats(0, 200), st.floats(0, 200), st.integers(0, 2), st.integers(0, 2), st.integers(1, 6))
def test_a_verdict_either_completes_or_says_when_to_look_again(
    now_s: float, arrival_s: float, opened: int, aborted: int, count: int
) -> None:
    now_s = max(now_s, arrival_s)
    found = Evidence(
        tuple(series(count)), arrival_s, open_associations=opened, aborted_associations=aborted, calling=("MR1",)
    )
    verdict = judge(found, now_s, RULES)
    assert verdict.reason
    assert verdict.complete or verdict.again_s > now_s
