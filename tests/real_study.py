"""Write a NIfTI scan as the DICOM MR series that a scanner would have sent: real voxels, made-up identifiers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import MRImageStorage

from dints_deploy import read_nifti
from tests.dicom_phantoms import Phantom, write


def write_study(scan: Path, folder: Path, *, seed: int) -> list[Path]:
    """Write the slices of a scan whose axes are those of the patient; `seed` makes a study of its own."""
    volume = read_nifti(scan)
    matrix = volume.grid.affine  # RAS+ mm
    spacing = np.diag(matrix)[:3]
    if not (np.allclose(matrix[:3, :3], np.diag(spacing)) and (spacing > 0).all()):
        raise ValueError(f"expected axes along the patient's right, front and head, found {matrix[:3, :3].tolist()}")
    data = volume.data[0]  # (I, J, K)
    pixels = np.rint(data * min(1.0, 4095 / data.max())).astype(np.uint16)[::-1, ::-1].transpose(2, 1, 0)
    first = matrix[:3, 3] + spacing * [data.shape[0] - 1, data.shape[1] - 1, 0]
    steps = np.arange(data.shape[2])[:, np.newaxis] * [0.0, 0.0, spacing[2]]
    phantom = Phantom(
        pixels=np.ascontiguousarray(pixels),
        positions=first * [-1.0, -1.0, 1.0] + steps,  # LPS mm
        between_rows=float(spacing[1]),
        between_columns=float(spacing[0]),
    )

    def as_mr(ds: Dataset, index: int) -> None:
        ds.SOPClassUID = MRImageStorage
        ds.Modality, ds.SeriesDescription = "MR", "T1 hippocampus crop"
        ds.SliceThickness = f"{spacing[2]:g}"
        ds.ScanningSequence, ds.SequenceVariant, ds.MRAcquisitionType = "GR", "NONE", "3D"
        ds.RepetitionTime, ds.EchoTime, ds.FlipAngle = "8.2", "3.8", "8"

    return write(folder, phantom, change=as_mr, name=f"study {seed}")
