"""nibabel's NIfTI modules come without the rest, and whoever imports nibabel later gets all of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

WHOLE_LATER = """
import sys
from dints_deploy.imaging.lean_nibabel import Nifti1Image
assert not any(name.partition(".")[0] in ("nibabel", "pydicom", "scipy") for name in sys.modules)
assert "urllib.request" not in sys.modules
import nibabel, numpy as np
assert nibabel.nifti1.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)).shape == (2, 2, 2)
assert callable(nibabel.load) and nibabel.freesurfer and nibabel.Nifti1Image.__name__ == Nifti1Image.__name__
import pydicom, scipy.ndimage, urllib.request
assert callable(urllib.request.urlopen) and nibabel.filebasedimages.request is urllib.request
"""

FETCHES_BEFORE = """
import sys, urllib.request
import dints_deploy.imaging.lean_nibabel
assert callable(sys.modules["urllib.request"].urlopen)
"""

WHOLE_BEFORE = """
import nibabel, pydicom, sys
from dints_deploy.imaging.lean_nibabel import Nifti1Image
assert Nifti1Image is nibabel.Nifti1Image and sys.modules["pydicom"] is pydicom
"""

PYDICOM_BEFORE = """
import pydicom, sys
import dints_deploy.imaging.lean_nibabel
assert sys.modules["pydicom"] is pydicom and "nibabel" not in sys.modules
"""


@pytest.mark.parametrize("code", [WHOLE_LATER, WHOLE_BEFORE, PYDICOM_BEFORE, FETCHES_BEFORE])
def test_the_lean_import_disturbs_no_other(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
