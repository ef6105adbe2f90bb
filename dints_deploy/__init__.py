"""The appliance: segment 3-D medical scans with networks of the zoo. Needs neither torch nor MONAI. Research use only.

>>> from dints_deploy import load_entry, read_nifti, segment
>>> result = segment(read_nifti(Path("scan.nii.gz")), load_entry("hippocampus"))
>>> result.volumes_ml
"""

from dints_deploy.catalog.catalog import LoadedEntry, load_entry
from dints_deploy.errors import DintsError, ScanRefused
from dints_deploy.imaging.nifti import read_nifti, write_nifti
from dints_deploy.imaging.volume import Volume
from dints_deploy.runtime.segment import Segmentation, segment

__all__ = [
    "DintsError",
    "LoadedEntry",
    "ScanRefused",
    "Segmentation",
    "Volume",
    "load_entry",
    "read_nifti",
    "segment",
    "write_nifti",
]
