"""The cases of a `segment` call: which files belong together, what they are called, where their outputs go."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dints_deploy.errors import UsageError
from dints_deploy.process.source import NIFTI_SUFFIXES, Scan, cases_of, first_file, output_stem

NO_FOLDERS: Final = (".png", ".jpg", ".html", ".pdf", ".dcm", ".json", ".toml", ".csv", ".gz", ".zip", ".mha", ".nrrd")
"""Suffixes of files: a folder is not meant, and labels are not written so."""


@dataclass(frozen=True)
class PlannedCase:
    """One case of a call: its files, its name in messages, where its outputs go."""

    channels: Mapping[str, Scan]
    name: str
    stem: Path
    labels_path: Path | None


def plan_cases(scans: list[Path], channels: list[str], output: Path | None) -> list[PlannedCase]:
    """Return the cases of a call and where each one's outputs go.

    Raises:
        UsageError: `usage` when the call makes no sense.
    """
    if bool(scans) == bool(channels):
        raise UsageError("usage", "expected SCANs or --channel NAME=FILE, one of the two: see --help")
    inputs: list[dict[str, Scan]] = [{"": scan} for scan in cases_of(scans)] or [_parse_channels(channels)]
    if output is not None and output.suffix.lower() in NO_FOLDERS and not (_is_file_name(output) or output.is_dir()):
        raise UsageError("usage", f"expected a folder or a .nii or .nii.gz file after -o, found {output}: name another")
    if len(inputs) > 1 and output is not None and _is_file_name(output):
        raise UsageError("usage", f"expected a folder after -o for {len(inputs)} scans, found the file {output}")
    cases = [_plan(channel_files, output) for channel_files in inputs]
    if len({case.stem for case in cases}) != len(cases):
        raise UsageError("usage", "expected scans with distinct names, two would write the same file: run them apart")
    _check_not_inputs(cases)
    return cases


def _check_not_inputs(cases: list[PlannedCase]) -> None:
    """Refuse to write labels over a scan."""
    inputs = {os.path.realpath(first_file(scan)) for case in cases for scan in case.channels.values()}
    for case in cases:
        labels = case.labels_path or case.stem.with_name(f"{case.stem.name}.nii.gz")
        if os.path.realpath(labels) in inputs:
            raise UsageError("usage", f"expected an output that is not a scan, found {labels}: choose another with -o")


def _is_file_name(output: Path) -> bool:
    return output.name.lower().endswith(NIFTI_SUFFIXES) and not output.is_dir()


def _parse_channels(channels: list[str]) -> dict[str, Scan]:
    pairs = [text.partition("=") for text in channels]
    if any(not name or not file for name, _, file in pairs) or len({name for name, _, _ in pairs}) != len(pairs):
        raise UsageError("usage", "expected --channel NAME=FILE with distinct names")
    return {name: Path(file) for name, _, file in pairs}


def _plan(channels: Mapping[str, Scan], output: Path | None) -> PlannedCase:
    first = first_file(next(iter(channels.values())))
    if output is not None and _is_file_name(output):
        return PlannedCase(channels, first.name, output.with_name(output_stem(output)), output)
    folder = output or Path()
    return PlannedCase(channels, first.name, folder / f"{output_stem(first)}_seg", None)
