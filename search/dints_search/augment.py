"""Random changes of a batch of training patches, on the device where the training runs; nnU-Net's set and order.

Every item is changed by its own seed alone, so a batch of four is two batches of two, on one process or on several.
What each item gets is drawn first; the arithmetic then runs once for all items that get a change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dints_deploy.catalog.preparation import Channel
from dints_search.recipe import Augmentation
from dints_search.warp import Rng, as_tensor, either_side_of_one, sample, sampling_grids, shift, warp_labels

AXES: Final = {"i": 2, "j": 3, "k": 4}
"""Dimension of each axis in a batch (N, C, I, J, K)."""

SPACE: Final = (2, 3, 4)
"""Dimensions of the voxels in a batch."""

Rngs = Sequence[Rng]
"""One random generator for each item of a batch."""

Change = Callable[[Tensor, Augmentation, Rngs], Tensor]
"""Maps images (N, C, I, J, K) to changed ones."""


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
        rngs = [np.random.default_rng(seed) for seed in seeds]
        image, label = self._warped(*self._shifted(image, label, rngs), rngs)
        for name, change in INTENSITY:
            if chosen := _those_with(getattr(self.settings, name), rngs):
                image[chosen] = change(image[chosen], self.settings, [rngs[n] for n in chosen])
        for axis in self.settings.mirror:
            if chosen := _those_with(0.5, rngs):
                for each in (image, label):
                    each[chosen] = each[chosen].flip(AXES[axis])
        return image, label

    def _shifted(self, image: Tensor, label: Tensor, rngs: Rngs) -> tuple[Tensor, Tensor]:
        """Return a copy with some items moved by whole voxels: from here on the batch is our own to write to."""
        images, labels = list(image), list(label)
        for n in _those_with(self.settings.translation, rngs):
            voxels = [round(rngs[n].uniform(-most, most)) for most in self.settings.translation_range]
            images[n] = shift(image[n], voxels, self._around(image[n : n + 1])[0])
            labels[n] = shift(label[n], voxels, 0)
        return torch.stack(images), torch.stack(labels)

    def _warped(self, image: Tensor, label: Tensor, rngs: Rngs) -> tuple[Tensor, Tensor]:
        """Rotate, scale and bend some items, all in one interpolation."""
        chosen, grids = sampling_grids(tuple(image.shape[2:]), self.settings, rngs, image.device)
        if chosen:
            around = self._around(image[chosen])
            image[chosen] = sample(image[chosen] - around, grids) + around
            label[chosen] = warp_labels(label[chosen], grids)
        return image, label

    def _around(self, image: Tensor) -> Tensor:
        """Return what lies around scans, (N, C, 1, 1, 1)."""
        around = torch.zeros(*image.shape[:2], 1, 1, 1, device=image.device)
        for channel in self._lowest_around:
            around[:, channel] = image[:, channel].amin(dim=(1, 2, 3), keepdim=True)
        return around


def _those_with(probability: float, rngs: Rngs) -> list[int]:
    """Draw for every item whether it gets a change; return the numbers of those that do."""
    return [n for n, rng in enumerate(rngs) if rng.random() < probability]


def _each(image: Tensor, rngs: Rngs, draw: Callable[[Rng], float]) -> Tensor:
    """Return a value drawn for each channel of each item, (N, C, 1, 1, 1)."""
    values = [[draw(rng) for _ in range(image.shape[1])] for rng in rngs]
    return as_tensor(values, image.device).view(*image.shape[:2], 1, 1, 1)


def _noise(image: Tensor, a: Augmentation, rngs: Rngs) -> Tensor:
    noise = []
    for rng in rngs:
        generator = torch.Generator(image.device).manual_seed(int(rng.integers(2**63)))
        drawn = torch.randn(image.shape[1:], generator=generator, device=image.device)
        noise.append(drawn * rng.uniform(0, a.noise_std))
    return image + torch.stack(noise)


def _blur(image: Tensor, a: Augmentation, rngs: Rngs) -> Tensor:
    sigma = np.array([[rng.uniform(*a.blur_sigma) for _ in range(image.shape[1])] for rng in rngs])  # (N, C)
    radii = np.maximum(1, np.round(3 * sigma.max(axis=1))).astype(int)  # each item's own, whatever the others have
    radius = int(radii.max())
    steps = np.arange(-radius, radius + 1)
    taps = np.exp(-0.5 * (steps / sigma[..., np.newaxis]) ** 2) * (abs(steps) <= radii[:, np.newaxis, np.newaxis])
    weights = as_tensor(taps / taps.sum(-1, keepdims=True), image.device)  # (N, C, 2 radius + 1)
    for axis in SPACE:
        margins = [0, 0, 0, 0, 0, 0]
        margins[2 * (4 - axis)] = margins[2 * (4 - axis) + 1] = radius
        padded = functional.pad(image, margins, mode="replicate")
        length, blurred = image.shape[axis], torch.zeros_like(image)
        for n in range(2 * radius + 1):
            blurred.addcmul_(padded.narrow(axis, n, length), weights[..., n].view(*weights.shape[:2], 1, 1, 1))
        image = blurred
    return image


def _brightness(image: Tensor, a: Augmentation, rngs: Rngs) -> Tensor:
    return image * _each(image, rngs, lambda rng: rng.uniform(*a.brightness_range))


def _contrast(image: Tensor, a: Augmentation, rngs: Rngs) -> Tensor:
    factor = _each(image, rngs, lambda rng: either_side_of_one(rng, a.contrast_range))
    mean, low, high = (f(image, dim=SPACE, keepdim=True) for f in (torch.mean, torch.amin, torch.amax))
    return torch.clamp((image - mean) * factor + mean, low, high)


def _low_resolution(image: Tensor, a: Augmentation, rngs: Rngs) -> Tensor:
    """Shrink each item by a factor of its own and enlarge it again; the sizes between differ, so one by one."""
    changed = []
    for item, rng in zip(image, rngs, strict=True):
        zoom = rng.uniform(*a.low_resolution_range)
        sizes = zip(AXES, item.shape[1:], strict=True)
        small = [n if axis == a.flat else max(1, round(n * zoom)) for axis, n in sizes]
        coarse = functional.interpolate(item[None], small, mode="nearest-exact")
        changed.append(functional.interpolate(coarse, item.shape[1:], mode="trilinear")[0])
    return torch.stack(changed)


def _gamma(image: Tensor, a: Augmentation, rngs: Rngs) -> Tensor:
    """Raise each channel, mapped to 0 .. 1, to a power; its mean and deviation stay."""
    power = _each(image, rngs, lambda rng: either_side_of_one(rng, a.gamma_range))
    low, high = (f(image, dim=SPACE, keepdim=True) for f in (torch.amin, torch.amax))
    changed = ((image - low) / (high - low).clamp_min(1e-7)) ** power
    std, mean = torch.std_mean(image, dim=SPACE, keepdim=True)
    new_std, new_mean = torch.std_mean(changed, dim=SPACE, keepdim=True)
    return (changed - new_mean) / new_std.clamp_min(1e-7) * std + mean


def _gamma_of_negative(image: Tensor, a: Augmentation, rngs: Rngs) -> Tensor:
    return -_gamma(-image, a, rngs)


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
