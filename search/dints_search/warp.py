"""Where the voxels of a changed patch are read from: shifts, and rotation, scaling and bending in one interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dints_deploy.catalog.entry import AXES
from dints_search.recipe import Augmentation

ELASTIC_CONTROL: Final = (4, 4, 4)
"""Control points of an elastic deformation along each axis."""

Rng = np.random.Generator
Array = np.ndarray[Any, np.dtype[np.float64]]


def shift(volume: Tensor, voxels: Sequence[int], around: Tensor | int) -> Tensor:
    """Return (C, I, J, K) moved by whole voxels: unlike an interpolation, that blurs nothing."""
    moved = torch.zeros_like(volume) + around
    to = tuple(slice(max(0, v), n + min(0, v)) for v, n in zip(voxels, volume.shape[1:], strict=True))
    source = tuple(slice(max(0, -v), n + min(0, -v)) for v, n in zip(voxels, volume.shape[1:], strict=True))
    moved[(slice(None), *to)] = volume[(slice(None), *source)]
    return moved


def sampling_grids(
    shape: tuple[int, ...], settings: Augmentation, rngs: Sequence[Rng], device: torch.device
) -> tuple[list[int], Tensor]:
    """Return which patches of a batch are changed, and where each voxel of them is read from.

    Args:
        shape: of a patch, (I, J, K).
        settings: probabilities and ranges.
        rngs: one for each patch.
        device: of the grids.

    Returns:
        The numbers of the n patches, and their grids for `grid_sample`, (n, I, J, K, 3).
    """
    drawn = {n: found for n, rng in enumerate(rngs) if (found := _draw(settings, rng)) is not None}
    if not drawn:
        return [], torch.empty(0, *shape, 3, device=device)
    matrices, controls = zip(*drawn.values(), strict=True)
    centre = (np.array(shape) - 1) / 2
    axes = [torch.arange(n, device=device, dtype=torch.float32) - c for n, c in zip(shape, centre, strict=True)]
    voxels = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(1, -1, 3)  # from the centre
    voxels = voxels @ as_tensor(np.stack(matrices), device).mT + as_tensor(centre, device)  # (n, I*J*K, 3)
    voxels = voxels.view(len(drawn), *shape, 3)
    if bent := [n for n, control in enumerate(controls) if control is not None]:
        control = as_tensor(np.stack([controls[n] for n in bent]), device)
        bend = functional.interpolate(control, shape, mode="trilinear", align_corners=True)
        voxels[bent] += bend.movedim(1, -1)
    scale = as_tensor([2 / max(n - 1, 1) for n in shape], device)
    return list(drawn), (voxels * scale - 1).flip(-1)  # grid_sample wants k, j, i from -1 to 1


def sample(images: Tensor, grids: Tensor) -> Tensor:
    """Return images (N, C, I, J, K) read at their grids, trilinearly, with zeros around them."""
    return functional.grid_sample(images, grids, align_corners=True)


def warp_labels(labels: Tensor, grids: Tensor) -> Tensor:
    """Return label maps (N, 1, I, J, K) read at their grids: the class of each voxel's largest interpolated share.

    Borders keep their place between voxels, which the nearest voxel's label would shift by up to a half.
    """
    best = torch.zeros_like(labels)
    largest = torch.zeros(labels.shape, device=labels.device)
    background = torch.ones_like(largest)
    for value in torch.unique(labels).tolist():
        if value == 0:
            continue
        share = sample((labels == value).float(), grids)
        background = background - share
        best = torch.where(share > largest, value, best)
        largest = torch.maximum(share, largest)
    return torch.where(background > largest, 0, best)


def _draw(settings: Augmentation, rng: Rng) -> tuple[Array, Array | None] | None:
    """Draw a patch's matrix (3, 3) and, in voxels, its bend at the control points; or no change."""
    rotated, scaled, bent = (rng.random() < p for p in (settings.rotation, settings.scaling, settings.elastic))
    if not (rotated or scaled or bent):
        return None
    free = np.array([axis != settings.flat for axis in AXES])  # a flat axis is turned around, and else left alone
    angles = np.where(free.all() | ~free, settings.rotation_range, 0.0)
    matrix = _rotation(rng.uniform(-1, 1, 3) * angles) if rotated else np.eye(3)
    if scaled:  # larger structures are read more densely
        matrix = matrix / np.where(free, either_side_of_one(rng, settings.scaling_range), 1.0)
    if not bent:
        return matrix, None
    return matrix, rng.normal(0, settings.elastic_voxels, (3, *ELASTIC_CONTROL)) * free.reshape(3, 1, 1, 1)


def _rotation(angles: Array) -> Array:
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        one, two = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[one, one] = turn[two, two] = np.cos(angle)
        turn[one, two], turn[two, one] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def either_side_of_one(rng: Rng, limits: tuple[float, float]) -> float:
    """Draw below or above 1 with equal chance: a uniform draw from 0.7 .. 1.5 would rarely be below."""
    low, high = limits
    return float(rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high))


def as_tensor(values: Any, device: torch.device) -> Tensor:
    """Return values as float32 on a device."""
    return torch.as_tensor(np.asarray(values, np.float32), device=device)
