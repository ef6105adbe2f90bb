"""prepare: a scan becomes network input, and remembers how to bring labels and logits back.

The same function serves training, validation and the appliance, so what is validated is what is deployed. Input is
made box by box, when it is asked for: a box is the same whether it is cut from the whole or made alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dints_deploy.catalog.preparation import Channel, Preparation
from dints_deploy.errors import ScanRefused
from dints_deploy.imaging.geometry import Inverse, Line, orient, pad, resample, shared_axes, spaced
from dints_deploy.imaging.volume import Grid, Volume
from dints_deploy.runtime.intensity import Pieces, Scaling, Voxels, scaling
from dints_deploy.runtime.voxels import check_voxels

PIECE_BYTES: Final = 8 << 20
"""Network input that is made at a time; what making it takes is a few times this."""

Triple = tuple[int, int, int]
Lines = tuple[Line, Line, Line]


@dataclass(frozen=True, eq=False)
class Prepared:
    """Network input and the way back. Axes are i, j, k, unless `along` put another first.

    Attributes:
        scan: (C, I, J, K), the scan reoriented to RAS, before resampling.
        scalings: one per channel.
        fills: of the padding, one per channel.
        grid: the network's grid, padding included: at least one window large.
        inner: the network's grid without the padding.
        before: voxels of padding before `inner` along i, j, k.
        source: the scan's grid as it was read.
        unorient: brings a volume on the scan's reoriented grid back to `source`.
        axes: which of i, j, k each axis is. Interpolation goes along i first, whatever the order, so that every order
            gives the same voxels to the bit.
    """

    scan: Volume
    scalings: tuple[Scaling, ...]
    fills: tuple[float, ...]
    grid: Grid
    inner: Grid
    before: Triple
    source: Grid
    unorient: Inverse
    axes: Triple = (0, 1, 2)

    @property
    def oriented(self) -> Grid:
        """Return the scan's own grid, reoriented to RAS."""
        return self.scan.grid

    @cached_property
    def lines(self) -> Lines:
        """Return where the voxels of `inner` lie between those of the scan, along i, j, k."""
        return _lines(self.oriented, self.inner)

    @cached_property
    def back(self) -> Lines:
        """Return where the voxels of the scan lie between those of `inner`, along i, j, k."""
        return _lines(self.inner, self.oriented)

    @cached_property
    def data(self) -> Voxels:
        """Return the whole network input (C, I, J, K)."""
        return self.box((0, 0, 0), self.grid.shape)

    def box(self, start: Sequence[int], stop: Sequence[int]) -> Voxels:
        """Return the network input (C, I, J, K) of the voxels start <= ijk < stop of `grid`."""
        sizes = [b - a for a, b in zip(start, stop, strict=True)]
        out = np.empty((self.scan.channels, *sizes), np.float32)
        for channel, fill in zip(out, self.fills, strict=True):
            channel[...] = fill
        low = [max(a, b) for a, b in zip(start, self.before, strict=True)]
        high = [min(a, b + n) for a, b, n in zip(stop, self.before, self.inner.shape, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return out
        inside = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        first = [a - b for a, b in zip(low, self.before, strict=True)]
        count = [b - a for a, b in zip(low, high, strict=True)]
        for channel, scale, voxels in zip(out, self.scalings, self.scan.data, strict=True):
            channel[inside] = scale(_resampled(voxels, self.lines, first, count, self.axes))
        return out

    def along(self, axis: int) -> Prepared:
        """Return the same with `axis` before the other two; `unorient` still gives the source's own order."""
        order = (axis, *(a for a in range(3) if a != axis))
        home = [order.index(a) for a in range(3)]

        def unorient(moved: Volume) -> Volume:
            return self.unorient(_permuted(moved, home))

        return replace(
            self,
            scan=_permuted(self.scan, order),
            grid=_permuted_grid(self.grid, order),
            inner=_permuted_grid(self.inner, order),
            before=_reordered(self.before, order),
            unorient=unorient,
            axes=_reordered(self.axes, order),
        )

    def labels(self, reference: Volume) -> NDArray[Any]:
        """Bring a label map on the scan's grid to the network's grid (nearest voxel, 0 around): (I, J, K)."""
        oriented, _ = orient(reference)
        inner, _ = resample(oriented, self.inner, "nearest")
        after = [g - n - b for g, n, b in zip(self.grid.shape, self.inner.shape, self.before, strict=True)]
        padded: NDArray[Any] = pad(inner, self.before, after)[0].data[0]
        return padded


def prepare(scan: Volume, preparation: Preparation) -> Prepared:
    """Orient to RAS, resample to the entry's spacing, normalise each channel, pad to at least one window.

    What needs the whole scan (statistics) is done here; the voxels are made when they are asked for.

    Raises:
        ScanRefused: `scan-channels`, and those of `check_voxels`.
    """
    check_channels(scan, preparation)
    check_voxels(scan)
    oriented, unorient = orient(scan)
    inner = oriented.grid if preparation.spacing is None else spaced(oriented.grid, preparation.spacing)
    lines = _lines(oriented.grid, inner)
    before, after = margins(inner.shape, preparation.window)
    scalings, fills = [], []
    for channel, voxels in zip(preparation.channels, oriented.data, strict=True):
        pieces = _pieces(voxels, lines)
        scalings.append(scaling(channel.intensity, pieces))
        fills.append(_fill(channel, scalings[-1], pieces) if any((*before, *after)) else 0.0)
    padded = tuple(b + n + a for b, n, a in zip(before, inner.shape, after, strict=True))
    corner = inner.affine.copy()
    corner[:3, 3] = inner.to_world(-np.array(before, dtype=np.float64))
    grid = Grid((padded[0], padded[1], padded[2]), corner)
    return Prepared(oriented, tuple(scalings), tuple(fills), grid, inner, before, scan.grid, unorient)


def _lines(source: Grid, target: Grid) -> Lines:
    lines = shared_axes(source, target)
    if lines is None:
        raise ValueError("expected the network's grid to share the scan's axes")
    return lines


def _pieces(voxels: NDArray[Any], lines: Lines) -> Pieces:
    """Return what gives one channel on the network's grid piece by piece, cut across its slowest axis."""
    axis = int(np.argmax(np.abs(voxels.strides)))
    sizes = [len(line.lower) for line in lines]
    planes = max(1, PIECE_BYTES * sizes[axis] // (4 * math.prod(sizes)))

    def piece(start: int) -> Voxels:
        first, count = [0, 0, 0], list(sizes)
        first[axis], count[axis] = start, min(planes, sizes[axis] - start)
        return _resampled(voxels, lines, first, count)

    if planes >= sizes[axis]:
        whole = piece(0)
        return lambda: [whole]
    return lambda: map(piece, range(0, sizes[axis], planes))


def _resampled(
    voxels: NDArray[Any], lines: Lines, first: Sequence[int], count: Sequence[int], axes: Triple = (0, 1, 2)
) -> Voxels:
    """Return a box of one channel (I, J, K) on the network's grid; `axes` as in `Prepared`."""
    parts = [line.within(a, n) for line, a, n in zip(lines, first, count, strict=True)]
    values: Voxels = voxels[tuple(needed for _, needed in parts)].astype(np.float32, copy=False)
    for axis in sorted(range(3), key=lambda axis: axes[axis]):
        values = parts[axis][0].linear(values, axis)
    return values


def _fill(channel: Channel, scale: Scaling, pieces: Pieces) -> float:
    return 0.0 if channel.fill == "zero" else min(float(scale(values).min()) for values in pieces())


def _reordered(values: Sequence[Any], order: Sequence[int]) -> tuple[Any, Any, Any]:
    return values[order[0]], values[order[1]], values[order[2]]


def _permuted(volume: Volume, order: Sequence[int]) -> Volume:
    """Return a view of the volume with its axes in another order."""
    return Volume(volume.data.transpose(0, *(1 + a for a in order)), _permuted_grid(volume.grid, order).affine)


def _permuted_grid(grid: Grid, order: Sequence[int]) -> Grid:
    return Grid(_reordered(grid.shape, order), grid.affine[:, [*order, 3]])


def check_channels(scan: Volume, preparation: Preparation) -> None:
    """Refuse a scan whose number of channels is not the entry's."""
    if scan.channels != len(preparation.channels):
        names = ", ".join(c.name for c in preparation.channels)
        raise ScanRefused(
            "scan-channels", f"expected {len(preparation.channels)} channel(s) ({names}), found {scan.channels}"
        )


def margins(shape: Sequence[int], window: Sequence[int]) -> tuple[Triple, Triple]:
    """Return the padding before and after each axis that makes `shape` at least `window`; the scan in the middle."""
    missing = [max(0, w - n) for n, w in zip(shape, window, strict=True)]
    before = [m // 2 for m in missing]
    after = [m - b for m, b in zip(missing, before, strict=True)]
    return (before[0], before[1], before[2]), (after[0], after[1], after[2])
