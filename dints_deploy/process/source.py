"""Read a case (NIfTI files, DICOM folders, zips of one, DICOM files) and find the entry that takes it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from dints_deploy.catalog.entry import Entry
from dints_deploy.errors import ScanRefused, UsageError
from dints_deploy.files import sha256_file
from dints_deploy.imaging.nifti import MAX_UNPACKED_BYTES, read_nifti
from dints_deploy.imaging.volume import Volume
from dints_deploy.runtime.accepts import accepting, no_entry

if TYPE_CHECKING:
    from dints_deploy.dicom.decoders import Decoders
    from dints_deploy.dicom.read import DicomVolume
    from dints_deploy.dicom.series import Study
    from dints_deploy.process.choose import Choice

NIFTI_SUFFIXES: Final = (".nii.gz", ".nii")

Scan = Path | tuple[Path, ...]
"""What a case or a channel is read from: a NIfTI file, a DICOM folder, a zip of one, or the files of one study."""

DICOM_PREFIX: Final = b"DICM"
PREFIX_AT: Final = 128
"""Where a DICOM file says that it is one (PS3.10 7.1)."""


@dataclass(frozen=True, eq=False)
class Source:
    """A case that has been read.

    Attributes:
        scan: all channels on one grid.
        modality: DICOM Modality; None where the file does not say.
        digests: channel name -> SHA-256 of the file, or of the series' files in order.
        dicom: channel name -> series, for outputs in the source's geometry; empty for NIfTI.
        taken: how the chosen series are called, for people.
        not_chosen: why the other series of a study were not taken, a line each.
        handled: what the gate found unusual about the chosen series and what the entry does about it, a line each.
    """

    scan: Volume
    modality: str | None
    digests: dict[str, str]
    dicom: dict[str, DicomVolume]
    taken: tuple[str, ...] = ()
    not_chosen: tuple[str, ...] = ()
    handled: tuple[str, ...] = ()


def read_source(
    channels: Mapping[str, Scan],
    studies: Mapping[str, Study],
    candidates: Mapping[str, Entry],
    *,
    max_bytes: int | None = None,
) -> tuple[Source, Entry]:
    """Read a case and return it with the entry that takes it.

    Args:
        channels: channel name -> scan; a single scan under the name "".
        studies: of `open_studies`; empty for NIfTI.
        candidates: the entries to choose from; with a single one there is no choice, but a refusal with its reason.
        max_bytes: refuse in advance files that unpack to more; None for the readers' own limits.

    Raises:
        ScanRefused: the file is no scan, or no series or entry fits. UsageError: `entry-ambiguous`.
    """
    if studies:
        return _from_studies(studies, candidates)
    files = {name: first_file(scan) for name, scan in channels.items()}
    scan = read_channels(files, max_bytes=max_bytes)
    entry = next(iter(candidates.values())) if len(candidates) == 1 else accepting(scan, list(candidates.values()))
    _check_names(channels, entry)
    digests = {name or "scan": _file_digest(path) for name, path in files.items()}
    return Source(scan, None, digests, {}), entry


def open_studies(channels: Mapping[str, Scan], resources: ExitStack) -> dict[str, Study]:
    """Return channel name -> study of DICOM scans, nothing for NIfTI.

    Args:
        resources: removes what a zip unpacked to, and stops the decoding processes.

    Raises:
        ScanRefused: of `collect`. UsageError: `usage` where some channels are DICOM and some NIfTI.
    """
    dicom = [is_dicom(scan) for scan in channels.values()]
    if not any(dicom):
        return {}
    if not all(dicom):
        raise UsageError("usage", "expected all channels of a case as DICOM or all as NIfTI, found both: convert some")
    from dints_deploy.dicom.decoders import Decoders
    from dints_deploy.dicom.series import opened

    decoders = resources.enter_context(Decoders())
    return {name: resources.enter_context(opened(scan, decoders=decoders)) for name, scan in channels.items()}


def is_dicom(scan: Scan) -> bool:
    """Say whether a scan is to be read as DICOM: a folder, a `.zip`, a `.dcm`, or a file that says that it is one."""
    path = first_file(scan)
    if path.is_dir() or path.suffix.lower() in (".zip", ".dcm"):
        return True
    return not path.name.lower().endswith(NIFTI_SUFFIXES) and _has_prefix(path)


def first_file(scan: Scan) -> Path:
    """Return the file or folder that a scan is called by."""
    return scan[0] if isinstance(scan, tuple) else scan


def cases_of(scans: Sequence[Path]) -> list[Scan]:
    """Return the cases of a call: DICOM files of one study are one case, every other scan is one by itself.

    A folder of NIfTI files stands for them. Files that name no study, as damaged ones do, go with every study: each may
    be the slice that it lacks.

    Raises:
        UsageError: `usage` where a folder holds NIfTI and DICOM files.
    """
    scans = [file for scan in scans for file in nifti_files(scan) or [scan]]
    single = [scan for scan in scans if scan.is_file() and scan.suffix.lower() != ".zip" and is_dicom(scan)]
    if len(single) < 2:
        return list(scans)
    from dints_deploy.dicom.series import by_study

    cases: list[Scan] = [scan for scan in scans if scan not in single]
    cases += by_study(single)
    return sorted(cases, key=lambda scan: scans.index(first_file(scan)))


def nifti_files(folder: Path) -> list[Path]:
    """Return the NIfTI files that lie in a folder, sorted by name; none where it is no folder, or one of DICOM.

    Raises:
        UsageError: `usage` where DICOM files lie beside them: nobody guesses which are meant.
    """
    if not folder.is_dir():
        return []
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    nifti = [path for path in files if path.name.lower().endswith(NIFTI_SUFFIXES)]
    if nifti and any(is_dicom(path) for path in files if path not in nifti):
        raise UsageError("usage", f"expected NIfTI or DICOM files in {folder}, found both: name the files themselves")
    return nifti


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


def _check_names(channels: Mapping[str, object], entry: Entry) -> None:
    named = [name for name in channels if name]
    expected = [channel.name for channel in entry.channels]
    if named and named != expected:
        raise ScanRefused("scan-channels", f"expected channels {', '.join(expected)}, found {', '.join(named)}")


def _from_studies(studies: Mapping[str, Study], candidates: Mapping[str, Entry]) -> tuple[Source, Entry]:
    """Choose the entry and its series: the only pair that fits."""
    from dints_deploy.process.choose import choose_series

    fits: dict[str, Choice] = {}
    refusals: dict[str, ScanRefused] = {}
    for name, entry in candidates.items():
        try:
            _check_names(studies, entry)
            fits[name] = choose_series(studies, entry)
        except ScanRefused as refusal:
            refusals[name] = refusal
    if len(candidates) == 1 and refusals:
        raise next(iter(refusals.values()))
    if refusals and not fits:
        raise no_entry("study", refusals)
    if len(fits) != 1:
        found = ", ".join(fits) or "none: the zoo is empty"
        raise UsageError("entry-ambiguous", f"expected one entry that takes this study, found {found}: give --model")
    name, choice = next(iter(fits.items()))
    decoders = next(iter(studies.values())).decoders
    return _from_choice(choice, decoders), candidates[name]


def _from_choice(choice: Choice, decoders: Decoders | None) -> Source:
    from dints_deploy.dicom.read import read_series

    read = {name: read_series(one, policy=choice.policy, decoders=decoders) for name, one in choice.series.items()}
    digests = {name: _series_digest(series.files) for name, series in choice.series.items()}
    _check_frames(read)
    scan = _stacked({name: volume.volume for name, volume in read.items()})
    modality = next(iter(choice.series.values())).Modality
    return Source(scan, modality, digests, read, choice.taken, choice.not_chosen, _handled(read, choice))


def _handled(volumes: Mapping[str, DicomVolume], choice: Choice) -> tuple[str, ...]:
    """Return a line for every warning and for every finding that would be refused but for the entry's policy."""
    from dints_deploy.dicom.findings import Severity

    grave = [item for volume in volumes.values() for item in volume.report.findings if item.severity != Severity.NOTE]
    done = {"accept": "accepted", "regularise": "resampled to a regular grid"}
    lines = (f"{done[choice.policy.action(item.code)]}: {item.message} [{item.code}]" for item in grave)
    return tuple(dict.fromkeys(lines))


def _check_frames(volumes: Mapping[str, DicomVolume]) -> None:
    """Refuse channels whose coordinates have nothing to do with each other, equal numbers or not (PS3.3 C.7.4.1)."""
    frames = {name: volume.planes[0].header.FrameOfReferenceUID for name, volume in volumes.items()}
    if len(frames) > 1 and ("" in frames.values() or len(set(frames.values())) > 1):
        raise ScanRefused(
            "frame-mismatch",
            f"expected one FrameOfReferenceUID of channels {', '.join(frames)}, found others or none: register them",
        )


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


def _has_prefix(path: Path) -> bool:
    """Say whether a file is DICOM by its content; one that cannot be read is refused where it is read."""
    try:
        with path.open("rb") as file:
            file.seek(PREFIX_AT)
            return file.read(len(DICOM_PREFIX)) == DICOM_PREFIX
    except OSError:
        return False


def output_stem(scan: Path) -> str:
    """Return a scan's file name without its NIfTI or zip suffix."""
    for suffix in (*NIFTI_SUFFIXES, ".zip", ".dcm"):
        if scan.name.lower().endswith(suffix):
            return scan.name[: -len(suffix)]
    return scan.name or "scan"
