"""Decode image planes into a stack of rescaled values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pydicom
from numpy.typing import NDArray

from dints_deploy.dicom.header import SliceHeader


def decode(slices: Sequence[SliceHeader]) -> NDArray[np.float32]:
    """Return the modality values of `slices` as (slices, rows, columns)."""
    layout = slices[0].layout
    stack = np.empty((len(slices), layout.Rows, layout.Columns), dtype=np.float32)
    for plane, header in zip(stack, slices, strict=True):
        stored = pydicom.dcmread(header.path).pixel_array
        slope, intercept = header.RescaleSlope or 1.0, header.RescaleIntercept or 0.0
        plane[...] = (stored if stored.ndim == 2 else stored[header.frame]) * slope + intercept
    return stack
