"""The pieces of a DiNTS network: cell operations, resampling and stems.

Every piece maps (N, C, I, J, K) to (N, C', I', J', K'). Cells are pre-activated: act, convolution, norm (DiNTS `Cell`).
Convolutions have no bias, as a norm follows; the norm is InstanceNorm with affine parameters, the act ReLU.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dints_search.genotype import Kind

Triple = tuple[int, int, int]

P3D_KERNELS: Final[dict[str, tuple[Triple, Triple]]] = {
    "p3d3x3x1": ((3, 3, 1), (1, 1, 3)),
    "p3d3x1x3": ((3, 1, 3), (1, 3, 1)),
    "p3d1x3x3": ((1, 3, 3), (3, 1, 1)),
}
"""The two kernels of each pseudo-3-D operation, in the order they are applied."""


def convolution(in_channels: int, out_channels: int, kernel: Triple, *, stride: int = 1) -> nn.Conv3d:
    """Return a bias-free convolution that keeps the size at stride 1 (odd kernels)."""
    i, j, k = kernel
    padding = (i // 2, j // 2, k // 2)
    return nn.Conv3d(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=False)


def normalisation(channels: int) -> nn.InstanceNorm3d:
    """Return the norm of every piece."""
    return nn.InstanceNorm3d(channels, eps=1e-5, affine=True)


def resize(x: Tensor, factor: float) -> Tensor:
    """Scale the number of voxels along every axis by a power of two, trilinearly, keeping the corner voxels' centres.

    That is `align_corners`. As a factor, not a size, it becomes an ONNX Resize with constant scales.
    """
    eager_cpu = x.is_cpu and not torch.compiler.is_compiling()
    if eager_cpu:  # torch's CPU kernel is several times as fast on this layout
        x = x.contiguous(memory_format=torch.channels_last_3d)
    x = functional.interpolate(x, scale_factor=factor, mode="trilinear", align_corners=True)
    return x.contiguous() if eager_cpu else x


class ActConvNorm(nn.Module):
    """ReLU, convolution, norm."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = convolution(in_channels, out_channels, (kernel, kernel, kernel))
        self.norm = normalisation(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the size."""
        return self.norm(self.conv(functional.relu(x)))  # type: ignore[no-any-return]


class PseudoConv3d(nn.Module):
    """ReLU, a planar convolution, a convolution along the remaining axis, norm (P3D)."""

    def __init__(self, channels: int, kernels: tuple[Triple, Triple]) -> None:
        super().__init__()
        self.conv_plane = convolution(channels, channels, kernels[0])
        self.conv_line = convolution(channels, channels, kernels[1])
        self.norm = normalisation(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the size."""
        return self.norm(self.conv_line(self.conv_plane(functional.relu(x))))  # type: ignore[no-any-return]


class FactorizedReduce(nn.Module):
    """Halve the size: 1x1x1 convolutions of the even and of the odd voxels, each giving half of the channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_even = convolution(in_channels, out_channels // 2, (1, 1, 1), stride=2)
        self.conv_odd = convolution(in_channels, out_channels - out_channels // 2, (1, 1, 1), stride=2)
        self.norm = normalisation(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Halve every axis, which must be even."""
        x = functional.relu(x)
        return self.norm(torch.cat([self.conv_even(x), self.conv_odd(x[:, :, 1:, 1:, 1:])], dim=1))  # type: ignore[no-any-return]


class FactorizedIncrease(nn.Module):
    """Double the size, with a pre-activated 1x1x1 convolution after (`reference`) or before (`conv_first`)."""

    def __init__(self, in_channels: int, out_channels: int, *, order: Literal["reference", "conv_first"]) -> None:
        super().__init__()
        self.unit = ActConvNorm(in_channels, out_channels, 1)
        self.upsample_first = order == "reference"

    def forward(self, x: Tensor) -> Tensor:
        """Double every axis."""
        return self.unit(resize(x, 2)) if self.upsample_first else resize(self.unit(x), 2)


class InputStem(nn.Module):
    """Bring the raw image to a level: resize by 1 / 2^level, convolve, norm, ReLU, convolve with stride 2, norm."""

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, *, level: int) -> None:
        super().__init__()
        self.level = level
        self.conv_first = convolution(in_channels, mid_channels, (3, 3, 3))
        self.norm_first = normalisation(mid_channels)
        self.conv_second = convolution(mid_channels, out_channels, (3, 3, 3), stride=2)
        self.norm_second = normalisation(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Divide every axis by 2^(level + 1)."""
        if self.level > 0:
            x = resize(x, 0.5**self.level)
        x = functional.relu(self.norm_first(self.conv_first(x)))
        return self.norm_second(self.conv_second(x))  # type: ignore[no-any-return]


class DirectSkip(nn.Module):
    """Bring the raw image to the head at full resolution: convolve, norm."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = convolution(in_channels, out_channels, (3, 3, 3))
        self.norm = normalisation(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the size."""
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


class OutputStem(nn.Module):
    """Bring a level's features to the next finer one: ReLU, convolution, norm, double the size."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.unit = ActConvNorm(in_channels, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Double every axis."""
        return resize(self.unit(x), 2)


class Head(nn.Module):
    """Turn the full-resolution features into logits."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.unit = ActConvNorm(channels, channels, 3)
        self.classify = nn.Conv3d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the size."""
        return self.classify(self.unit(x))  # type: ignore[no-any-return]


class Cell(nn.Module):
    """One edge: change the level if need be, then apply the edge's operation (DiNTS `Cell`)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kind: Kind,
        operation: str,
        up: Literal["reference", "conv_first"],
    ) -> None:
        super().__init__()
        self.resample = resampling(in_channels, out_channels, kind=kind, up=up)
        self.operation = cell_operation(operation, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Halve (`down`), keep or double (`up`) every axis."""
        return self.operation(self.resample(x))  # type: ignore[no-any-return]


def resampling(in_channels: int, out_channels: int, *, kind: Kind, up: Literal["reference", "conv_first"]) -> nn.Module:
    """Return the module that brings a node's features to the level its edge enters."""
    if kind == "down":
        return FactorizedReduce(in_channels, out_channels)
    if kind == "up":
        return FactorizedIncrease(in_channels, out_channels, order=up)
    return nn.Identity()


def cell_operation(name: str, channels: int) -> nn.Module:
    """Return the operation called `name` in `dints_search.genotype.OPERATIONS`; it keeps size and channels."""
    if name == "skip":
        return nn.Identity()
    if name == "conv3x3x3":
        return ActConvNorm(channels, channels, 3)
    return PseudoConv3d(channels, P3D_KERNELS[name])
