"""What we use of nibabel, imported without pydicom.

nibabel looks for pydicom, which brings its decoders: two thirds of nibabel's import time, a tenth of a second, for
a header extension that we never read. While nibabel is imported, pydicom is not to be found.
"""

from __future__ import annotations

import sys

_hiding = "pydicom" not in sys.modules
if _hiding:
    sys.modules["pydicom"] = None  # type: ignore[assignment]
try:
    from nibabel.arrayproxy import ArrayProxy
    from nibabel.nifti1 import Nifti1Header, Nifti1Image
    from nibabel.nifti2 import Nifti2Header, Nifti2Image
    from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
    from nibabel.spatialimages import HeaderDataError
finally:
    if _hiding:
        del sys.modules["pydicom"]

__all__ = [
    "ArrayProxy",
    "HeaderDataError",
    "Nifti1Header",
    "Nifti1Image",
    "Nifti2Header",
    "Nifti2Image",
    "apply_orientation",
    "axcodes2ornt",
    "inv_ornt_aff",
    "io_orientation",
    "ornt_transform",
]
