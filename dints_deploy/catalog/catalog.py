"""Where entries live: the shipped zoo (read-only) and the entries added on this machine.

The zoo root is `$DINTS_ZOO`, then the installed package's `_zoo`, then the checkout's `zoo/`. What `zoo add` brings
goes to `zoo/` in the state folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dints_deploy.catalog.entry import Entry, Member
from dints_deploy.catalog.strict import read_toml
from dints_deploy.catalog.weights import SUMS_FILE, check_onnx, entry_files, verify_sums, write_sums
from dints_deploy.errors import EntryError, UsageError
from dints_deploy.files import make_folder, make_private_folder, output_error, state_folder, sync_folder, write_text

ENTRY_FILE: Final = "entry.toml"
MAX_ENTRY_BYTES: Final = 4 << 30
"""Largest entry that `zoo add` copies."""


@dataclass(frozen=True)
class LoadedEntry:
    """A verified entry.

    Attributes:
        folder: where it lies.
        spec: the parsed `entry.toml`.
        digests: relative path -> SHA-256 of every file.
    """

    folder: Path
    spec: Entry
    digests: dict[str, str]

    def member_bytes(self, member: Member) -> bytes:
        """Return a member's ONNX file: the bytes that were verified, without external data and custom domains.

        Raises:
            EntryError: `entry-onnx`, `entry-missing-file`, or `entry-checksum` when it changed since it was verified.
        """
        about = f"{self.spec.name}/{member.onnx}"
        try:
            data = (self.folder / member.onnx).read_bytes()
        except OSError as error:
            raise EntryError("entry-missing-file", f"expected to read {about}, found: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != self.digests[member.onnx]:
            raise EntryError("entry-checksum", f"expected {about} as it was verified, found other bytes: run it again")
        check_onnx(data, about)
        return data


def shipped_zoo() -> Path:
    """Return the root of the zoo that came with the software, or the one that `$DINTS_ZOO` names."""
    if configured := os.environ.get("DINTS_ZOO"):
        return Path(configured)
    package = Path(__file__).parents[1]
    installed = package / "_zoo"
    return installed if installed.is_dir() else package.parent / "zoo"


def added_zoo() -> Path:
    """Return the folder of the entries added on this machine."""
    return state_folder() / "zoo"


def entry_folders() -> dict[str, Path]:
    """Return name -> folder of every entry, sorted; a shipped entry goes before an added one of the same name.

    Raises:
        EntryError: `state-permissions` where this user may not look into a zoo.
    """
    folders: dict[str, Path] = {}
    for root in (added_zoo(), shipped_zoo()):
        try:
            if root.is_dir():
                folders |= {path.parent.name: path.parent for path in root.glob(f"*/{ENTRY_FILE}")}
        except PermissionError as error:
            message = f"expected the right to look into {root}, found none: run as its owner, or set DINTS_STATE"
            raise EntryError("state-permissions", message) from error
    return dict(sorted(folders.items()))


def read_entry(folder: Path) -> Entry:
    """Parse an entry's `entry.toml` without looking at the other files.

    Raises:
        EntryError: `entry-missing-file`, `entry-path` or `entry-invalid`.
    """
    path = folder / ENTRY_FILE
    if path.is_symlink():
        raise EntryError("entry-path", f"expected a plain file, found a link: {folder.name}/{ENTRY_FILE}")
    if not path.is_file():
        raise EntryError("entry-missing-file", f"expected {ENTRY_FILE} in {folder}, found none")
    return read_toml(path, Entry, EntryError, "entry-invalid")


def load_entry(name: str | Path) -> LoadedEntry:
    """Load an entry by name, or by the path of its folder, and verify every byte of it.

    Raises:
        UsageError: `entry-unknown`, listing the names there are.
        EntryError: the entry is damaged or not allowed; the code says why.
    """
    folder = Path(name) if os.sep in str(name) or isinstance(name, Path) else entry_folders().get(name)
    if folder is None:
        known = ", ".join(entry_folders()) or "none"
        raise UsageError("entry-unknown", f"expected the name of a zoo entry ({known}), found {name!r}")
    digests = verify_sums(folder)
    spec = read_entry(folder)
    if not isinstance(name, Path) and os.sep not in name and spec.name != name:
        raise EntryError("entry-invalid", f"expected the name {name} in {ENTRY_FILE} of {name}, found {spec.name}")
    named = [member.onnx for member in spec.members] + ([spec.genotype] if spec.genotype else [])
    for path in named:
        if path not in digests:
            raise EntryError(
                "entry-missing-file", f"expected {path} in {folder.name}, as {ENTRY_FILE} says: found none"
            )
    return LoadedEntry(folder, spec, digests)


def verify_entry(name: str | Path) -> LoadedEntry:
    """Load an entry and check its networks' structure too: everything that can be checked without running it."""
    entry = load_entry(name)
    for member in entry.spec.members:
        entry.member_bytes(member)
    return entry


def runnable(entry: LoadedEntry) -> LoadedEntry:
    """Return the entry if it has weights; a recipe entry cannot run.

    Raises:
        UsageError: `entry-has-no-weights`.
    """
    if not entry.spec.members:
        raise UsageError(
            "entry-has-no-weights",
            f"expected an entry with weights, {entry.spec.name} is a recipe: train it with `dints-deploy retrain`",
        )
    return entry


def add_entry(source: Path) -> LoadedEntry:
    """Copy an entry's folder into this machine's zoo: verified, with checksums, whole or not at all.

    A folder without SHA256SUMS (a user's own ONNX with an `entry.toml`) gets them here.

    Raises:
        UsageError: `entry-exists`. EntryError: the entry is not allowed. OutputError: it cannot be written.
    """
    spec = read_entry(source)
    if spec.name in entry_folders():
        raise UsageError("entry-exists", f"an entry {spec.name!r} is there already: remove it or change the name")
    names = entry_files(source) + ([SUMS_FILE] if (source / SUMS_FILE).is_file() else [])
    total = sum((source / name).stat().st_size for name in names)
    if total > MAX_ENTRY_BYTES:
        raise EntryError("entry-invalid", f"expected at most {MAX_ENTRY_BYTES} bytes in an entry, found {total}")
    make_private_folder(state_folder())
    root = make_folder(added_zoo())
    try:
        with tempfile.TemporaryDirectory(dir=root, prefix=".adding-") as work:
            staged = Path(work) / spec.name
            for name in names:
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, staged / name, follow_symlinks=False)
            if not (staged / SUMS_FILE).exists():
                write_text(staged / SUMS_FILE, write_sums(staged))
            verify_entry(staged)
            staged.rename(root / spec.name)
        sync_folder(root)
    except OSError as error:
        raise output_error(root / spec.name, error) from error
    return load_entry(root / spec.name)


def remove_entry(name: str) -> Path:
    """Remove an entry that was added on this machine and return where it was.

    Raises:
        UsageError: `entry-unknown` when it is not there, or came with the software.
    """
    folder = added_zoo() / name
    if name not in entry_folders() or not (folder / ENTRY_FILE).is_file() or folder.parent != added_zoo():
        raise UsageError("entry-unknown", f"expected the name of an entry added on this machine, found {name!r}")
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise output_error(folder, error) from error
    return folder
