"""The appliance: segment 3-D medical scans with networks of the zoo. Needs neither torch nor MONAI. Research use only.

>>> from dints_deploy import load_entry, read_nifti, segment
>>> result = segment(read_nifti(Path("scan.nii.gz")), load_entry("hippocampus"))
>>> result.volumes_ml
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from dints_deploy.catalog.catalog import LoadedEntry, load_entry
    from dints_deploy.errors import DintsError, ScanRefused
    from dints_deploy.imaging.nifti import read_nifti, write_nifti
    from dints_deploy.imaging.volume import Volume
    from dints_deploy.runtime.segment import Segmentation, segment

# ONNX Runtime (since 1.29, on Linux) reports models and use to its maker, and keeps an identifier of this machine. It
# looks for this variable when it is loaded, and then does nothing of that: nothing leaves this machine unasked.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

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

HOMES: Final = {
    "DintsError": "errors",
    "LoadedEntry": "catalog.catalog",
    "ScanRefused": "errors",
    "Segmentation": "runtime.segment",
    "Volume": "imaging.volume",
    "load_entry": "catalog.catalog",
    "read_nifti": "imaging.nifti",
    "segment": "runtime.segment",
    "write_nifti": "imaging.nifti",
}
"""Public name -> its module, imported when asked for: a process that decodes pixels does not wait for pydantic."""


def __dir__() -> list[str]:
    """Return the public names, whether or not they were asked for."""
    return __all__


def __getattr__(name: str) -> Any:
    """Return a public name (PEP 562)."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
