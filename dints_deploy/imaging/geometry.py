"""Move volumes between grids. Every function returns the moved volume and its own inverse.

The inverse takes any volume on the new grid (labels, probabilities) back to the old grid; voxels that the new grid
does not cover get the inverse's fill value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dints_deploy.errors import ScanRefused
from dints_deploy.imaging.volume import Grid, Volume

Inverse = Callable[[Volume], Volume]
Interpolation = Literal["linear", "nearest"]

AXIS_ALIGNED_TOLERANCE = 1e-6
"""Off-diagonal part of a voxel-to-voxel map, relative to its scale, below which the two grids share their axes."""

NO_RESAMPLING_TOLERANCE = 1e-4
"""Relative difference of spacings below which a volume is not resampled."""


def orient(volume: Volume, codes: str = "RAS") -> tuple[Volume, Inverse]:
    """Permute and flip the voxel axes so that i, j, k point most closely to `codes` (RAS: right, anterior, superior).

    No voxel value changes; an oblique volume stays oblique.
    """
    from dints_deploy.imaging.lean_nibabel import axcodes2ornt, io_orientation, ornt_transform

    old = io_orientation(volume.affine)
    new = axcodes2ornt(tuple(codes))
    there, back = ornt_transform(old, new), ornt_transform(new, old)
    return _reorient(volume, there), lambda moved: _reorient(moved, back)


def _reorient(volume: Volume, transform: NDArray[Any]) -> Volume:
    """Apply a nibabel orientation transform to the spatial axes; the data is a view."""
    from dints_deploy.imaging.lean_nibabel import apply_orientation, inv_ornt_aff

    affine = volume.affine @ inv_ornt_aff(transform, volume.shape)
    data = np.moveaxis(apply_orientation(np.moveaxis(volume.data, 0, -1), transform), -1, 0)  # (C, I, J, K)
    return Volume(data, affine)


def crop(volume: Volume, start: Sequence[int], stop: Sequence[int], fill: float = 0) -> tuple[Volume, Inverse]:
    """Keep the voxels start <= (i, j, k) < stop; the inverse surrounds them with `fill`.

    Raises:
        ValueError: the box is empty or leaves the volume.
    """
    if any(not 0 <= a < b <= n for a, b, n in zip(start, stop, volume.shape, strict=True)):
        raise ValueError(f"expected 0 <= start < stop <= {volume.shape}, found {tuple(start)} to {tuple(stop)}")
    before = list(start)
    after = [n - b for n, b in zip(volume.shape, stop, strict=True)]
    (i0, j0, k0), (i1, j1, k1) = start, stop
    kept = Volume(volume.data[:, i0:i1, j0:j1, k0:k1], _shifted(volume, start))
    return kept, lambda moved: pad(moved, before, after, fill)[0]


def pad(volume: Volume, before: Sequence[int], after: Sequence[int], fill: float = 0) -> tuple[Volume, Inverse]:
    """Surround the volume with `before` and `after` voxels of value `fill` along i, j, k."""
    width = [(0, 0), *zip(before, after, strict=True)]
    grown = Volume(
        np.pad(volume.data, width, mode="constant", constant_values=fill), _shifted(volume, [-b for b in before])
    )
    stop = [b + n for b, n in zip(before, volume.shape, strict=True)]
    return grown, lambda moved: crop(moved, before, stop)[0]


def _shifted(volume: Volume, ijk: Sequence[int]) -> NDArray[np.float64]:
    """Return the affine whose origin is the voxel `ijk` of `volume`."""
    affine = volume.affine.copy()
    affine[:3, 3] = volume.grid.to_world(np.asarray(ijk, dtype=np.float64))
    return affine


def spaced(grid: Grid, spacing: Sequence[float]) -> Grid:
    """Return the grid of the given spacing (mm) over the same box: same centre, same directions.

    Axes keep their voxels where the spacing already agrees; otherwise the count is the extent over the spacing,
    rounded, at least one.
    """
    shape, affine = list(grid.shape), grid.affine.copy()
    for axis, (old, new) in enumerate(zip(grid.spacing, spacing, strict=True)):
        if abs(old - new) <= NO_RESAMPLING_TOLERANCE * new:
            continue
        shape[axis] = max(1, round(grid.shape[axis] * old / new))
        affine[:3, axis] *= new / old
    centre = grid.to_world((np.array(grid.shape) - 1) / 2)
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid((shape[0], shape[1], shape[2]), affine)


def resample(volume: Volume, grid: Grid, interpolation: Interpolation = "linear") -> tuple[Volume, Inverse]:
    """Interpolate the volume at the voxel centres of `grid`; outside, the nearest border voxel counts.

    `linear` gives float32; `nearest` keeps the type (for labels). The inverse resamples to the old grid.
    """
    source = volume.grid

    def back(moved: Volume) -> Volume:
        return Volume(_interpolate(moved, source, interpolation), source.affine)

    return Volume(_interpolate(volume, grid, interpolation), grid.affine), back


def _interpolate(volume: Volume, grid: Grid, interpolation: Interpolation) -> NDArray[Any]:
    if volume.grid.same_as(grid, tolerance_mm=0):
        return volume.data if interpolation == "nearest" else volume.data.astype(np.float32, copy=False)
    axes = shared_axes(volume.grid, grid)
    if axes is None:
        return _interpolate_oblique(volume, grid, interpolation)
    data = volume.data if interpolation == "nearest" else volume.data.astype(np.float32)
    for axis, line in enumerate(axes, start=1):
        data = line.nearest(data, axis) if interpolation == "nearest" else line.linear(data, axis)
    return data


def _interpolate_oblique(volume: Volume, grid: Grid, interpolation: Interpolation) -> NDArray[Any]:
    from scipy.ndimage import affine_transform

    voxel_map = np.linalg.inv(volume.affine) @ grid.affine
    linear = interpolation == "linear"
    dtype = np.dtype(np.float32) if linear else volume.data.dtype
    return np.stack(
        [
            affine_transform(
                channel.astype(dtype), voxel_map, output_shape=grid.shape, order=1 if linear else 0, mode="nearest"
            )
            for channel in volume.data
        ]
    )


@dataclass(frozen=True)
class Line:
    """Where the voxels of a new axis lie between the voxels of an old one.

    Attributes:
        lower: (n,) index of the old voxel at or below each new voxel.
        upper: (n,) index of the old voxel above it.
        fraction: (n,) float32, the share of `upper`.
    """

    lower: NDArray[np.intp]
    upper: NDArray[np.intp]
    fraction: NDArray[np.float32]

    def linear(self, data: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
        """Interpolate `data` linearly along `axis`; exact where voxels coincide."""
        if not self.fraction.any():
            return self._take(data, self.lower, axis)
        low = np.take(data, self.lower, axis)
        high = np.take(data, self.upper, axis)
        shape = [1] * data.ndim
        shape[axis] = -1
        high -= low
        high *= self.fraction.reshape(shape)
        high += low
        return high

    def nearest(self, data: NDArray[Any], axis: int) -> NDArray[Any]:
        """Take the nearest voxel of `data` along `axis`; the lower one in the middle."""
        return self._take(data, np.where(self.fraction > 0.5, self.upper, self.lower), axis)

    def part(self, start: int, stop: int) -> Line:
        """Return the line of the new voxels start <= n < stop."""
        return Line(self.lower[start:stop], self.upper[start:stop], self.fraction[start:stop])

    def within(self, start: int, length: int) -> tuple[Line, slice]:
        """Return the line with the old voxels counted from its own first one, and which old voxels it needs.

        Args:
            start: first of the new voxels to keep.
            length: how many of them; at least one.
        """
        part = self.part(start, start + length)
        first = int(part.lower[0])
        return part.shifted(-first), slice(first, int(part.upper[-1]) + 1)

    def shifted(self, by: int) -> Line:
        """Return the line for an old axis with `by` more voxels before it."""
        return Line(self.lower + by, self.upper + by, self.fraction)

    @staticmethod
    def _take(data: NDArray[Any], index: NDArray[np.intp], axis: int) -> NDArray[Any]:
        first, last = int(index[0]), int(index[-1])
        if last - first == len(index) - 1 and (np.diff(index) == 1).all():
            return data[(slice(None),) * axis + (slice(first, last + 1),)]  # neighbours: a view
        return np.take(data, index, axis)


def shared_axes(source: Grid, target: Grid) -> tuple[Line, Line, Line] | None:
    """Return the three lines from `source` to `target` where their axes are parallel, else None.

    Positions beyond the outermost voxel centres are moved to them (the border voxel counts).
    """
    voxel_map = np.linalg.inv(source.affine) @ target.affine
    scale = np.diag(voxel_map)[:3]
    drift = np.abs(voxel_map[:3, :3] - np.diag(scale)) * np.array(target.shape)
    if drift.max() > AXIS_ALIGNED_TOLERANCE * max(source.shape):
        return None
    i, j, k = (_line(voxel_map[a, a], voxel_map[a, 3], source.shape[a], target.shape[a]) for a in range(3))
    return i, j, k


def _line(step: float, origin: float, old: int, new: int) -> Line:
    position = np.clip(step * np.arange(new) + origin, 0, old - 1)
    snapped = np.round(position)
    position = np.where(np.abs(position - snapped) < AXIS_ALIGNED_TOLERANCE, snapped, position)
    lower = np.floor(position).astype(np.intp)
    upper = np.minimum(lower + 1, old - 1)
    return Line(lower, upper, (position - lower).astype(np.float32))


def bounding_box(mask: NDArray[np.bool_]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return start and stop of the smallest box that holds every True of a mask (I, J, K).

    Raises:
        ScanRefused: `scan-constant` when nothing is True.
    """
    if not mask.any():
        raise ScanRefused("scan-constant", "expected something inside the mask, found it empty")
    bounds = []
    for axis in range(3):
        inside = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        bounds.append((int(inside[0]), int(inside[-1]) + 1))
    return tuple(b[0] for b in bounds), tuple(b[1] for b in bounds)
