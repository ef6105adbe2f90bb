"""List what a folder of wheels, or an environment, is made of: a CycloneDX 1.6 bill of materials with licences.

python -m release.sbom ENVIRONMENT [--dpkg /var/lib/dpkg/status] > sbom.cdx.json

With --dpkg it lists Debian's packages too; their licences lie in /usr/share/doc/PACKAGE/copyright.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import json
import re
import zipfile
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

SPDX: Final = {
    "MIT License": "MIT",
    "Apache Software License": "Apache-2.0",
    "3-Clause BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
}
"""Names of older metadata that mean one licence."""


@dataclass(frozen=True)
class Component:
    """One Python distribution or Debian package.

    Attributes:
        licence: an SPDX expression where the metadata has one, else its words; empty for a Debian package.
        sha256: of the wheel; empty for what is installed.
        kind: of the package URL.
    """

    name: str
    version: str
    licence: str = ""
    sha256: str = ""
    kind: str = "pypi"

    @property
    def purl(self) -> str:
        """Return the package URL."""
        return f"pkg:{self.kind}/{self.name}@{quote(self.version)}"


def read_wheel(path: Path) -> Component:
    """Return what a wheel says of itself."""
    with zipfile.ZipFile(path) as wheel:
        name = next(n for n in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        metadata = email.message_from_bytes(wheel.read(name))
    return _component(metadata, hashlib.sha256(path.read_bytes()).hexdigest())


def read_environment(folder: Path) -> list[Component]:
    """Return what is installed in a virtual environment."""
    files = sorted(folder.glob("lib/python3*/site-packages/*.dist-info/METADATA"))
    return [_component(email.message_from_bytes(path.read_bytes())) for path in files]


def read_dpkg(status: Path) -> list[Component]:
    """Return the Debian packages that are installed."""
    paragraphs = [email.message_from_string(text) for text in status.read_text().split("\n\n") if text.strip()]
    installed = [one for one in paragraphs if one["Status"] == "install ok installed"]
    return [Component(str(one["Package"]), str(one["Version"]), kind="deb/debian") for one in installed]


def bill_of_materials(own: Component, components: list[Component]) -> dict[str, Any]:
    """Return the document, the same for the same wheels."""
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": _entry(own) | {"type": "application"}},
        "components": [_entry(one) for one in components if one != own],
    }


def _component(metadata: Message, sha256: str = "") -> Component:
    name = re.sub(r"[-_.]+", "-", str(metadata["Name"])).lower()
    licence = _licence(metadata)
    return Component(name, str(metadata["Version"]), SPDX.get(licence, licence), sha256)


def _licence(metadata: Message) -> str:
    """Return the SPDX expression, else the classifiers, else the first line of the free text."""
    if expression := metadata["License-Expression"]:
        return str(expression)
    classifiers = [str(line).rpartition(" :: ")[2] for line in metadata.get_all("Classifier", [])
                   if str(line).startswith("License :: ") and not str(line).endswith("OSI Approved")]  # fmt: skip
    if classifiers:
        return " AND ".join(classifiers)
    text = str(metadata["License"] or "").strip().splitlines()
    return text[0] if text else "unknown"


def _entry(one: Component) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "library",
        "bom-ref": one.purl,
        "name": one.name,
        "version": one.version,
        "purl": one.purl,
    }
    entry |= {"hashes": [{"alg": "SHA-256", "content": one.sha256}]} if one.sha256 else {}
    if not one.licence:
        return entry
    named = one.licence == "unknown" or "License" in one.licence
    licence = {"license": {"name": one.licence}} if named else {"expression": one.licence}
    return entry | {"licenses": [licence]}


def main() -> None:
    """Print the bill of materials of an environment."""
    parser = argparse.ArgumentParser(description="Print the bill of materials of an environment.")
    parser.add_argument("environment", type=Path)
    parser.add_argument("--dpkg", type=Path, help="the status file of dpkg")
    arguments = parser.parse_args()
    found = read_environment(arguments.environment)
    own = next(one for one in found if one.name == "dints-deploy")
    debian = [] if arguments.dpkg is None else read_dpkg(arguments.dpkg)
    print(json.dumps(bill_of_materials(own, found + debian), indent=1))


if __name__ == "__main__":
    main()
