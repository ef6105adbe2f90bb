"""Random changes of a training patch. MONAI does the work; preparation is the appliance's alone."""

from __future__ import annotations

from typing import Any, Final

from monai.transforms import (
    Compose,
    Rand3DElasticd,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandSimulateLowResolutiond,
)
from monai.utils.type_conversion import convert_to_tensor
from torch import Tensor

from dints_search.recipe import Augmentation

IMAGE: Final = "image"
LABEL: Final = "label"
AXES: Final = {"i": 0, "j": 1, "k": 2}


class Augmenter:
    """Apply a recipe's augmentations to one patch; equal seeds give equal results."""

    def __init__(self, settings: Augmentation) -> None:
        self._compose = Compose([*_spatial(settings), *_intensity(settings)])

    def __call__(self, image: Tensor, label: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return the changed image (C, I, J, K) and label (1, I, J, K)."""
        self._compose.set_random_state(seed=seed)
        changed: Any = self._compose({IMAGE: image, LABEL: label})
        return convert_to_tensor(changed[IMAGE]).float(), convert_to_tensor(changed[LABEL])


def _spatial(a: Augmentation) -> list[Any]:
    both = [IMAGE, LABEL]
    transforms: list[Any] = []
    if a.affine:
        transforms.append(
            RandAffined(
                both,
                prob=a.affine,
                rotate_range=[a.rotation] * 3,
                scale_range=[a.scaling] * 3,
                translate_range=[a.translation] * 3,
                mode=["bilinear", "nearest"],
                padding_mode="zeros",
            )
        )
    if a.elastic:
        transforms.append(
            Rand3DElasticd(
                both,
                prob=a.elastic,
                sigma_range=(5, 8),
                magnitude_range=(50, 150),
                mode=["bilinear", "nearest"],
                padding_mode="zeros",
            )
        )
    transforms += [RandFlipd(both, prob=0.5, spatial_axis=AXES[axis]) for axis in a.mirror]
    return transforms


def _intensity(a: Augmentation) -> list[Any]:
    low, high = a.blur_sigma
    return [
        RandGaussianNoised(IMAGE, prob=a.noise, std=a.noise_std),
        RandGaussianSmoothd(IMAGE, prob=a.blur, sigma_x=(low, high), sigma_y=(low, high), sigma_z=(low, high)),
        RandScaleIntensityd(IMAGE, factors=a.brightness_range, prob=a.brightness),
        RandSimulateLowResolutiond(IMAGE, prob=a.low_resolution, zoom_range=(0.5, 1.0)),
        RandAdjustContrastd(IMAGE, prob=a.gamma, gamma=a.gamma_range, retain_stats=True),
    ]
