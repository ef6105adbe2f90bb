"""Choose the series of a study that an entry was made for, by the rules it declares; never by guessing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

import numpy as np

from dints_deploy.catalog.entry import Entry, GeometryPolicy
from dints_deploy.catalog.preparation import Channel
from dints_deploy.dicom.findings import Action, Policy, escaped
from dints_deploy.dicom.gate import GeometryReport, decide
from dints_deploy.dicom.read import report_on
from dints_deploy.dicom.regular import regular_grid
from dints_deploy.dicom.series import Series, Study
from dints_deploy.errors import EntryError, ScanRefused, UsageError
from dints_deploy.imaging.volume import Grid, Volume
from dints_deploy.runtime.accepts import check_accepts

ANOTHER: Final = "another series or entry"


@dataclass(frozen=True)
class Choice:
    """The series that an entry takes.

    Attributes:
        series: channel name -> series, in the entry's order.
        policy: what the entry does about the geometry.
        not_chosen: a line for each other series.
    """

    series: dict[str, Series]
    policy: Policy
    not_chosen: tuple[str, ...]

    @property
    def taken(self) -> tuple[str, ...]:
        """Return how each series is called, for people: number, short hash and description."""
        return tuple(dict.fromkeys(_name(series) for series in self.series.values()))


def policy_of(geometry: GeometryPolicy) -> Policy:
    """Return the gate's policy that an entry declares.

    Raises:
        EntryError: `entry-invalid` for a finding that there is not, or an action that it does not allow.
    """
    named = {"dicom-tilt": geometry.tilt, "dicom-uneven-steps": geometry.uneven, "dicom-missing-slice": geometry.uneven}
    if twice := sorted(named.keys() & geometry.findings.keys()):
        message = f"expected {', '.join(twice)} as tilt or uneven, found it in geometry.findings: remove it there"
        raise EntryError("entry-invalid", message)
    actions = {code: Action(action) for code, action in {**named, **geometry.findings}.items()}
    try:
        return Policy(actions, minimum_slices=geometry.minimum_slices)
    except UsageError as error:
        raise EntryError("entry-invalid", f"geometry.findings: {error.message}") from error


def choose_series(studies: Mapping[str, Study], entry: Entry) -> Choice:
    """Return the one series per channel that the entry's rules allow.

    Args:
        studies: channel name -> where its series is; one study for all channels under "".
        entry: whose rules count.

    Raises:
        ScanRefused: `series-none` with why each series was not taken, or `series-ambiguous` with the candidates; a
            study of one series is refused with that series' own reason.
    """
    policy = policy_of(entry.geometry)
    chosen: dict[str, Series] = {}
    reasons: dict[str, ScanRefused] = {}
    for channel in entry.channels:
        fitting = []
        study = studies[channel.name if channel.name in studies else ""]
        for series in study.series:
            try:
                check_series(series, channel, entry, policy)
                fitting.append(series)
            except ScanRefused as refusal:
                reasons.setdefault(series.label, refusal)
        chosen[channel.name] = _the_one(fitting, study, channel, reasons)
    taken = {series.label for series in chosen.values()}
    others = {s.label: s for study in studies.values() for s in study.series if s.label not in taken}
    lines = [f"{_name(series)}: {reasons[label].message}" for label, series in others.items()]
    return Choice(chosen, policy, tuple(lines))


def check_series(series: Series, channel: Channel, entry: Entry, policy: Policy) -> None:
    """Refuse a series that does not fit a channel: modality, description, geometry, size.

    Raises:
        ScanRefused: with the code of what does not fit.
    """
    if series.Modality != channel.modality:
        found = escaped(series.Modality) or "none"
        raise ScanRefused("scan-modality", f"expected {channel.modality}, found {found}: choose {ANOTHER}")
    _check_words(series, channel)
    report = report_on(series, policy=policy)
    regularising = decide(report.findings, policy, series.label)
    check_accepts(_shell(report, regularised=bool(regularising)), entry, modality=series.Modality)


def _check_words(series: Series, channel: Channel) -> None:
    rule, description = channel.series, series.SeriesDescription.lower()
    expected = ""
    if rule.description and not _matches(description, rule.description):
        expected = f"a description like {' or '.join(rule.description)}"
    elif _matches(description, rule.exclude_description):
        expected = f"no description like {' or '.join(rule.exclude_description)}"
    elif rule.body_part and not _matches(series.BodyPartExamined.lower(), rule.body_part):
        expected = f"a body part of {' or '.join(rule.body_part)}"
    elif rule.contrast != "any" and series.contrast != (rule.contrast == "required"):
        expected = f"a series with contrast agent {rule.contrast}"
    if expected:
        raise ScanRefused("series-rule", f"expected {expected}, found otherwise: choose {ANOTHER}")


def _matches(text: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(text, pattern.lower()) for pattern in patterns)


def _shell(report: GeometryReport, *, regularised: bool) -> Volume:
    """Return a volume of the size and place that the series will have, which holds no voxels of its own."""
    grid: Grid = regular_grid(report) if regularised or report.grid is None else report.grid
    return Volume(np.broadcast_to(np.uint8(0), (1, *grid.shape)), grid.affine)


def _the_one(fitting: list[Series], study: Study, channel: Channel, reasons: dict[str, ScanRefused]) -> Series:
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(_name(series) for series in fitting)
        raise ScanRefused(
            "series-ambiguous", f"expected one series for channel {channel.name}, found {names}: give its folder alone"
        )
    if len(study.series) == 1:
        raise reasons[study.series[0].label]
    listed = "; ".join(f"{_name(s)}: {reasons[s.label].message}" for s in study.series)
    found = listed or "no series"
    raise ScanRefused("series-none", f"expected a series for channel {channel.name}, found none ({found})")


def _name(series: Series) -> str:
    number = "" if series.SeriesNumber is None else f" {series.SeriesNumber}"
    return f"series{number} {series.label} ({escaped(series.SeriesDescription)[:40]})"
