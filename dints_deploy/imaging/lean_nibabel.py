"""What we use of nibabel: its NIfTI modules, imported without the rest of it.

`import nibabel` brings every format it knows, and pydicom with its decoders where that is installed: most of its import
time, for nothing that a NIfTI file needs. Here its modules are imported from its folder under an empty package; pydicom
and scipy, which it asks for in passing, are not to be found, and what it would fetch images from the network with is
empty. They are ours alone: a later `import nibabel` gets the whole package, as ever.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType

_OPTIONAL = ("pydicom", "scipy")
_FETCHES = "urllib.request"
_before = set(sys.modules)
_bare = "nibabel" not in _before
if _bare:
    _whole = find_spec("nibabel")
    if _whole is None:
        raise ModuleNotFoundError("expected nibabel to be installed: pip install dints-deploy", name="nibabel")
    _empty = ModuleSpec("nibabel", None, is_package=True)
    _empty.submodule_search_locations = _whole.submodule_search_locations
    sys.modules["nibabel"] = module_from_spec(_empty)
    for _name in _OPTIONAL:
        sys.modules.setdefault(_name, None)  # type: ignore[arg-type]
    sys.modules.setdefault(_FETCHES, ModuleType(_FETCHES))
try:
    from nibabel.arrayproxy import ArrayProxy
    from nibabel.nifti1 import Nifti1Header, Nifti1Image
    from nibabel.nifti2 import Nifti2Header, Nifti2Image
    from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
    from nibabel.spatialimages import HeaderDataError
finally:
    for _name in [name for name in sys.modules if _bare and name not in _before]:
        if _name.partition(".")[0] in ("nibabel", *_OPTIONAL) or _name == _FETCHES:
            del sys.modules[_name]

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
