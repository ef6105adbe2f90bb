"""Winograd's short convolutions: three taps along an axis with fewer multiplications, exact but for rounding.

A tile of m neighbouring results of a convolution with three taps needs 3 m multiplications. Evaluated as a product of
polynomials at m + 1 points and at infinity (Toom 1963, Cook 1966; Winograd 1980, "Arithmetic complexity of
computations"; Lavin and Gray 2016, arXiv:1509.09308) it needs m + 2:

    y = A^T ((G g) * (B^T d))        d: m + 2 values, g: 3 taps, y: m results

Which convolutions are worth it was measured: docs/decisions/0024-fewer-multiplications.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

TAPS: Final = 3
POINTS: Final = tuple(map(Fraction, (0, 1, -1, 2, -2)))
"""Small numbers, whose powers round least; a tile of m takes the first m + 1."""

SPATIAL: Final = (2, 3, 4)
"""Axes of (N, C, I, J, K)."""


@dataclass(frozen=True)
class Form:
    """How a convolution is written.

    Attributes:
        axes: along which it is a product of polynomials.
        tile: m, results of one product.
        in_turn: one tile after the other along the first axis, so that what a tile needs stays in the cache.
    """

    axes: tuple[int, ...]
    tile: int
    in_turn: bool = False

    @property
    def gain(self) -> float:
        """Return how many times fewer multiplications it takes."""
        return (TAPS * self.tile / (self.tile + TAPS - 1)) ** len(self.axes)


@dataclass(frozen=True)
class Rule:
    """What is worth it up to an extent of the features.

    Attributes:
        extent: greatest number of voxels along the shortest axis; the others may have more.
        channels: that the convolution reads and writes, at least.
        axes: how many axes; each takes two thirds more weights, which are all that is read where features are small.
        in_turn: see `Form`.
    """

    extent: int
    channels: int
    axes: int
    in_turn: bool


RULES: Final = (
    Rule(extent=8, channels=128, axes=1, in_turn=False),
    Rule(extent=32, channels=64, axes=2, in_turn=False),
    Rule(extent=512, channels=32, axes=1, in_turn=True),
)

TILES: Final = {1: (4, 3, 2), 2: (4, 2)}
"""Number of axes -> tiles to choose from, the greatest that divides the axes first."""


def choose_form(weight: Sequence[int], features: Sequence[int]) -> Form | None:
    """Return the form for a convolution that keeps the size, None where the plain one is as good.

    Args:
        weight: its shape (C', C, I, J, K), each kernel axis 1 or 3.
        features: shape of what it reads (N, C, I, J, K).
    """
    axes = tuple(axis for axis in SPATIAL if weight[axis] == TAPS)
    extent = min(features[axis] for axis in SPATIAL)
    rule = next((rule for rule in RULES if extent <= rule.extent), None)
    if rule is None or not axes or min(weight[:2]) < rule.channels or features[0] != 1:
        return None
    if rule.in_turn and axes[0] != SPATIAL[0]:
        return None  # tiles along another axis lie apart in memory
    chosen = axes[: rule.axes]
    for tile in TILES[len(chosen)]:
        if all(features[axis] % tile == 0 for axis in chosen):
            return Form(chosen, tile, rule.in_turn)
    return None


def products(weight: Sequence[int], features: Sequence[int]) -> int:
    """Return the multiplications of the plain convolution."""
    return math.prod(weight) * math.prod(features[axis] for axis in SPATIAL)


@functools.cache
def matrices(tile: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return A^T (m, m + 2), G (m + 2, 3) and B^T (m + 2, m + 2) for tiles of m results."""
    points = POINTS[: tile + TAPS - 2]
    results = [[point**power for point in points] + [int(power == tile - 1)] for power in range(tile)]
    taps: list[list[Fraction]] = []
    data: list[list[Fraction]] = []
    for n, point in enumerate(points):
        others = [*points[:n], *points[n + 1 :]]
        scale = math.prod((point - other for other in others), start=Fraction(1))
        taps.append([point**power / scale for power in range(TAPS)])
        data.append([*_from_roots(others), Fraction(0)])
    taps.append([Fraction(power == TAPS - 1) for power in range(TAPS)])  # at infinity
    data.append(_from_roots(points))
    a, g, b = (np.array([[float(value) for value in row] for row in rows]) for rows in (results, taps, data))
    return a, g, b


def _from_roots(roots: Sequence[Fraction]) -> list[Fraction]:
    """Return the coefficients of the polynomial with these roots, constant first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *coefficients], [*coefficients, Fraction(0)]
        coefficients = [x - root * c for x, c in zip(shifted, scaled, strict=True)]
    return coefficients


def transform_weights(weight: NDArray[np.float32], form: Form) -> NDArray[np.float32]:
    """Return G g along the form's axes, ready to multiply: (products, C', C, I, J, K), 1 along these axes.

    The products' order is that of `form.axes`, the first changing fastest.
    """
    axes = form.axes[::-1]
    along: NDArray[Any] = np.ones((1, 1))
    for _ in axes:
        along = np.kron(along, matrices(form.tile)[1])
    taps = np.moveaxis(weight, axes, range(len(axes))).reshape(TAPS ** len(axes), -1)
    left = (1 if axis in axes else size for axis, size in enumerate(weight.shape))
    return (along.astype(np.float32) @ taps).reshape(-1, *left)
