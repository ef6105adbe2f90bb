"""docs/dicom.md has the tables of the code, row by row; a changed table prints the rows to write."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from pydicom.uid import UID

from dints_deploy import dicom
from dints_deploy.dicom.bounded import DEFAULT_LIMITS
from dints_deploy.dicom.decoder import PLUGINS
from dints_deploy.dicom.findings import KINDS
from dints_deploy.dicom.header import NATIVE
from dints_deploy.dicom.objects import NUMBERS
from dints_deploy.dicom.parse import SLICE_CLASSES
from dints_deploy.dicom.verify import KINDS as OBJECTS
from dints_deploy.errors import REASONS
from dints_deploy.process.outputs import OUTPUTS

PAGE = Path(__file__).parents[2] / "docs" / "dicom.md"


def findings() -> Iterator[str]:
    for code, kind in KINDS.items():
        allowed = ", ".join(sorted(kind.allowed))
        yield f"| `{code}` | {REASONS[code]} | {kind.severity} | {kind.default} | {allowed} |"


def syntaxes() -> Iterator[str]:
    for uid in sorted(NATIVE, key=lambda text: [int(part) for part in text.split(".")]):
        yield f"| {UID(uid).name} | `{uid}` | read as it lies |"
    for uid, plugin in PLUGINS.items():
        yield f"| {UID(uid).name} | `{uid}` | {plugin} |"


def classes() -> Iterator[str]:
    for uid, name in SLICE_CLASSES.items():
        yield f"| {name} | `{uid}` |"


def objects() -> Iterator[str]:
    for uid, (kind, _) in OBJECTS.items():
        yield f"| {UID(uid).name} | `{uid}` | {kind} | {NUMBERS[kind]:02d} |"


def limits() -> Iterator[str]:
    for item in fields(DEFAULT_LIMITS):
        yield f"| `{item.name}` | {getattr(DEFAULT_LIMITS, item.name):,} |".replace(",", " ")


TABLES = {
    "Findings": findings,
    "Transfer syntaxes": syntaxes,
    "Image classes": classes,
    "Objects": objects,
    "Limits": limits,
}


@pytest.mark.parametrize("title", TABLES)
def test_a_table_of_the_page_is_that_of_the_code(title: str) -> None:
    section = PAGE.read_text().split(f"### {title}\n", 1)[1].split("\n#", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    expected = list(TABLES[title]())
    assert rows == expected, "\n".join(["write these rows:", *expected])


def test_the_page_names_every_dicom_output() -> None:
    text = PAGE.read_text()
    assert [name for name in OUTPUTS if f"`{name}`" not in text] == []


def test_the_package_tells_the_story_of_every_module() -> None:
    modules = {path.stem for path in Path(dicom.__file__).parent.glob("*.py")} - {"__init__"}
    told = set(re.findall(r"\w+", dicom.__doc__ or ""))
    assert modules - told == set()
