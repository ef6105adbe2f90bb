"""What protects an entry's files: checksums, paths that stay inside, and ONNX files that are only a network.

The ONNX check reads the file's protobuf wire format itself, because the `onnx` package takes 0.4 s to import and the
appliance needs just two facts: no tensor lies outside the file, no operator comes from another domain than ONNX's own.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dints_deploy.errors import EntryError
from dints_deploy.files import sha256_file

SUMS_FILE: Final = "SHA256SUMS"

ALLOWED_DOMAINS: Final = frozenset({"", "ai.onnx"})
MAX_DEPTH: Final = 64
"""Deepest nesting of messages in an ONNX file; real networks stay under ten."""

# Message -> field number -> message inside it (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
NESTED: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "tensor": {},
}
DOMAIN_FIELD: Final = {"node": 7, "function": 10}
MAX_TAG: Final = (1 << 32) - 1
"""Largest tag of a field. Some readers of protobuf drop higher bits, and would see another field than this check."""

EXTERNAL_DATA_FIELD: Final = 13
DATA_LOCATION_FIELD: Final = 14


def entry_files(folder: Path) -> list[str]:
    """Return the relative paths of the entry's files, sorted, the checksum file left out.

    Raises:
        EntryError: `entry-path` for links and anything that is not a plain file or folder.
    """
    names = []
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            names.append(path.relative_to(folder).as_posix())
        elif not stat.S_ISDIR(mode):
            raise EntryError(
                "entry-path", f"expected plain files in {folder.name}, found a link or device: {path.name}"
            )
    return [name for name in names if name != SUMS_FILE]


def write_sums(folder: Path) -> str:
    """Return the text of SHA256SUMS for the entry's present files, in the format of `sha256sum`."""
    return "".join(f"{sha256_file(folder / name)}  {name}\n" for name in entry_files(folder))


def verify_sums(folder: Path) -> dict[str, str]:
    """Check every file against SHA256SUMS and return path -> digest. Integrity, not authenticity.

    Raises:
        EntryError: `entry-missing-file`, `entry-checksum` or `entry-path`, naming the file.
    """
    present = set(entry_files(folder))
    sums = _read_sums(folder)
    for name in sorted(present - set(sums)):
        raise EntryError("entry-checksum", f"expected every file of {folder.name} in {SUMS_FILE}, found {name} without")
    for name, digest in sums.items():
        if name not in present:
            raise EntryError(
                "entry-missing-file", f"expected {name} in {folder.name}, found no such file: add it again"
            )
        if sha256_file(folder / name) != digest:
            raise EntryError(
                "entry-checksum",
                f"expected {name} of {folder.name} unchanged, found other bytes: install the entry again",
            )
    return sums


def _read_sums(folder: Path) -> dict[str, str]:
    path = folder / SUMS_FILE
    if not path.is_file():
        raise EntryError(
            "entry-missing-file",
            f"expected {SUMS_FILE} in {folder.name}, found none: `zoo add` makes it for a new entry",
        )
    sums: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n"):
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name or name in sums:
            raise EntryError("entry-checksum", f"expected lines of `digest  path` in {folder.name}/{SUMS_FILE}")
        if name.startswith("/") or ".." in name.split("/"):
            raise EntryError("entry-path", f"expected paths inside {folder.name} in {SUMS_FILE}, found {name}")
        sums[name] = digest
    return sums


def check_onnx(data: bytes, name: str) -> None:
    """Refuse an ONNX file with external data, with operators of a custom domain, or that holds no network.

    Raises:
        EntryError: `entry-onnx`, naming the file.
    """
    try:
        if all(NESTED["model"].get(field) != "graph" for field, _ in _fields(memoryview(data))):
            raise EntryError("entry-onnx", f"expected a network in {name}, found none")
        _walk(memoryview(data), "model", name, 0)
    except (IndexError, UnicodeDecodeError) as fault:
        raise EntryError("entry-onnx", f"expected an ONNX file in {name}, found it damaged") from fault


def _walk(data: memoryview, message: str, name: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise EntryError("entry-onnx", f"expected at most {MAX_DEPTH} nested messages in {name}, found more")
    for field, value in _fields(data):
        if message == "tensor" and (field == EXTERNAL_DATA_FIELD or (field == DATA_LOCATION_FIELD and value != 0)):
            raise EntryError(
                "entry-onnx", f"expected all weights inside {name}, found external data: export it in one file"
            )
        if isinstance(value, int):
            continue
        if DOMAIN_FIELD.get(message) == field and (domain := bytes(value).decode()) not in ALLOWED_DOMAINS:
            raise EntryError(
                "entry-onnx", f"expected operators of ONNX itself in {name}, found the domain {domain[:64]!r}"
            )
        if inner := NESTED[message].get(field):
            _walk(value, inner, name, depth + 1)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Yield (field number, content) of one protobuf message; IndexError where it is damaged."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key > MAX_TAG:
            raise IndexError("tag too long")
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise IndexError(f"wire type {kind}")
        if at + size > len(data):
            raise IndexError("message too short")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError("number too long")
