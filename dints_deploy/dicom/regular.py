"""Bring a tilted or uneven stack of planes to a regular, orthogonal grid (linear interpolation)."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from dints_deploy.dicom.bounded import DEFAULT_LIMITS, Limits, too_many_voxels
from dints_deploy.dicom.gate import GeometryReport
from dints_deploy.dicom.header import LPS_TO_RAS
from dints_deploy.errors import ScanRefused
from dints_deploy.imaging.volume import Grid

MOST_PLANES: Final = 2048
"""Planes of a regular grid; uneven stacks whose smallest step would need more get a wider step."""

WHOLE_PIXEL: Final = 1e-3
"""Shifts closer than this to a whole pixel are not interpolated."""


def regular_grid(report: GeometryReport) -> Grid:
    """Return the orthogonal grid in RAS mm that covers every plane of `report`.

    Its axes are the planes' rows, columns and normal. Its step is the planes' own where it is even, otherwise their
    smallest, so that no two planes fall into one voxel.

    Raises:
        ScanRefused: `dicom-attribute` for a single plane, which has no step.
    """
    first = report.planes[0]
    if len(report.planes) == 1:
        raise ScanRefused(
            "dicom-attribute",
            "expected several slices, or the SliceThickness of the only one, found neither: repair the header",
        )
    along, shifts = np.array(report.positions), _shifts(report)
    step = report.step or max(float(np.diff(along).min()), float(along[-1]) / (MOST_PLANES - 1))
    low = np.floor(shifts.min(axis=0))  # (columns, rows), in pixels from the first plane
    high = np.ceil(shifts.max(axis=0))
    layout = first.header.layout
    columns, rows = (np.array([layout.Columns, layout.Rows]) + high - low).astype(int).tolist()
    affine = first.affine
    affine[:3, 3] += affine[:3, :2] @ low
    affine[:3, 2] *= step
    return Grid((columns, rows, int(np.rint(along[-1] / step)) + 1), LPS_TO_RAS @ affine)


def regularise(
    stack: NDArray[np.float32], report: GeometryReport, grid: Grid, *, limits: Limits = DEFAULT_LIMITS
) -> NDArray[np.float32]:
    """Return the values of `stack` (planes, rows, columns) on `grid` of `regular_grid`, also (planes, rows, columns).

    Voxels outside the source's planes have the smallest value of the stack.

    Raises:
        ScanRefused: `dicom-too-large`.
    """
    columns, rows, planes = grid.shape
    total = columns * rows * planes * stack.itemsize
    if total > limits.stack_bytes:
        raise too_many_voxels(total, limits)
    shifts = _shifts(report)
    shifts -= np.floor(shifts.min(axis=0))
    along = np.array(report.positions)
    out = np.empty((planes, rows, columns), dtype=np.float32)
    fill = float(stack.min())
    shifted: dict[int, NDArray[np.float32]] = {}
    for place in range(planes):
        height = min(place * grid.spacing[2], float(along[-1]))
        below = int(np.clip(np.searchsorted(along, height, side="right") - 1, 0, len(along) - 2))
        weight = float((height - along[below]) / (along[below + 1] - along[below]))
        shifted = {
            index: shifted[index] if index in shifted else _shift(stack[index], shifts[index], (rows, columns), fill)
            for index in (below, below + 1)
        }
        np.multiply(shifted[below], 1 - weight, out=out[place])
        out[place] += weight * shifted[below + 1]
    return out


def _shifts(report: GeometryReport) -> NDArray[np.float64]:
    """Return how far each plane's first pixel lies from the first plane's, in (columns, rows)."""
    first = report.planes[0]
    shifts: NDArray[np.float64] = np.array(report.across) / [first.between_columns, first.between_rows]
    whole = np.rint(shifts)
    return np.where(np.abs(shifts - whole) < WHOLE_PIXEL, whole, shifts)


def _shift(
    plane: NDArray[np.float32], shift: NDArray[np.float64], shape: tuple[int, int], fill: float
) -> NDArray[np.float32]:
    """Return `plane` (rows, columns) moved by `shift` (columns, rows) pixels in a larger plane of `shape`."""
    for axis, (count, by) in enumerate(zip(shape, shift[::-1], strict=True)):
        at = np.arange(count) - by  # where each new row or column lies in the old plane
        last = plane.shape[axis] - 1
        below = np.clip(np.floor(at), 0, max(last - 1, 0)).astype(int)
        weight = np.expand_dims(np.clip(at - below, 0, 1), 1 - axis).astype(np.float32)
        upper = np.take(plane, np.minimum(below + 1, last), axis=axis)
        plane = np.take(plane, below, axis=axis) * (1 - weight) + upper * weight
        outside = (at < -0.5) | (at > last + 0.5)
        plane[(slice(None), outside) if axis else (outside, slice(None))] = fill
    return plane
