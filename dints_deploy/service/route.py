"""Which routes take a study, and why: a table of conditions, each a pure function; no expression is ever evaluated."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Final

from dints_deploy.catalog.catalog import entry_folders
from dints_deploy.config.appliance import Config
from dints_deploy.config.delivery import Route, SeriesCondition
from dints_deploy.dicom.findings import escaped
from dints_deploy.dicom.inspect import describe
from dints_deploy.dicom.series import Study
from dints_deploy.errors import UsageError
from dints_deploy.process.outputs import check_formats
from dints_deploy.service.model import RouteMatch, SeriesFacts, StudyFacts

DICOM_OUTPUTS: Final = ("dicom-", "rtstruct")
"""How the outputs begin that need a DICOM source."""


def choose(config: Config, facts: StudyFacts) -> tuple[RouteMatch, ...]:
    """Return for every route whether it takes a study and why, the highest priority first."""
    ordered = sorted(config.routes, key=lambda route: -route.priority)
    return tuple(_match(route, config, facts) for route in ordered)


def study_facts(study: Study, *, doors: Sequence[str], calling: Sequence[str]) -> StudyFacts:
    """Return what routes can be chosen by of a DICOM study."""
    geometry = {one["series"]: one for tree in describe(study)["studies"] for one in tree["series"]}
    series = tuple(
        SeriesFacts(
            label=one.label,
            Modality=one.Modality,
            SeriesDescription=one.SeriesDescription,
            BodyPartExamined=one.BodyPartExamined,
            spacing=_three(geometry[one.label]["spacing"]),
            shape=None if (shape := geometry[one.label]["shape"]) is None else (shape[0], shape[1], shape[2]),
            extent=_three(geometry[one.label]["extent"]),
        )
        for one in study.series
    )
    return StudyFacts("dicom", tuple(doors), tuple(calling), series)


def doors_of(config: Config) -> dict[str, tuple[str, ...]]:
    """Return our AE titles and folders, and the routes that each leads to; to all where it names none."""
    titles = {title.ae_title: title.routes for listener in config.listeners for title in listener.titles}
    return titles | {str(folder.path): folder.routes for folder in config.folders}


def check_routes(config: Config) -> None:
    """Refuse routes whose entry is not in the zoo or whose outputs do not exist.

    Raises:
        UsageError: `config-invalid`, `usage`.
    """
    entries = entry_folders()
    for route in config.routes:
        if route.entry not in entries:
            found = f"routes.{route.name}.entry: expected an entry of {', '.join(entries)}, found {route.entry}"
            raise UsageError("config-invalid", f"{found}: add it with dints-deploy zoo add")
        check_formats(route.outputs)


def _match(route: Route, config: Config, facts: StudyFacts) -> RouteMatch:
    for asks, against in CONDITIONS:
        if asks(route, config) and (reason := against(route, config, facts)):
            return RouteMatch(route.name, False, reason)
    return RouteMatch(route.name, True, "; ".join(_met(route, facts)) or "it takes every study")


def _wrong_door(route: Route, config: Config, facts: StudyFacts) -> str:
    """Say why no door that the study came through leads to the route."""
    bound = doors_of(config)
    if any(not bound.get(door) or route.name in bound[door] for door in facts.doors):
        return ""
    return f"it came in through {_listed(facts.doors)}, which does not lead to this route"


def _wrong_caller(route: Route, config: Config, facts: StudyFacts) -> str:
    if any(_like(caller, route.calling) for caller in facts.calling):
        return ""
    return f"expected a sender like {_listed(route.calling)}, found {_listed(facts.calling) or 'none'}"


def _wrong_kind(route: Route, config: Config, facts: StudyFacts) -> str:
    if facts.kind == "dicom":
        return ""
    return "it is NIfTI, of which neither series can be told apart nor DICOM objects be made"


def _wrong_series(route: Route, config: Config, facts: StudyFacts) -> str:
    for number, condition in enumerate(route.series, start=1):
        reasons = [f"{_name(series)}: {reason}" for series in facts.series if (reason := against(condition, series))]
        if len(reasons) == len(facts.series):
            return f"no series meets condition {number} ({'; '.join(reasons) or 'there are none'})"
    return ""


CONDITIONS: Final[tuple[tuple[Callable[[Route, Config], bool], Callable[[Route, Config, StudyFacts], str]], ...]] = (
    (lambda route, config: any(doors_of(config).values()), _wrong_door),
    (lambda route, config: bool(route.calling), _wrong_caller),
    (lambda route, config: bool(route.series) or any(o.startswith(DICOM_OUTPUTS) for o in route.outputs), _wrong_kind),
    (lambda route, config: bool(route.series), _wrong_series),
)
"""Whether a route asks for something, and what speaks against a study then; empty where nothing does."""


def against(condition: SeriesCondition, series: SeriesFacts) -> str:
    """Return what speaks against a series, empty where it meets the condition."""
    words = (
        ("modality", condition.modality, series.Modality),
        ("description", condition.description, series.SeriesDescription),
        ("body part", condition.body_part, series.BodyPartExamined),
    )
    for what, patterns, value in words:
        if patterns and not _like(value, patterns):
            return f"{what} {escaped(value) or 'missing'} is not like {_listed(patterns)}"
    if condition.exclude_description and _like(series.SeriesDescription, condition.exclude_description):
        return f"description is like {_listed(condition.exclude_description)}"
    return _against_geometry(condition, series)


def _against_geometry(condition: SeriesCondition, series: SeriesFacts) -> str:
    limits = (
        ("spacing", condition.spacing_max, series.spacing, operator.le),
        ("shape", condition.shape_min, series.shape, operator.ge),
        ("extent", condition.extent_max, series.extent, operator.le),
    )
    for what, limit, value, fits in limits:
        if limit is None:
            continue
        if value is None:
            return f"it is no volume of a known {what}"
        if not all(fits(found, bound) for found, bound in zip(value, limit, strict=True)):
            return f"{what} {_numbers(value)} is beyond {_numbers(limit)}"
    return ""


def _met(route: Route, facts: StudyFacts) -> list[str]:
    """Return what speaks for a route that takes a study."""
    senders = [caller for caller in facts.calling if _like(caller, route.calling)]
    reasons = [f"sent by {_listed(senders)}"] if senders else []
    for number, condition in enumerate(route.series, start=1):
        names = [_name(series) for series in facts.series if not against(condition, series)]
        reasons.append(f"condition {number} is met by {', '.join(names)}")
    return reasons


def _like(text: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(text.lower(), pattern.lower()) for pattern in patterns)


def _name(series: SeriesFacts) -> str:
    return f"series {series.label} ({escaped(series.SeriesDescription)[:40]})"


def _listed(values: Sequence[str]) -> str:
    return " or ".join(escaped(value) for value in values)


def _numbers(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _three(values: Sequence[float | None] | None) -> tuple[float, float, float] | None:
    if values is None or any(value is None for value in values):
        return None
    first, second, third = (float(value) for value in values if value is not None)
    return first, second, third
