"""Print what a pyproject.toml asks for, without the project itself: python requirements.py pyproject.toml EXTRA..."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main() -> None:
    """Print the requirements of the base and of the extras that are named."""
    project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
    lines = list(project["dependencies"])
    for extra in sys.argv[2:]:
        lines += project["optional-dependencies"][extra]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
