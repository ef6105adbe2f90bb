"""Read a case (NIfTI files, a DICOM folder or a zip of one) and find the entry that takes it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from dints_deploy.catalog.entry import Entry
from dints_deploy.errors import DintsError, ScanRefused, UsageError
from dints_deploy.files import sha256_file
from dints_deploy.imaging.nifti import MAX_UNPACKED_BYTES, read_nifti
from dints_deploy.imaging.volume import Volume
from dints_deploy.runtime.accepts import accepting

if TYPE_CHECKING:
    from dints_deploy.dicom.read import DicomVolume
    from dints_deploy.dicom.series import Study
    from dints_deploy.process.choose import Choice

NIFTI_SUFFIXES: Final = (".nii.gz", ".nii")


@dataclass(frozen=True, eq=False)
class Source:
    """A case that has been read.

    Attributes:
        scan: all channels on one grid.
        modality: DICOM Modality; None where the file does not say.
        digests: channel name -> SHA-256 of the file, or of the series' files in order.
        dicom: channel name -> series, for outputs in the source's geometry; empty for NIfTI.
        not_chosen: why the other series of a study were not taken, a line each.
    """

    scan: Volume
    modality: str | None
    digests: dict[str, str]
    dicom: dict[str, DicomVolume]
    not_chosen: tuple[str, ...] = ()


def read_source(
    channels: Mapping[str, Path], study: Study | None, candidates: Mapping[str, Entry], *, max_bytes: int | None = None
) -> tuple[Source, Entry]:
    """Read a case and return it with the entry that takes it.

    Args:
        channels: channel name -> file; a single scan under the name "".
        study: of `open_study`; None for NIfTI.
        candidates: the entries to choose from; with a single one there is no choice, but a refusal with its reason.
        max_bytes: refuse in advance files that unpack to more; None for the readers' own limits.

    Raises:
        ScanRefused: the file is no scan, or no series fits. UsageError: `entry-ambiguous`.
    """
    if study is not None:
        return _from_study(study, candidates)
    scan = read_channels(channels, max_bytes=max_bytes)
    entry = next(iter(candidates.values())) if len(candidates) == 1 else accepting(scan, list(candidates.values()))
    _check_names(channels, entry)
    digests = {name or "scan": _file_digest(path) for name, path in channels.items()}
    return Source(scan, None, digests, {}), entry


def open_study(channels: Mapping[str, Path], resources: ExitStack) -> Study | None:
    """Return the study of a DICOM folder or zip, None for NIfTI; `resources` removes what a zip unpacked to."""
    path = next(iter(channels.values()))
    if len(channels) > 1 or not is_dicom(path):
        return None
    from dints_deploy.dicom.series import opened

    return resources.enter_context(opened(path))


def is_dicom(path: Path) -> bool:
    """Say whether a path is to be read as DICOM: a folder, a `.zip` or a `.dcm`."""
    return path.is_dir() or path.suffix.lower() in (".zip", ".dcm")


def read_channels(channels: Mapping[str, Path], *, max_bytes: int | None = None) -> Volume:
    """Read the NIfTI channels of one case into one Volume.

    Raises:
        ScanRefused: of `read_nifti`, or `frame-mismatch` when the channels lie on different grids.
    """
    limit = MAX_UNPACKED_BYTES if max_bytes is None else min(max_bytes, MAX_UNPACKED_BYTES)
    return _stacked({name: read_nifti(path, max_bytes=limit) for name, path in channels.items()})


def _stacked(volumes: Mapping[str, Volume]) -> Volume:
    first = next(iter(volumes.values()))
    for name, volume in volumes.items():
        if not volume.grid.same_as(first.grid, tolerance_mm=0.01):
            raise ScanRefused(
                "frame-mismatch", f"expected all channels on one grid, channel {name} has another: register them first"
            )
    if len(volumes) == 1:
        return first
    return Volume(np.concatenate([v.data.astype(np.float32, copy=False) for v in volumes.values()]), first.affine)


def _check_names(channels: Mapping[str, Path], entry: Entry) -> None:
    named = [name for name in channels if name]
    expected = [channel.name for channel in entry.channels]
    if named and named != expected:
        raise ScanRefused("scan-channels", f"expected channels {', '.join(expected)}, found {', '.join(named)}")


def _from_study(study: Study, candidates: Mapping[str, Entry]) -> tuple[Source, Entry]:
    """Choose the entry and its series: the only pair that fits."""
    from dints_deploy.process.choose import choose_series

    fits: dict[str, Choice] = {}
    refusals: dict[str, DintsError] = {}
    for name, entry in candidates.items():
        try:
            fits[name] = choose_series(study, entry)
        except ScanRefused as refusal:
            refusals[name] = refusal
    if len(candidates) == 1 and refusals:
        raise next(iter(refusals.values()))
    if len(fits) != 1:
        found = ", ".join(fits) or "none (" + "; ".join(f"{n}: {r.message}" for n, r in refusals.items()) + ")"
        raise UsageError("entry-ambiguous", f"expected one entry that takes this study, found {found}: give --model")
    name, choice = next(iter(fits.items()))
    return _from_choice(choice), candidates[name]


def _from_choice(choice: Choice) -> Source:
    from dints_deploy.dicom.read import read_series

    read = {name: read_series(series, policy=choice.policy) for name, series in choice.series.items()}
    digests = {name: _series_digest(series.files) for name, series in choice.series.items()}
    scan = _stacked({name: volume.volume for name, volume in read.items()})
    modality = next(iter(choice.series.values())).Modality
    return Source(scan, modality, digests, read, choice.not_chosen)


def _file_digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ScanRefused("scan-missing", f"expected {path.name} to stay while it is read, found: {reason}") from error


def _series_digest(files: tuple[Path, ...]) -> str:
    """Return one digest for the files of a series, in its order, wherever they lie."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(bytes.fromhex(_file_digest(path)))
    return digest.hexdigest()


def output_stem(scan: Path) -> str:
    """Return a scan's file name without its NIfTI or zip suffix."""
    for suffix in (*NIFTI_SUFFIXES, ".zip", ".dcm"):
        if scan.name.lower().endswith(suffix):
            return scan.name[: -len(suffix)]
    return scan.name or "scan"
