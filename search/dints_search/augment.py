"""Random changes of a batch of training patches, on the device where the training runs; nnU-Net's set and order.

Every item is changed by its own seed alone, so a batch of four is two batches of two, on one process or on several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dints_deploy.catalog.preparation import Channel
from dints_search.recipe import Augmentation

AXES: Final = {"i": 2, "j": 3, "k": 4}
"""Dimension of each axis in a batch (N, C, I, J, K)."""

ELASTIC_CONTROL: Final = (4, 4, 4)
"""Control points of an elastic deformation along each axis."""

Rng = np.random.Generator
Change = Callable[[Tensor, Augmentation, Rng], Tensor]
"""Maps one image (C, I, J, K) to a changed one."""


class Augmenter:
    """Apply a recipe's augmentations to a batch; an item's result depends on its seed alone.

    Args:
        settings: probabilities and ranges.
        channels: of the recipe, for what lies around a scan: zeros, or the smallest value of a channel.
    """

    def __init__(self, settings: Augmentation, channels: Sequence[Channel] = ()) -> None:
        self.settings = settings
        self._lowest_around = [n for n, channel in enumerate(channels) if channel.fill == "minimum"]

    def __call__(self, image: Tensor, label: Tensor, *, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the changed images (N, C, I, J, K) float32 and labels (N, 1, I, J, K) int64."""
        pairs = [self._change(x, y, np.random.default_rng(s)) for x, y, s in zip(image, label, seeds, strict=True)]
        return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])

    def _change(self, image: Tensor, label: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        settings = self.settings
        if rng.random() < settings.translation:
            voxels = [round(rng.uniform(-most, most)) for most in settings.translation_range]
            image, label = shift(image, voxels, self._around(image)), shift(label, voxels, 0)
        if (grid := sampling_grid(tuple(label.shape[1:]), settings, rng, image.device)) is not None:
            around = self._around(image)
            image, label = sample(image - around, grid) + around, warp_label(label, grid)
        for probability, change in INTENSITY:
            if rng.random() < getattr(settings, probability):
                image = change(image, settings, rng)
        flips = [AXES[axis] - 1 for axis in settings.mirror if rng.random() < 0.5]
        return (image.flip(flips), label.flip(flips)) if flips else (image, label)

    def _around(self, image: Tensor) -> Tensor:
        """Return what lies around a scan, (C, 1, 1, 1)."""
        around = torch.zeros(len(image), 1, 1, 1, device=image.device)
        for channel in self._lowest_around:
            around[channel] = image[channel].min()
        return around


def shift(volume: Tensor, voxels: Sequence[int], around: Tensor | int) -> Tensor:
    """Return (C, I, J, K) moved by whole voxels: unlike an interpolation, that blurs nothing."""
    moved = torch.zeros_like(volume) + around
    to = tuple(slice(max(0, v), n + min(0, v)) for v, n in zip(voxels, volume.shape[1:], strict=True))
    source = tuple(slice(max(0, -v), n + min(0, -v)) for v, n in zip(voxels, volume.shape[1:], strict=True))
    moved[(slice(None), *to)] = volume[(slice(None), *source)]
    return moved


def sampling_grid(shape: tuple[int, ...], a: Augmentation, rng: Rng, device: torch.device) -> Tensor | None:
    """Return where each voxel of a changed patch is read from, (I, J, K, 3) for `grid_sample`; None for no change."""
    rotated, scaled, bent = (rng.random() < p for p in (a.rotation, a.scaling, a.elastic))
    if not (rotated or scaled or bent):
        return None
    matrix = _rotation(rng.uniform(-1, 1, 3) * a.rotation_range) if rotated else np.eye(3)
    if scaled:
        matrix = matrix / _either_side_of_one(rng, a.scaling_range)  # larger structures are read more densely
    centre = (np.array(shape) - 1) / 2
    axes = [torch.arange(n, device=device, dtype=torch.float32) - c for n, c in zip(shape, centre, strict=True)]
    voxels = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # (I, J, K, 3), from the centre
    voxels = voxels @ _tensor(matrix.T, device) + _tensor(centre, device)
    if bent:
        control = rng.normal(0, a.elastic_voxels, (1, 3, *ELASTIC_CONTROL))
        bend = functional.interpolate(_tensor(control, device), shape, mode="trilinear", align_corners=True)
        voxels = voxels + bend[0].movedim(0, -1)
    scale = _tensor([2 / max(n - 1, 1) for n in shape], device)
    return (voxels * scale - 1).flip(-1)  # grid_sample wants k, j, i from -1 to 1


def sample(image: Tensor, grid: Tensor) -> Tensor:
    """Return an image (C, I, J, K) read at `grid`, trilinearly, with zeros around it."""
    return functional.grid_sample(image[None], grid[None], align_corners=True)[0]


def warp_label(label: Tensor, grid: Tensor) -> Tensor:
    """Return a label map (1, I, J, K) read at `grid`: the class of the largest interpolated share of each voxel.

    Borders keep their place between voxels, which the nearest voxel's label would shift by up to a half.
    """
    best = torch.zeros_like(label)
    largest = torch.zeros(label.shape, device=label.device)
    background = torch.ones_like(largest)
    for value in torch.unique(label).tolist():
        if value == 0:
            continue
        share = sample((label == value).float(), grid)
        background = background - share
        best = torch.where(share > largest, value, best)
        largest = torch.maximum(share, largest)
    return torch.where(background > largest, 0, best)


def _rotation(angles: np.ndarray[Any, np.dtype[np.float64]]) -> Any:
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        one, two = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[one, one] = turn[two, two] = np.cos(angle)
        turn[one, two], turn[two, one] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def _either_side_of_one(rng: Rng, limits: tuple[float, float]) -> float:
    """Draw below or above 1 with equal chance: a uniform draw from 0.7 .. 1.5 would rarely be below."""
    low, high = limits
    return float(rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high))


def _tensor(values: Any, device: torch.device) -> Tensor:
    return torch.as_tensor(np.asarray(values, np.float32), device=device)


def _per_channel(image: Tensor, values: list[float]) -> Tensor:
    return _tensor(values, image.device).view(-1, 1, 1, 1)


def _noise(image: Tensor, a: Augmentation, rng: Rng) -> Tensor:
    generator = torch.Generator(image.device).manual_seed(int(rng.integers(2**63)))
    noise = torch.randn(image.shape, generator=generator, device=image.device)
    return image + noise * rng.uniform(0, a.noise_std)


def _blur(image: Tensor, a: Augmentation, rng: Rng) -> Tensor:
    sigma = [rng.uniform(*a.blur_sigma) for _ in image]
    radius = max(1, round(3 * max(sigma)))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / np.array(sigma)[:, None]) ** 2)
    weights = _tensor(taps / taps.sum(1, keepdims=True), image.device)  # (C, 2 radius + 1)
    for axis in (1, 2, 3):
        margins = [0, 0, 0, 0, 0, 0]
        margins[2 * (3 - axis)] = margins[2 * (3 - axis) + 1] = radius
        padded = functional.pad(image[None], margins, mode="replicate")[0]
        length, blurred = image.shape[axis], torch.zeros_like(image)
        for n in range(2 * radius + 1):
            blurred.addcmul_(padded.narrow(axis, n, length), weights[:, n].view(-1, 1, 1, 1))
        image = blurred
    return image


def _brightness(image: Tensor, a: Augmentation, rng: Rng) -> Tensor:
    return image * _per_channel(image, [rng.uniform(*a.brightness_range) for _ in image])


def _contrast(image: Tensor, a: Augmentation, rng: Rng) -> Tensor:
    factor = _per_channel(image, [_either_side_of_one(rng, a.contrast_range) for _ in image])
    mean, low, high = (f(image, dim=(1, 2, 3), keepdim=True) for f in (torch.mean, torch.amin, torch.amax))
    return torch.clamp((image - mean) * factor + mean, low, high)


def _low_resolution(image: Tensor, a: Augmentation, rng: Rng) -> Tensor:
    zoom = rng.uniform(*a.low_resolution_range)
    small = [max(1, round(n * zoom)) for n in image.shape[1:]]
    coarse = functional.interpolate(image[None], small, mode="nearest-exact")
    return functional.interpolate(coarse, image.shape[1:], mode="trilinear")[0]


def _gamma(image: Tensor, a: Augmentation, rng: Rng) -> Tensor:
    """Raise each channel, mapped to 0 .. 1, to a power; its mean and deviation stay."""
    power = _per_channel(image, [_either_side_of_one(rng, a.gamma_range) for _ in image])
    low, high = (f(image, dim=(1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    changed = ((image - low) / (high - low).clamp_min(1e-7)) ** power
    std, mean = torch.std_mean(image, dim=(1, 2, 3), keepdim=True)
    new_std, new_mean = torch.std_mean(changed, dim=(1, 2, 3), keepdim=True)
    return (changed - new_mean) / new_std.clamp_min(1e-7) * std + mean


def _gamma_of_negative(image: Tensor, a: Augmentation, rng: Rng) -> Tensor:
    return -_gamma(-image, a, rng)


INTENSITY: Final[tuple[tuple[str, Change], ...]] = (
    ("noise", _noise),
    ("blur", _blur),
    ("brightness", _brightness),
    ("contrast", _contrast),
    ("low_resolution", _low_resolution),
    ("gamma_of_negative", _gamma_of_negative),
    ("gamma", _gamma),
)
"""The changes of intensity in the order they are applied, each with the setting that holds its probability."""
