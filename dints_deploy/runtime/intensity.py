"""Normalise intensities: a scheme, with the statistics of the whole channel, becomes a function of any part of it.

Statistics are taken piece by piece, so that no second copy of a large scan is needed; percentiles are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dints_deploy.catalog.preparation import Identity, Intensity, Window, ZScore
from dints_deploy.errors import ScanRefused

Voxels = NDArray[np.float32]
Pieces = Callable[[], Iterable[Voxels]]
"""Gives the channel piece by piece, as often as it is called."""

Scaling = Callable[[Voxels], Voxels]
"""Normalises any part of a channel; its input is not changed."""

HALF: Final = 16
"""Bits of a float32 that one round of counting settles."""


def normalise(voxels: NDArray[Any], intensity: Intensity) -> Voxels:
    """Return one channel (I, J, K) as float32, normalised by its scheme.

    Raises:
        ScanRefused: `scan-constant` where the scheme leaves one value.
    """
    values = voxels.astype(np.float32)
    return scaling(intensity, lambda: [values])(values)


def scaling(intensity: Intensity, pieces: Pieces) -> Scaling:
    """Return the function that normalises any part of a channel, given all of it in pieces.

    Raises:
        ScanRefused: `scan-constant` where the scheme leaves one value.
    """
    match intensity:
        case Identity():
            return lambda values: values
        case Window(lower=lower, upper=upper, mean=mean, std=std):
            offset, scale = (lower, upper - lower) if mean is None or std is None else (mean, std)
            return lambda values: (np.clip(values, lower, upper) - np.float32(offset)) / np.float32(scale)
        case ZScore():
            return _zscore(intensity, pieces)


def _zscore(scheme: ZScore, pieces: Pieces) -> Scaling:
    def chosen() -> Iterable[Voxels]:
        return (values[values != 0] if scheme.nonzero else values for values in pieces())

    limits = percentiles(chosen, scheme.clip_percentiles) if scheme.clip_percentiles else None

    def clipped(values: Voxels) -> Voxels:
        return values if limits is None else np.clip(values, limits[0], limits[1])

    mean, std = mean_and_std(clipped(values) for values in chosen())
    if std == 0:
        raise ScanRefused("scan-constant", "expected varying intensities, found one value after clipping outliers")

    def scale(values: Voxels) -> Voxels:
        scaled = clipped(values).astype(np.float64)
        scaled -= mean
        scaled /= std
        if scheme.nonzero:
            scaled[values == 0] = 0
        return scaled.astype(np.float32)

    return scale


def mean_and_std(pieces: Iterable[Voxels]) -> tuple[np.float64, np.float64]:
    """Return mean and standard deviation over all pieces.

    Pieces are merged by their count, mean and sum of squared deviations (Chan, Golub, LeVeque 1983), in float64:
    intensities of 1e6 are real, and a sum of squares needs the digits.
    """
    count, mean, squares = 0, np.float64(0), np.float64(0)
    for piece in pieces:
        values = piece.astype(np.float64)
        if not values.size:
            continue
        own, total = values.mean(), count + values.size
        squares += values.var() * values.size + (own - mean) ** 2 * count * values.size / total
        mean += (own - mean) * values.size / total
        count = total
    return mean, np.sqrt(squares / count)


def percentiles(pieces: Pieces, shares: Sequence[float]) -> tuple[np.float32, ...]:
    """Return percentiles (0..100) of all values, linear between neighbours: numpy's, without sorting a copy."""
    count = sum(values.size for values in pieces())
    places = [share / 100 * (count - 1) for share in shares]
    ranks = sorted({rank for place in places for rank in (int(place), min(int(place) + 1, count - 1))})
    ordered = dict(zip(ranks, _order_statistics(pieces, ranks), strict=True))
    found = []
    for place in places:
        low, high = ordered[int(place)], ordered[min(int(place) + 1, count - 1)]
        share = place - int(place)
        step = np.float64(high - low)
        found.append(np.float32(low + step * share if share < 0.5 else high - step * (1 - share)))
    return tuple(found)


def _order_statistics(pieces: Pieces, ranks: Sequence[int]) -> list[np.float32]:
    """Return the values of the given ranks: count by the upper half of the bits, then by the lower half."""
    upper = np.zeros(1 << HALF, np.intp)
    for values in pieces():
        upper += np.bincount((_key(values) >> HALF).ravel(), minlength=1 << HALF)
    behind = np.cumsum(upper)
    buckets = np.searchsorted(behind, ranks, side="right")
    lower = {int(bucket): np.zeros(1 << HALF, np.intp) for bucket in buckets}
    for values in pieces():
        key = _key(values)
        for bucket, counts in lower.items():
            inside = key[key >> HALF == bucket] & ((1 << HALF) - 1)
            counts += np.bincount(inside, minlength=1 << HALF)
    found = []
    for rank, bucket in zip(ranks, buckets.tolist(), strict=True):
        before = int(behind[bucket] - upper[bucket])
        low = int(np.searchsorted(np.cumsum(lower[bucket]), rank - before, side="right"))
        found.append(_value(bucket << HALF | low))
    return found


def _key(values: Voxels) -> NDArray[np.uint32]:
    """Return unsigned numbers in the same order as the floats."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    flipped = (bits >> np.uint32(31)) * np.uint32(0x7FFFFFFF)  # the sign of a positive number, all of a negative one
    key: NDArray[np.uint32] = bits ^ (flipped | np.uint32(1 << 31))
    return key


def _value(key: int) -> np.float32:
    """Return the float of a key."""
    bits = key ^ (1 << 31) if key >> 31 else key ^ 0xFFFFFFFF
    return np.float32(np.array(bits, np.uint32).view(np.float32))
