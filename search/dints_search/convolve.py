"""Convolutions of the search network in the form that torch computes fastest, float32 on a CPU.

torch 2.13 leaves a small single scan in float32 to a convolution without oneDNN, at a fifth of its speed, and is slow
along axis i alone. Kernels of one voxel are matrix products, flat ones convolutions of images, which are never left to
it, and the others are done in two groups of channels, which are not either.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

SLOW_BELOW: Final = 20480
"""Values of channels x I x J up to which torch leaves a single float32 scan to its slow convolution."""


def convolve(weight: Tensor, x: Tensor) -> Tensor:
    """Convolve a scan (N, C, I, J, K) at stride 1 with an odd kernel (O, C, 3, 3, 3), keeping the size; no bias.

    Where the weights outweigh the scan, as at the deepest level, torch's own choice is as fast.
    """
    flat = tuple(n == 1 for n in weight.shape[2:])
    if x.is_cpu and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        if all(flat):
            return functional.linear(x.permute(0, 2, 3, 4, 1), weight.flatten(1)).permute(0, 4, 1, 2, 3)
        if flat == (False, True, True):
            return _along_first_axis(weight, x)
        if x.shape[0] == 1 and x[0, :, :, :, 0].numel() <= SLOW_BELOW and weight.numel() <= 2 * x.numel():
            return _plane_by_plane(weight, x) if flat[0] else _in_groups(weight, x)
    return functional.conv3d(x, weight, padding=[n // 2 for n in weight.shape[2:]])


def _along_first_axis(weight: Tensor, x: Tensor) -> Tensor:
    """Convolve along i only: images whose axes are i, and j and k as one."""
    n, c, i, j, k = x.shape
    images = x.permute(0, 2, 3, 4, 1).reshape(n, i, j * k, c).permute(0, 3, 1, 2)  # (N, C, I, JK)
    y = functional.conv2d(images, weight[..., 0], padding=(weight.shape[2] // 2, 0))
    return y.permute(0, 2, 3, 1).reshape(n, i, j, k, -1).permute(0, 4, 1, 2, 3)


def _plane_by_plane(weight: Tensor, x: Tensor) -> Tensor:
    """Convolve along j and k only: a batch of I images."""
    n, c, i, j, k = x.shape
    images = x.permute(0, 2, 1, 3, 4).reshape(n * i, c, j, k)
    y = functional.conv2d(images, weight[:, :, 0], padding=(weight.shape[3] // 2, weight.shape[4] // 2))
    return y.view(n, i, -1, j, k).permute(0, 2, 1, 3, 4)


def _in_groups(weight: Tensor, x: Tensor) -> Tensor:
    """Convolve the two halves of the input channels apart, as groups, and add the results; an only channel as it is."""
    wide, channels, *kernel = weight.shape
    padding = [n // 2 for n in kernel]
    if channels % 2:
        return functional.conv3d(x, weight, padding=padding)
    split = weight.reshape(wide, 2, channels // 2, *kernel).transpose(0, 1)  # (2, O, C / 2, 3, 3, 3)
    first, second = functional.conv3d(x, split.flatten(0, 1), padding=padding, groups=2).chunk(2, dim=1)
    return first + second
