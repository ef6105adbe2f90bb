"""What a run will need, computed before it starts."""

from __future__ import annotations

from typing import Final

import numpy as np

from dints_deploy.catalog.entry import Entry
from dints_deploy.errors import EngineError
from dints_deploy.imaging.geometry import orient, spaced
from dints_deploy.imaging.volume import Volume
from dints_deploy.runtime.preprocess import margins
from dints_deploy.runtime.restore import BLOCK_BYTES, label_dtype

BASE_BYTES: Final = 400 << 20
"""Allowance for interpreter, libraries and a loaded engine; the small shipped entry needs about half of it."""

FLOAT_BYTES: Final = 4


def estimate_bytes(scan: Volume, entry: Entry) -> int:
    """Return the peak memory of a run in bytes, from sizes alone: it is the same for every image of this shape."""
    grid = orient(Volume(scan.data[:1], scan.affine))[0].grid
    inner = grid if entry.spacing is None else spaced(grid, entry.spacing)
    before, after = margins(inner.shape, entry.window)
    shape = [b + n + a for b, n, a in zip(before, inner.shape, after, strict=True)]
    voxels = int(np.prod(shape))
    plane = shape[1] * shape[2]
    prepared = 3 * voxels * FLOAT_BYTES * scan.channels  # resampled, normalised and padded copies
    window = int(np.prod(entry.window)) * entry.outputs * FLOAT_BYTES * 3
    slabs = 3 * entry.outputs * entry.window[0] * plane * FLOAT_BYTES  # accumulator, finished slab, slab being restored
    largest = max(label.value for label in entry.labels)
    labels = 2 * int(np.prod(grid.shape)) * label_dtype(largest).itemsize
    return BASE_BYTES + scan.data.nbytes + prepared + window + slabs + 2 * BLOCK_BYTES + labels


def check_memory(scan: Volume, entry: Entry, limit_bytes: int | None) -> int:
    """Return the estimate; refuse before the run when it is over the limit.

    Raises:
        EngineError: `memory-limit`.
    """
    needed = estimate_bytes(scan, entry)
    if limit_bytes is not None and needed > limit_bytes:
        raise EngineError(
            "memory-limit", f"expected to fit {limit_bytes / 2**30:.2f} GiB, this scan needs {needed / 2**30:.2f} GiB"
        )
    return needed
