"""The geometry gate: from plane headers to a report that says whether, and how, they are a volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dints_deploy.dicom.content import check_content
from dints_deploy.dicom.findings import STRICT, Action, Finding, Policy, finding
from dints_deploy.dicom.header import LPS_TO_RAS, Plane, SliceHeader
from dints_deploy.dicom.place import place
from dints_deploy.dicom.steps import Stacking, in_order, stacking
from dints_deploy.errors import ScanRefused
from dints_deploy.imaging.volume import Grid

OBLIQUE = 0.995
"""Cosine with a patient axis under which a plane is called oblique (about 6 degrees)."""


@dataclass(frozen=True)
class GeometryReport:
    """What the gate found out about a series.

    Attributes:
        findings: each with a code, a severity and the slices concerned, as indices into `planes` (into the series'
            slices where there are no planes).
        planes: all planes in order along their normal; empty where they have no common place.
        orientation: "axial", "oblique coronal", ...; empty without planes.
        positions: mm of each plane along the normal, from the first.
        across: mm of each plane's first pixel along rows and columns, from the first plane's.
        step: mm between planes along the normal; where slices are missing, of the others; None where uneven.
        tilt: degrees between the normal and the line through the planes' first pixels.
        grid: the planes as a grid in RAS mm, axes (column, row, plane), sheared where tilted; None where uneven,
            where slices are missing, and where there is no volume.
    """

    findings: tuple[Finding, ...]
    planes: tuple[Plane, ...] = ()
    orientation: str = ""
    positions: tuple[float, ...] = ()
    across: tuple[tuple[float, float], ...] = ()
    step: float | None = None
    tilt: float = 0.0
    grid: Grid | None = None

    def has(self, code: str) -> bool:
        """Say whether a finding with this code was made."""
        return any(item.code == code for item in self.findings)


def examine(slices: Sequence[SliceHeader], *, policy: Policy = STRICT) -> GeometryReport:
    """Return what is right and wrong with `slices` as a volume; the policy only says how few are too few."""
    if not slices:
        return GeometryReport((finding("dicom-no-images", "expected images of slices, found none: another series"),))
    planes, findings = place(slices)
    findings = [*check_content(slices), *findings]
    if len(slices) < policy.minimum_slices:
        message = f"expected at least {policy.minimum_slices} slices, found {len(slices)}: choose another series"
        findings.append(finding("dicom-too-few-slices", message, tuple(range(len(slices)))))
    if not planes:
        return GeometryReport(tuple(findings))
    order, along, across = in_order(planes)
    ordered = [planes[index] for index in order]
    rank = {index: place for place, index in enumerate(order)}
    findings = [replace(item, slices=tuple(sorted(rank[index] for index in item.slices))) for item in findings]
    stack = stacking(ordered, along, across)
    return GeometryReport(
        findings=(*findings, *stack.findings),
        planes=tuple(ordered),
        orientation=_orientation(ordered[0]),
        positions=tuple(along.tolist()),
        across=tuple((float(x), float(y)) for x, y in across),
        step=stack.step,
        tilt=stack.tilt,
        grid=_grid(ordered, stack),
    )


def decide(findings: Sequence[Finding], policy: Policy, label: str) -> frozenset[str]:
    """Return the codes to regularise.

    Args:
        label: the short hash that names the series in the message.

    Raises:
        ScanRefused: the first finding that `policy` refuses; the message counts the others.
    """
    refused = [item for item in findings if policy.action(item.code) is Action.REFUSE]
    if refused:
        others = ", ".join(dict.fromkeys(item.code for item in refused[1:] if item.code != refused[0].code))
        more = f" (also refused: {others})" if others else ""
        raise ScanRefused(refused[0].code, f"series {label}: {refused[0].message}{more}")
    return frozenset(item.code for item in findings if policy.action(item.code) is Action.REGULARISE)


def _grid(planes: Sequence[Plane], stack: Stacking) -> Grid | None:
    """Return the planes' own grid: its third axis is the line through their first pixels, whether tilted or not."""
    affine = planes[0].affine
    if len(planes) == 1:
        thickness = planes[0].header.SpacingBetweenSlices or planes[0].header.SliceThickness
        if thickness is None or thickness <= 0:
            return None
        affine[:3, 2] *= thickness
    elif stack.step is None or any(item.code in ("dicom-missing-slice", "dicom-skew") for item in stack.findings):
        return None
    else:
        affine[:3, 2] = np.subtract(planes[-1].position, planes[0].position) / (len(planes) - 1)
    layout = planes[0].header.layout
    return Grid((layout.Columns, layout.Rows, len(planes)), LPS_TO_RAS @ affine)


def _orientation(plane: Plane) -> str:
    """Return the anatomical name of the planes' normal."""
    normal = np.abs(np.cross(plane.row, plane.column))
    name = ("sagittal", "coronal", "axial")[int(normal.argmax())]
    return name if normal.max() > OBLIQUE else f"oblique {name}"
