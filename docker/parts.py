"""What a root file system is made of: bytes of each Python package, and of the system below them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Final

MEBIBYTE: Final = 1 << 20
SYSTEM: Final = "Debian and Python"
ALIASES: Final = {"PIL": "pillow", "_gdcm": "gdcm", "dints_search": "dints_deploy, the workshop", "_zoo": "the zoo"}


def parts(root: Path) -> dict[str, int]:
    """Return the bytes of each part, the largest first: what the files hold, each link and hard link once."""
    sizes: Counter[str] = Counter()
    seen = set()
    for path in root.rglob("*"):
        status = path.lstat()
        if path.is_symlink() or not path.is_file() or (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        sizes[part(path.relative_to(root))] += status.st_size
    return dict(sizes.most_common())


def part(path: Path) -> str:
    """Return the part that a file belongs to; a package's shared libraries and metadata are its own."""
    words = path.parts
    if "site-packages" not in words:
        return SYSTEM if words[0] != "opt" else "the environment"
    below = words[words.index("site-packages") + 1 :]
    if below[:2] == ("dints_deploy", "_zoo"):
        return ALIASES["_zoo"]
    name = re.sub(r"(\.libs|-[0-9][^/]*\.dist-info|\.py)$", "", below[0])
    return ALIASES.get(name, name)
