"""Does the entry accept this scan? A model answers any input; this is where the wrong ones are refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dints_deploy.catalog.entry import Accepts, Entry, GeometryPolicy
from dints_deploy.errors import ScanRefused, UsageError
from dints_deploy.imaging.geometry import orient
from dints_deploy.imaging.volume import Grid, Volume

AXES = ("left-right", "posterior-anterior", "inferior-superior")
TOLERANCE = 1e-3
"""Relative slack on lengths: headers are float32."""

SHEAR_TOLERANCE = 1e-2
"""Largest cosine between two voxel axes (0.6 degrees) of a grid that counts as orthogonal."""


def check_accepts(scan: Volume, entry: Entry, *, modality: str | None = None) -> None:
    """Refuse a scan that is not what the entry was made for.

    Args:
        scan: as read, any orientation.
        entry: whose `accepts` counts.
        modality: DICOM Modality, None where the file does not say (NIfTI).

    Raises:
        ScanRefused: `scan-modality`, `scan-affine`, `scan-shape`, `scan-spacing` or `scan-extent`.
    """
    accepts = entry.accepts
    if modality is not None and modality not in accepts.modality:
        raise ScanRefused("scan-modality", f"expected {' or '.join(accepts.modality)}, found {modality}")
    check_grid(scan.grid, entry.name, accepts, entry.geometry)


def check_grid(grid: Grid, name: str, accepts: Accepts, geometry: GeometryPolicy) -> None:
    """Refuse a grid, of any orientation, that does not fit what an entry or a recipe of this name accepts.

    Raises:
        ScanRefused: `scan-affine`, `scan-shape`, `scan-spacing` or `scan-extent`.
    """
    upright = _upright(grid)
    if geometry.tilt != "accept":
        _check_orthogonal(upright)
    about = name + (f" ({accepts.about})" if accepts.about else "")
    _check("scan-shape", "voxels", upright.shape, accepts.shape_min, None, about)
    _check("scan-spacing", "mm of spacing", upright.spacing, accepts.spacing_min, accepts.spacing_max, about)
    _check("scan-extent", "mm of extent", upright.extent, accepts.extent_min, accepts.extent_max, about)


def accepting(scan: Volume, entries: Sequence[Entry], *, modality: str | None = None) -> Entry:
    """Return the only entry that has weights and accepts this scan.

    Raises:
        UsageError: `entry-ambiguous`, listing the candidates, or because there is no entry at all.
        ScanRefused: `scan-no-entry`, listing why each entry refuses; with a single entry, its own refusal.
    """
    refusals: dict[str, ScanRefused] = {}
    candidates: list[Entry] = []
    for entry in entries:
        try:
            if scan.channels != len(entry.channels):
                raise ScanRefused("scan-channels", f"expected {len(entry.channels)} channel(s), found {scan.channels}")
            check_accepts(scan, entry, modality=modality)
            candidates.append(entry)
        except ScanRefused as refusal:
            refusals[entry.name] = refusal
    if len(candidates) == 1:
        return candidates[0]
    if len(entries) == 1 and refusals:
        raise next(iter(refusals.values()))
    if candidates:
        names = ", ".join(entry.name for entry in candidates)
        raise UsageError("entry-ambiguous", f"expected one entry that accepts this scan, found {names}: give --model")
    if not refusals:
        raise UsageError("entry-ambiguous", "expected an entry that accepts this scan, found none: the zoo is empty")
    raise no_entry("scan", refusals)


def no_entry(what: str, refusals: Mapping[str, ScanRefused]) -> ScanRefused:
    """Return the refusal of a scan or study by every entry."""
    reasons = "; ".join(f"{name}: {refusal.message}" for name, refusal in refusals.items())
    return ScanRefused("scan-no-entry", f"expected an entry that accepts this {what}, found none ({reasons})")


def _upright(grid: Grid) -> Grid:
    empty = np.broadcast_to(np.uint8(0), (1, *grid.shape))  # takes no memory
    return orient(Volume(empty, grid.affine))[0].grid


def _check_orthogonal(grid: Grid) -> None:
    """Refuse a sheared grid: networks see voxels as boxes, and spacing would say nothing about their shape."""
    directions = grid.affine[:3, :3] / np.linalg.norm(grid.affine[:3, :3], axis=0)
    largest = float(np.abs(directions.T @ directions - np.eye(3)).max())
    if largest > SHEAR_TOLERANCE:
        angle = float(np.degrees(np.arccos(min(1.0, largest))))
        raise ScanRefused("scan-affine", f"expected voxel axes at right angles, found {angle:.1f} degrees: resample it")


def _check(
    code: str,
    unit: str,
    found: Sequence[float],
    low: Sequence[float],
    high: Sequence[float] | None,
    about: str,
) -> None:
    for axis, value, least, most in zip(AXES, found, low, high or [float("inf")] * 3, strict=True):
        if least * (1 - TOLERANCE) <= value <= most * (1 + TOLERANCE):
            continue
        bounds = f"at least {least:g}" if high is None else f"{least:g} to {most:g}"
        message = f"expected {bounds} {unit} {axis} for {about}, found {value:g}: choose another scan or entry"
        raise ScanRefused(code, message)
