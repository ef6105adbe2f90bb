"""Is a study complete? Evidence first: what the sender counts, clean ends, contiguous slices; silence only last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from dints_deploy.config.intake import Completeness
from dints_deploy.dicom.instance import Instance
from dints_deploy.dicom.series import short_hash
from dints_deploy.service.model import Evidence, Verdict

STACK: Final = 3
"""Slices from which on contiguous positions say something: two are always even."""

GAP_STEPS: Final = 1.5
"""A step of this many usual steps is a gap."""

SAME_PLACE_MM: Final = 0.005
"""Planes closer than this lie at the same place: the volumes of one series."""


@dataclass(frozen=True)
class SeriesEvidence:
    """What the instances of one series say about each other.

    Attributes:
        count: instances.
        expected: at least how many the headers say; None where they do not.
        numbered: the instance numbers are 1 (or 0) to the last without a gap; None where they say nothing.
        stacked: the positions have no gap; None where they say nothing.
    """

    label: str
    count: int
    expected: int | None
    numbered: bool | None
    stacked: bool | None

    @property
    def gap(self) -> str:
        """Return what is missing, in words; empty where nothing shows."""
        if self.expected is not None and self.count < self.expected:
            return f"series {self.label} has {self.count} of {self.expected} instances"
        if self.numbered is False:
            return f"series {self.label} has a gap in its instance numbers"
        if self.stacked is False:
            return f"series {self.label} has a gap between its slices"
        return ""

    @property
    def sure(self) -> bool:
        """Say whether something speaks for completeness, more than that nothing speaks against it."""
        counted = self.expected is not None and self.count >= self.expected
        return counted or bool(self.stacked and self.numbered is not False)


def judge(evidence: Evidence, now_s: float, rules: Completeness) -> Verdict:
    """Judge a study.

    The order: what the sender counts; then associations that ended cleanly with series that show no gap; then silence.

    Args:
        evidence: what is known.
        now_s: the time, by the clock of `Evidence.last_arrival_s`.
        rules: how long to wait for what.
    """
    if not evidence.instances:
        return Verdict(True, "a NIfTI file is a whole scan")
    series = list(map(weigh, _by_series(evidence.instances).values()))
    settled_s = evidence.last_arrival_s + rules.settled_seconds
    if evidence.open_associations:
        return Verdict(False, "an association is still open", again_s=max(settled_s, now_s + rules.settled_seconds))
    if now_s < settled_s:
        return Verdict(False, "instances came in a moment ago", again_s=settled_s)
    askable = any(query.sender in evidence.calling for query in rules.queries)
    if evidence.counts is None and askable:
        return Verdict(False, "the sender is asked for its counts", again_s=settled_s, ask=True)
    reason, doubt, seconds = _reason(evidence, series, rules)
    enough_s = evidence.last_arrival_s + seconds
    if now_s < enough_s:
        return Verdict(False, f"waiting for more, as {doubt}", again_s=enough_s)
    if reason:
        return Verdict(True, reason)
    return Verdict(True, f"nothing came for {rules.quiet_seconds:g} s; taken as it is, although {doubt}")


def weigh(instances: Sequence[Instance]) -> SeriesEvidence:
    """Return what the instances of one series say about each other."""
    return SeriesEvidence(
        label=short_hash(instances[0].SeriesInstanceUID),
        count=len(instances),
        expected=_expected(instances),
        numbered=_numbered(instances),
        stacked=_stacked(instances),
    )


def _reason(evidence: Evidence, series: Sequence[SeriesEvidence], rules: Completeness) -> tuple[str, str, float]:
    """Return why a study is complete, or nothing; what is in doubt; and the silence that it must keep."""
    if evidence.counts:
        lacking = _lacking(evidence.counts, series)
        if not lacking:
            total = sum(evidence.counts.values())
            here = f"{total} instances in {len(evidence.counts)} series, and all are here"
            return f"the sender counts {here}", "", rules.settled_seconds
        return "", f"the sender counts more: {lacking}", rules.quiet_seconds
    if gaps := [one.gap for one in series if one.gap]:
        return "", "; ".join(gaps), rules.quiet_seconds
    if evidence.aborted_associations:
        return "", "an association ended without being released", rules.quiet_seconds
    if not any(one.sure for one in series):
        return "", "neither counts nor slices say that it is complete", rules.quiet_seconds
    released = "every association was released" if evidence.calling else "no file was added or changed"
    if all(one.expected is not None for one in series):
        return f"{released}; {len(series)} series with all that their headers count", "", rules.settled_seconds
    silence = min(max(rules.settled_seconds, rules.released_seconds), rules.quiet_seconds)
    return f"{released}; {len(series)} series without a gap", "nobody counts its instances", silence


def _lacking(counts: Mapping[str, int], series: Sequence[SeriesEvidence]) -> str:
    here = {one.label: one.count for one in series}
    wanted = {short_hash(uid): count for uid, count in counts.items()}
    short = [f"series {label} has {here.get(label, 0)} of {n}" for label, n in wanted.items() if here.get(label, 0) < n]
    return "; ".join(short)


def _by_series(instances: Sequence[Instance]) -> dict[str, list[Instance]]:
    groups: dict[str, list[Instance]] = {}
    for instance in instances:
        groups.setdefault(instance.SeriesInstanceUID, []).append(instance)
    return groups


def _expected(instances: Sequence[Instance]) -> int | None:
    """Return the count in the headers; where they differ (acquisitions), the sum cannot be known: the largest."""
    said = [instance.expected for instance in instances if instance.expected is not None]
    if not said or any(instance.frames > 1 for instance in instances):
        return None
    return max(said)


def _numbered(instances: Sequence[Instance]) -> bool | None:
    numbers = [instance.InstanceNumber for instance in instances]
    known = {number for number in numbers if number is not None}
    if len(known) < len(numbers) or len(known) < 2:  # repeated in each acquisition, or not there
        return None
    return min(known) in (0, 1) and max(known) - min(known) + 1 == len(known)


def _stacked(instances: Sequence[Instance]) -> bool | None:
    places = [one for one in instances if one.ImagePositionPatient and one.ImageOrientationPatient and one.frames == 1]
    orientations = {tuple(round(cosine, 3) for cosine in one.ImageOrientationPatient or ()) for one in places}
    if len(places) < len(instances) or len(orientations) != 1:
        return None
    orientation = np.asarray(places[0].ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    normal = np.cross(orientation[0], orientation[1])
    if not np.linalg.norm(normal) > 0:
        return None
    positions = np.asarray([one.ImagePositionPatient for one in places], dtype=np.float64)
    steps = np.diff(np.sort(positions @ (normal / np.linalg.norm(normal))))
    steps = steps[steps > SAME_PLACE_MM]
    if len(steps) + 1 < STACK:
        return None
    return bool(steps.max() <= GAP_STEPS * np.median(steps))
