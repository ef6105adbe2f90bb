"""What happens to a label map after the network: keep the largest part, drop what is too small."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dints_deploy.catalog.entry import Entry
from dints_deploy.imaging.volume import Volume


def postprocess(labels: Volume, entry: Entry) -> Volume:
    """Apply the entry's rules to a label map on the scan's grid, in the order the entry documents."""
    rules = entry.postprocess
    data = labels.data[0]
    for value in rules.keep_largest:
        data = keep_largest(data, value)
    for label in entry.labels:
        least = rules.min_volume_ml.get(label.id, 0.0)
        mask = data == label.value
        if 0 < np.count_nonzero(mask) * labels.grid.voxel_ml < least:
            data = np.where(mask, data.dtype.type(0), data)
    return labels if data is labels.data[0] else Volume(data[np.newaxis], labels.affine)


def keep_largest(data: NDArray[Any], value: int) -> NDArray[Any]:
    """Return the label map (I, J, K) with only the largest connected part (26 neighbours) of one label.

    Of equally large parts the one that comes first in the array stays.
    """
    from scipy.ndimage import label

    parts, count = label(data == value, structure=np.ones((3, 3, 3)))
    if count < 2:
        return data
    sizes = np.zeros(count + 1, np.int64)
    for plane in parts:  # counting copies to int64: not all at once
        sizes += np.bincount(plane.ravel(), minlength=count + 1)
    sizes[0] = 0
    return np.where((parts > 0) & (parts != sizes.argmax()), data.dtype.type(0), data)
