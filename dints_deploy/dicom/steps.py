"""How the planes follow each other along their normal: duplicates, gaps, uneven steps, shear."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dints_deploy.dicom.findings import Finding, finding
from dints_deploy.dicom.header import Plane

POSITION_TOLERANCE_MM: Final = 0.1
"""How far a plane may lie from its even place between the first and the last: some scanners round positions to 0.1 mm,
and the ends are rounded too."""

POSITION_TOLERANCE_STEPS: Final = 0.1
"""The same as a part of the step, where steps are small."""

SAME_PLACE_MM: Final = 0.005
"""Planes closer than this lie at the same place."""

DRIFT_TOLERANCE_MM: Final = 0.1
"""How far the stack may lean sideways, first to last plane, without being called tilted: cosines are rounded."""

TILT_TAG_TOLERANCE_DEGREES: Final = 0.5
"""How far the header's gantry tilt may be from the one measured from positions."""

GAP_TOLERANCE_MM: Final = 0.01
"""How far thickness and step may differ without a note."""

NAMED: Final = 8
"""How many places a message names."""


@dataclass(frozen=True)
class Stacking:
    """How planes in order along their normal are stacked.

    Attributes:
        along: (n,) mm along the normal, from the first plane.
        across: (n, 2) mm of each plane's first pixel along rows and columns, from the first plane's.
        step: mm between planes; where a slice is missing, of the others; None where uneven.
        tilt: degrees between the normal and the line through the planes' first pixels.
        findings: what is wrong with it.
    """

    along: NDArray[np.float64]
    across: NDArray[np.float64]
    step: float | None
    tilt: float
    findings: tuple[Finding, ...]


def in_order(planes: Sequence[Plane]) -> tuple[list[int], NDArray[np.float64], NDArray[np.float64]]:
    """Return the order of `planes` along their common normal, and where they lie along and across it, in that order."""
    first = planes[0]
    positions = np.array([plane.position for plane in planes], dtype=np.float64)  # (n, 3) LPS mm
    normal = np.cross(first.row, first.column)
    heights = positions @ (normal / np.linalg.norm(normal))
    order = np.argsort(heights, kind="stable")
    offsets = positions[order] - positions[order[0]]
    across = np.stack([offsets @ np.array(first.row), offsets @ np.array(first.column)], axis=1)  # (n, 2)
    return order.tolist(), heights[order] - heights[order[0]], across


def stacking(planes: Sequence[Plane], along: NDArray[np.float64], across: NDArray[np.float64]) -> Stacking:
    """Describe planes that are in order along their normal."""
    if len(planes) == 1:
        return Stacking(along, across, None, 0.0, ())
    if duplicates := tuple(_duplicates(planes, along)):
        return Stacking(along, across, None, 0.0, duplicates)
    step, uneven = _step(planes, along)
    tilt, leaning = _tilt(planes, along, across)
    return Stacking(along, across, step, tilt, (*uneven, *leaning, *_notes(planes, step)))


def _duplicates(planes: Sequence[Plane], along: NDArray[np.float64]) -> Iterator[Finding]:
    """Yield planes at one place: the volumes of one series, or a slice too many."""
    place = np.concatenate([[0], np.cumsum(np.diff(along) > SAME_PLACE_MM)])
    counts = np.bincount(place)
    if counts.max() == 1:
        return
    concerned = tuple(np.flatnonzero(counts[place] > 1).tolist())
    keys = [dict(plane.header.volume_of) for plane in planes]
    differ = sorted({key for one in keys for key in one if len({other.get(key) for other in keys}) > 1})
    by = f" (they differ in {', '.join(differ)})" if differ else ""
    if len(counts) > 1 and counts.min() > 1:
        message = f"expected one volume, found {counts.min()} planes at each of {len(counts)} places{by}: separate them"
        yield finding("dicom-several-volumes", message, concerned)
    else:
        message = f"expected one plane at each place, found up to {counts.max()}{by}: keep one of each"
        yield finding("dicom-duplicate-position", message, concerned)


def _step(planes: Sequence[Plane], along: NDArray[np.float64]) -> tuple[float | None, list[Finding]]:
    """Return the even step, or the reason why there is none."""
    count = len(along)
    mean = along[-1] / (count - 1)
    if _misplaced(along, np.arange(count) * mean, mean) <= 1:
        return float(mean), []
    steps = np.diff(along)
    usual = float(np.median(steps))
    multiples = np.rint(steps / usual)
    places = np.concatenate([[0], np.cumsum(np.maximum(multiples, 1))])
    fitted = float(along @ places / (places @ places))  # least squares through the first plane
    if multiples.min() >= 1 and _misplaced(along, places * fitted, fitted) <= 1:
        return fitted, [_missing(planes, multiples, fitted)]
    uneven = np.flatnonzero(np.abs(steps - usual) > _tolerance(usual))
    found = ", ".join(f"{size:g}" for size in sorted({round(float(size), 2) for size in steps})[:NAMED])
    message = f"expected even steps between slices, found steps of {found} mm: let the policy regularise them"
    return None, [finding("dicom-uneven-steps", message, tuple(sorted({*uneven.tolist(), *(uneven + 1).tolist()})))]


def _tolerance(step: float) -> float:
    return min(POSITION_TOLERANCE_MM, POSITION_TOLERANCE_STEPS * abs(step))


def _misplaced(along: NDArray[np.float64], expected: NDArray[np.float64], step: float) -> float:
    """Return how far the worst plane is from its expected place, in tolerances."""
    return float(np.abs(along - expected).max() / _tolerance(step))


def _missing(planes: Sequence[Plane], multiples: NDArray[np.float64], step: float) -> Finding:
    before = np.flatnonzero(multiples > 1)
    places = "; ".join(
        f"{int(multiples[i]) - 1} between {_name(planes, i)} and {_name(planes, i + 1)}"
        for i in before[:NAMED].tolist()
    )
    total = int((multiples - 1).sum())
    message = f"expected a slice every {step:g} mm, found {total} missing ({places}): send the series again"
    return finding("dicom-missing-slice", message, tuple(sorted({*before.tolist(), *(before + 1).tolist()})))


def _name(planes: Sequence[Plane], index: int) -> str:
    header = planes[index].header
    number = header.frame + 1 if header.layout.NumberOfFrames > 1 else header.InstanceNumber
    return f"slice {index}" if number is None else f"slice {index} (number {number})"


def _tilt(
    planes: Sequence[Plane], along: NDArray[np.float64], across: NDArray[np.float64]
) -> tuple[float, list[Finding]]:
    """Return the angle between the normal and the line through the first pixels, and what to say about it."""
    lean = along @ across / (along @ along)  # (2,) mm sideways for each mm along, least squares
    everywhere = tuple(range(len(planes)))
    scatter = np.abs(across - along[:, np.newaxis] * lean).max(axis=1)
    if scatter.max() > DRIFT_TOLERANCE_MM:
        message = f"expected slices in line, found them shifted by up to {scatter.max():.2f} mm: choose another series"
        return 0.0, [finding("dicom-skew", message, tuple(np.flatnonzero(scatter > DRIFT_TOLERANCE_MM).tolist()))]
    tilt = float(np.degrees(np.arctan(np.linalg.norm(lean))))
    if np.abs(across[-1]).max() <= DRIFT_TOLERANCE_MM:
        tilt = 0.0
    found = []
    if tilt:
        message = f"expected slices above each other, found the stack tilted by {tilt:.2f} degrees"
        found.append(finding("dicom-tilt", f"{message}: let the policy regularise or accept it", everywhere))
    tag = planes[0].header.GantryDetectorTilt
    if tag is not None and abs(abs(tag) - tilt) > TILT_TAG_TOLERANCE_DEGREES:
        message = f"the header claims a gantry tilt of {tag:g} degrees, the positions have {tilt:.2f}: they are used"
        found.append(finding("dicom-tilt-tag", message, everywhere))
    return tilt, found


def _notes(planes: Sequence[Plane], step: float | None) -> Iterator[Finding]:
    everywhere = tuple(range(len(planes)))
    thickness = planes[0].header.SliceThickness
    if step is not None and thickness and abs(thickness - step) > GAP_TOLERANCE_MM:
        yield finding("dicom-slice-gap", f"slices are {thickness:g} mm thick and {step:g} mm apart", everywhere)
    numbers = [plane.header.InstanceNumber for plane in planes if plane.header.layout.NumberOfFrames == 1]
    known = sorted({number for number in numbers if number is not None})
    if known and known[-1] - known[0] + 1 > len(planes):
        missing = known[-1] - known[0] + 1 - len(known)
        yield finding("dicom-instance-gap", f"{missing} instance numbers between the first and last are not there")
