"""What lies in a source: studies, series, geometry and findings, as plain data and as lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dints_deploy.dicom.findings import STRICT, Action, Finding, Policy, escaped
from dints_deploy.dicom.gate import GeometryReport
from dints_deploy.dicom.read import report_on
from dints_deploy.dicom.series import Series, Study, short_hash

SHOWN_RANGES = 12
"""How many runs of slices a line of text names."""


def describe(study: Study, *, policy: Policy = STRICT) -> dict[str, Any]:
    """Return the tree of a source as JSON-ready data: no names, ids or dates of patients; UIDs as short hashes.

    Series descriptions are part of it, with control characters escaped: they are what a person tells series apart by.
    """
    hashes = dict.fromkeys(short_hash(series.StudyInstanceUID) for series in study.series)
    studies = [
        {"study": one, "series": [_series(s, policy) for s in study.series if short_hash(s.StudyInstanceUID) == one]}
        for one in hashes
    ]
    return {"studies": studies, "files": [_finding(item, policy) for item in study.findings]}


def as_lines(tree: Mapping[str, Any]) -> list[str]:
    """Return what `describe` returns as lines for a terminal."""
    lines = []
    for study in tree["studies"]:
        lines.append(f"study {study['study']}")
        for series in study["series"]:
            lines += _series_lines(series)
    passed_over = [item for item in tree["files"] if item["severity"] == "note"]
    lines += [f"file: {_finding_line(item)}" for item in tree["files"] if item["severity"] != "note"]
    if passed_over:
        lines.append(f"{len(passed_over)} other files passed over")
    return lines


def _series(series: Series, policy: Policy) -> dict[str, Any]:
    report = report_on(series, policy=policy)
    actions = {policy.action(item.code) for item in report.findings}
    worst_first = (Action.REFUSE, Action.REGULARISE, Action.ACCEPT)
    verdict = next((action for action in worst_first if action in actions), Action.ACCEPT)
    return {
        "series": series.label,
        "number": series.SeriesNumber,
        "modality": escaped(series.Modality),
        "description": escaped(series.SeriesDescription),
        "body_part": escaped(series.BodyPartExamined),
        "contrast": series.contrast,
        "objects": series.objects,
        "verdict": str(verdict),
        **_geometry(report),
        "findings": [_finding(item, policy) for item in report.findings],
    }


def _geometry(report: GeometryReport) -> dict[str, Any]:
    """Return shape (columns, rows, planes), spacing and extent in mm, where there are planes."""
    if not report.planes:
        return {"shape": None, "spacing": None, "extent": None, "orientation": None, "tilt_degrees": None}
    first = report.planes[0]
    layout, count = first.header.layout, len(report.planes)
    in_plane = [first.between_columns, first.between_rows]
    step = report.step or (report.grid.spacing[2] if report.grid else None)
    height = report.positions[-1] + (step or 0.0)
    return {
        "shape": [layout.Columns, layout.Rows, count],
        "spacing": [round(float(mm), 4) for mm in in_plane] + [None if step is None else round(step, 4)],
        "extent": [round(layout.Columns * in_plane[0], 2), round(layout.Rows * in_plane[1], 2), round(height, 2)],
        "orientation": report.orientation,
        "tilt_degrees": round(report.tilt, 2),
    }


def _finding(item: Finding, policy: Policy) -> dict[str, Any]:
    return {
        "code": item.code,
        "severity": str(item.severity),
        "action": str(policy.action(item.code)),
        "message": item.message,
        "slices": list(item.slices),
    }


def _series_lines(series: Mapping[str, Any]) -> Iterator[str]:
    number = "" if series["number"] is None else f" {series['number']}"
    yield f"  series {series['series']}{number} {series['modality']} {series['description']!r}: {series['verdict']}"
    if series["shape"]:
        shape = " x ".join(str(n) for n in series["shape"])
        spacing = " x ".join("?" if mm is None else f"{mm:g}" for mm in series["spacing"])
        tilt = f", tilt {series['tilt_degrees']:g} degrees" if series["tilt_degrees"] else ""
        yield f"    {series['orientation']}, {shape} voxels of {spacing} mm{tilt}"
    planes = series["shape"][2] if series["shape"] else 0
    for line, times in Counter(_finding_line(item, planes) for item in series["findings"]).items():
        yield f"    {line}" if times == 1 else f"    {line} [{times} files]"


def _finding_line(item: Mapping[str, Any], planes: int = 0) -> str:
    where = _ranges(item["slices"]) if len(item["slices"]) < planes else ""
    return f"{item['severity']} {item['code']} ({item['action']}): {item['message']}{where}"


def _ranges(slices: Sequence[int]) -> str:
    """Return slices as ranges: " [slices 0-3, 7]"."""
    if not slices:
        return ""
    runs: list[list[int]] = []
    for index in slices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    named = [f"{first}" if first == last else f"{first}-{last}" for first, last in runs[:SHOWN_RANGES]]
    return f" [slices {', '.join(named)}{', ...' if len(runs) > SHOWN_RANGES else ''}]"
