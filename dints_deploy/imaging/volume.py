"""A Volume: voxels with channels on a grid in patient space. Valid once built.

Voxel axes are i, j, k; the world is RAS+ millimetres; arrays are (C, I, J, K).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dints_deploy.errors import ScanRefused

Affine = NDArray[np.float64]
"""4x4, voxel index to RAS millimetres."""

SINGULAR_MM3 = 1e-9
"""Voxel volume below which an affine is treated as singular."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A box of voxels in patient space.

    Attributes:
        shape: voxels along i, j, k.
        affine: float64 4x4, voxel index to RAS mm.
    """

    shape: tuple[int, int, int]
    affine: Affine

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        if np.shape(self.shape) != (3,) or min(self.shape) < 1:
            raise ScanRefused("scan-dimensions", f"expected three axes of at least one voxel, found shape {self.shape}")
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.array_equal(affine[3], [0, 0, 0, 1]):
            raise ScanRefused("scan-affine", "expected a finite 4x4 affine with last row 0 0 0 1: repair the header")
        if abs(np.linalg.det(affine[:3, :3])) < SINGULAR_MM3:
            raise ScanRefused("scan-affine", "expected three independent voxel axes, found a singular affine")
        affine.setflags(write=False)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "affine", affine)

    @cached_property
    def spacing(self) -> tuple[float, float, float]:
        """Return the distance of neighbouring voxels along i, j, k in mm."""
        i, j, k = (float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))
        return i, j, k

    @property
    def extent(self) -> tuple[float, float, float]:
        """Return the physical size along i, j, k in mm, voxel borders included."""
        i, j, k = (n * s for n, s in zip(self.shape, self.spacing, strict=True))
        return i, j, k

    @property
    def voxel_ml(self) -> float:
        """Return the volume of one voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    def to_world(self, ijk: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map voxel indices (..., 3) to RAS mm (..., 3)."""
        world: NDArray[np.float64] = ijk @ self.affine[:3, :3].T + self.affine[:3, 3]
        return world

    def same_as(self, other: Grid, tolerance_mm: float = 1e-3) -> bool:
        """Say whether both grids have the same voxels, corners within `tolerance_mm`."""
        if self.shape != other.shape:
            return False
        corners = np.array(np.meshgrid(*[[0, n - 1] for n in self.shape], indexing="ij"), dtype=np.float64)
        corners = corners.reshape(3, -1).T  # (8, 3)
        return bool(np.abs(self.to_world(corners) - other.to_world(corners)).max() <= tolerance_mm)


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels with channels on a grid: a scan, a probability map or a label map (one channel).

    Attributes:
        data: (C, I, J, K), real numbers.
        affine: float64 4x4, voxel index to RAS mm.

    Raises:
        ScanRefused: `scan-dimensions`, `scan-datatype` or `scan-affine` when this is not a volume.
    """

    data: NDArray[Any]
    affine: Affine

    def __post_init__(self) -> None:
        if self.data.ndim != 4 or min(self.data.shape) < 1:
            found = self.data.shape
            raise ScanRefused("scan-dimensions", f"expected an array (C, I, J, K) without empty axes, found {found}")
        if self.data.dtype.kind not in "fiub":
            raise ScanRefused("scan-datatype", f"expected real numbers, found voxels of type {self.data.dtype}")
        object.__setattr__(self, "affine", self.grid.affine)

    @cached_property
    def grid(self) -> Grid:
        """Return the box of voxels this volume lies on."""
        _, i, j, k = self.data.shape
        return Grid((i, j, k), self.affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the voxels along i, j, k."""
        return self.grid.shape

    @property
    def channels(self) -> int:
        """Return the number of channels."""
        return int(self.data.shape[0])
