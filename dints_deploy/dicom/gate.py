"""The geometry gate: from plane headers to a report that says whether, and how, they are a volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dints_deploy.dicom.findings import STRICT, Action, Finding, Policy
from dints_deploy.dicom.header import LPS_TO_RAS, Plane, SliceHeader
from dints_deploy.errors import ScanRefused


@dataclass(frozen=True)
class GeometryReport:
    """What the gate found out about a series.

    Attributes:
        findings: each with a code, a severity and the slices concerned (indices into `planes`).
        planes: the planes in order along the normal; empty where their geometry is unusable.
        positions: mm of each plane along the normal, from the first.
        step: mm between planes along the normal, where it is even.
        tilt: degrees between the normal and the line through the planes' first pixels.
    """

    findings: tuple[Finding, ...]
    planes: tuple[Plane, ...] = ()
    positions: tuple[float, ...] = ()
    step: float | None = None
    tilt: float = 0.0

    @property
    def affine(self) -> NDArray[np.float64]:
        """Return the 4x4 from (column, row, plane) to RAS mm; sheared where the stack is tilted."""
        first, last = self.planes[0], self.planes[-1]
        affine = first.affine
        affine[:3, 2] = np.subtract(last.position, first.position) / max(len(self.planes) - 1, 1)
        return LPS_TO_RAS @ affine


def examine(slices: Sequence[SliceHeader], *, policy: Policy = STRICT) -> GeometryReport:
    """Return what is right and wrong with the geometry of `slices`."""
    planes = []
    for header in slices:
        iop, ipp, spacing = header.ImageOrientationPatient, header.ImagePositionPatient, header.PixelSpacing
        if iop is None or ipp is None or spacing is None:
            raise ScanRefused("dicom-position", "expected position, orientation and spacing in every slice")
        planes.append(Plane(header, iop[:3], iop[3:], ipp[:3], *spacing))  # type: ignore[arg-type]
    normal = np.cross(planes[0].row, planes[0].column)
    planes.sort(key=lambda plane: float(np.dot(plane.position, normal)))
    along = [float(np.dot(plane.position, normal)) for plane in planes]
    return GeometryReport((), tuple(planes), tuple(z - along[0] for z in along))


def decide(report: GeometryReport, policy: Policy, label: str) -> tuple[Finding, ...]:
    """Return the findings to regularise; raise `ScanRefused` with the first one that the policy refuses."""
    for item in report.findings:
        if policy.action(item.code) is Action.REFUSE:
            raise ScanRefused(item.code, f"series {label}: {item.message}")
    return tuple(item for item in report.findings if policy.action(item.code) is Action.REGULARISE)
