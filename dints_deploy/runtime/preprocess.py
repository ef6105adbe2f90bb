"""prepare: a scan becomes network input, and remembers how to bring labels and logits back.

The same function serves training, validation and the appliance, so what is validated is what is deployed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dints_deploy.catalog.preparation import Channel, Identity, Intensity, Preparation, Window, ZScore
from dints_deploy.errors import ScanRefused
from dints_deploy.imaging.geometry import Inverse, orient, pad, resample, spaced
from dints_deploy.imaging.volume import Grid, Volume

LABEL_LIKE_VALUES = 12
"""Whole numbers with at most this many distinct values are a label map: scans have more (tests hold the margin)."""

MOST_LABELS = 512
"""Whole numbers with more distinct values than this are never taken for a label map."""

FLAT_SHARE = 0.5
"""Share of equal neighbours inside structures above which few whole numbers are labels; in scans noise keeps it low."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """Network input and the way back.

    Attributes:
        data: (C, I, J, K) float32 on the network's grid, at least one window large.
        grid: the network's grid, padding included.
        inner: the network's grid without the padding.
        before: voxels of padding before `inner` along i, j, k.
        oriented: the scan's own grid, reoriented to RAS.
        source: the scan's grid as it was read.
        unorient: brings a volume on `oriented` back to `source`.
    """

    data: NDArray[np.float32]
    grid: Grid
    inner: Grid
    before: tuple[int, int, int]
    oriented: Grid
    source: Grid
    unorient: Inverse

    def labels(self, reference: Volume) -> NDArray[Any]:
        """Bring a label map on the scan's grid to the network's grid (nearest voxel, 0 around): (I, J, K)."""
        oriented, _ = orient(reference)
        inner, _ = resample(oriented, self.inner, "nearest")
        after = [g - n - b for g, n, b in zip(self.grid.shape, self.inner.shape, self.before, strict=True)]
        padded: NDArray[Any] = pad(inner, self.before, after)[0].data[0]
        return padded


def check_voxels(scan: Volume) -> None:
    """Refuse voxels that no network can say anything about.

    Raises:
        ScanRefused: `scan-nonfinite`, `scan-constant`, `scan-looks-like-labels`.
    """
    for channel, voxels in enumerate(scan.data):
        if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
            count = int(voxels.size - np.isfinite(voxels).sum())
            raise ScanRefused(
                "scan-nonfinite", f"expected finite voxels, found {count} NaN or infinite: convert it again"
            )
        if voxels.min() == voxels.max():
            raise ScanRefused(
                "scan-constant", f"expected an image, found one value in every voxel of channel {channel}"
            )
        if _looks_like_labels(voxels):
            found = len(np.unique(voxels))
            raise ScanRefused(
                "scan-looks-like-labels", f"expected a scan, found {found} distinct whole numbers: is this a label map?"
            )


def _looks_like_labels(voxels: NDArray[Any]) -> bool:
    """Say whether these are whole numbers that are few, or that stand in flat pieces."""
    if voxels.size <= LABEL_LIKE_VALUES:
        return False
    # A sample settles nearly every real scan without sorting the whole volume.
    sample = np.unique(voxels.reshape(-1)[:: max(1, voxels.size // 4096)])
    if len(sample) > MOST_LABELS or (sample != np.round(sample)).any():
        return False
    values, counts = np.unique(voxels, return_counts=True)
    if len(values) > MOST_LABELS or (values != np.round(values)).any():
        return False
    return len(values) <= LABEL_LIKE_VALUES or _flat_share(voxels, values[counts.argmax()]) > FLAT_SHARE


def _flat_share(voxels: NDArray[Any], background: Any) -> float:
    """Return how often a voxel along k equals the one before it, where neither is background."""
    before, after = voxels[..., :-1], voxels[..., 1:]
    inside = (before != background) & (after != background)
    return float((before == after)[inside].mean()) if inside.any() else 0.0


def prepare(scan: Volume, preparation: Preparation) -> Prepared:
    """Orient to RAS, resample to the entry's spacing, normalise each channel, pad to at least one window.

    Raises:
        ScanRefused: `scan-channels`, and those of `check_voxels`.
    """
    check_channels(scan, preparation)
    check_voxels(scan)
    oriented, unorient = orient(scan)
    inner = oriented.grid if preparation.spacing is None else spaced(oriented.grid, preparation.spacing)
    resampled, _ = resample(oriented, inner)
    normalised = [
        normalise(voxels, channel.intensity)
        for voxels, channel in zip(resampled.data, preparation.channels, strict=True)
    ]
    before, after = margins(inner.shape, preparation.window)
    data = np.stack(
        [_padded(v, before, after, c) for v, c in zip(normalised, preparation.channels, strict=True)]
    )  # (C, I, J, K)
    grid = pad(Volume(resampled.data[:1], inner.affine), before, after)[0].grid
    return Prepared(data, grid, inner, before, oriented.grid, scan.grid, unorient)


def check_channels(scan: Volume, preparation: Preparation) -> None:
    """Refuse a scan whose number of channels is not the entry's."""
    if scan.channels != len(preparation.channels):
        names = ", ".join(c.name for c in preparation.channels)
        raise ScanRefused(
            "scan-channels", f"expected {len(preparation.channels)} channel(s) ({names}), found {scan.channels}"
        )


def margins(shape: Sequence[int], window: Sequence[int]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the padding before and after each axis that makes `shape` at least `window`; the scan in the middle."""
    missing = [max(0, w - n) for n, w in zip(shape, window, strict=True)]
    before = [m // 2 for m in missing]
    after = [m - b for m, b in zip(missing, before, strict=True)]
    return (before[0], before[1], before[2]), (after[0], after[1], after[2])


def _padded(
    voxels: NDArray[np.float32], before: Sequence[int], after: Sequence[int], channel: Channel
) -> NDArray[np.float32]:
    fill = 0.0 if channel.fill == "zero" else float(voxels.min())
    return np.pad(voxels, list(zip(before, after, strict=True)), mode="constant", constant_values=fill)


def normalise(voxels: NDArray[Any], intensity: Intensity) -> NDArray[np.float32]:
    """Return one channel (I, J, K) as float32, normalised by its scheme."""
    values = voxels.astype(np.float32)
    match intensity:
        case Identity():
            return values
        case Window(lower=lower, upper=upper, mean=mean, std=std):
            np.clip(values, lower, upper, out=values)
            offset, scale = (lower, upper - lower) if mean is None or std is None else (mean, std)
            return (values - np.float32(offset)) / np.float32(scale)
        case ZScore():
            return _zscore(values, intensity)


def _zscore(values: NDArray[np.float32], scheme: ZScore) -> NDArray[np.float32]:
    inside = values != 0 if scheme.nonzero else np.ones(values.shape, bool)
    if scheme.clip_percentiles is not None:
        lower, upper = np.percentile(values[inside], scheme.clip_percentiles)
        values = np.where(inside, np.clip(values, np.float32(lower), np.float32(upper)), values)
    chosen = values[inside].astype(np.float64)  # maxima of 1e6 are real: the sum of squares needs the digits
    std = chosen.std()
    if std == 0:
        raise ScanRefused("scan-constant", "expected varying intensities, found one value after clipping outliers")
    return np.where(inside, (values - chosen.mean()) / std, 0).astype(np.float32)
