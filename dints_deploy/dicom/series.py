"""Collect a folder, a zip or a list of files into series. Damaged files become findings, not crashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dints_deploy.dicom.archive import is_zip, unpack
from dints_deploy.dicom.attributes import Attributes
from dints_deploy.dicom.bounded import (
    DEFAULT_LIMITS,
    UNDEFINED_LENGTH,
    Limits,
    RawHeader,
    open_regular,
    quiet,
    read_header,
)
from dints_deploy.dicom.decoders import Decoders
from dints_deploy.dicom.findings import Finding, Severity, finding
from dints_deploy.dicom.header import SliceHeader
from dints_deploy.dicom.parse import CLASS_KEYS, parse
from dints_deploy.errors import ScanRefused, UsageError
from dints_deploy.files import sha256_file

DICOMDIR_CLASS = "1.2.840.10008.1.3.10"
"""Media Storage Directory Storage: an index, not part of a series."""


DAMAGE = frozenset({"dicom-corrupt", "dicom-truncated", "dicom-attribute"})
"""Findings of files whose SeriesInstanceUID may be cut off as well."""

SERIES_KEYS = ("StudyInstanceUID", "FrameOfReferenceUID", "Modality", "SeriesNumber", "SeriesDescription")
"""What files of one folder share that are taken as one series where the SeriesInstanceUID is empty."""


@dataclass(frozen=True)
class Series:
    """One series of a study, as its headers tell. Attribute names are DICOM keywords where they are verbatim.

    Attributes:
        label: short hash of the SeriesInstanceUID: the only name of a series in messages and logs.
        SeriesInstanceUID: empty where the files have none.
        contrast: whether a contrast agent is named.
        slices: one per image plane (a multi-frame file gives several), by instance number, file and frame.
        objects: number of files, image planes or not.
        findings: files of the series that could not be used, and why.
    """

    label: str
    StudyInstanceUID: str
    SeriesInstanceUID: str
    Modality: str = ""
    SeriesDescription: str = ""
    SeriesNumber: int | None = None
    BodyPartExamined: str = ""
    SOPClassUID: str = ""
    contrast: bool = False
    slices: tuple[SliceHeader, ...] = ()
    objects: int = 0
    findings: tuple[Finding, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files that hold its planes, each once, in the order of `slices`."""
        return tuple(dict.fromkeys(header.path for header in self.slices))


@dataclass(frozen=True)
class Study:
    """What was found in one source; usually one study, but nothing depends on that.

    Attributes:
        series: by series number, then label.
        findings: files that belong to no series, and why.
        decoders: processes for its compressed pixels, on their way already; None where it is up to the reader to start
            some.
    """

    series: tuple[Series, ...]
    findings: tuple[Finding, ...] = ()
    decoders: Decoders | None = None


@dataclass
class _Group:
    """A series while its files come in."""

    about: Series
    slices: list[SliceHeader] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    instances: dict[str, Path] = field(default_factory=dict)
    folders: set[Path] = field(default_factory=set)
    objects: int = 0


def short_hash(uid: str) -> str:
    """Return ten hex digits that stand for a UID in messages and logs."""
    return hashlib.sha256(uid.encode()).hexdigest()[:10]


@contextlib.contextmanager
def opened(
    source: Path | Sequence[Path], *, limits: Limits = DEFAULT_LIMITS, decoders: Decoders | None = None
) -> Iterator[Study]:
    """Collect `source`; what a zip unpacks to is removed at the end.

    Args:
        decoders: processes for compressed pixels, as for `collect`; they outlive this context.
    """
    # a folder needs no scratch, and a process that is killed over it leaves none behind
    single = isinstance(source, Path) and not source.is_dir()
    with tempfile.TemporaryDirectory(prefix="dints-deploy-") if single else contextlib.nullcontext() as scratch:
        yield collect(source, scratch=Path(scratch) if scratch else None, limits=limits, decoders=decoders)


def collect(
    source: Path | Sequence[Path],
    *,
    scratch: Path | None = None,
    limits: Limits = DEFAULT_LIMITS,
    decoders: Decoders | None = None,
) -> Study:
    """Group the DICOM files of a folder (links not followed), a zip, one file or a list of files into series.

    Args:
        scratch: an empty folder that a zip is unpacked to; it must live as long as the series are read.
        decoders: processes for compressed pixels, which begin to start with the first file that has some.

    Raises:
        ScanRefused: `scan-missing`, `dicom-archive`, `dicom-too-large` for the source as a whole, `dicom-no-images`
            where no file is DICOM. Everything about single files is a finding.
    """
    groups: dict[str, _Group] = {}
    findings: list[Finding] = []
    with quiet():
        for path in _files(source, scratch, limits):
            try:
                raw = read_header(path, limits=limits)
                if decoders is not None and raw.pixel_length == UNDEFINED_LENGTH:
                    decoders.start()
                _add(groups, path, raw, limits)
            except ScanRefused as refused:
                findings.append(_file_finding(refused, path))
    if not groups and not any(item.severity is Severity.REFUSAL for item in findings):
        raise ScanRefused("dicom-no-images", "expected DICOM files, found none: name the folder of the series")
    damaged = [item for item in findings if item.severity is Severity.REFUSAL]
    damaged += [item for group in groups.values() if not group.slices for item in group.findings if item.code in DAMAGE]
    series = [_close(group, damaged) for group in groups.values()]
    series.sort(key=lambda one: (one.SeriesNumber is None, one.SeriesNumber or 0, one.label))
    return Study(tuple(series), tuple(findings), decoders)


def by_study(files: Sequence[Path], *, limits: Limits = DEFAULT_LIMITS) -> list[tuple[Path, ...]]:
    """Group single DICOM files by their StudyInstanceUID, in order; those that name none go with every study."""
    groups: dict[str, list[Path]] = {}
    with quiet():
        for path in files:
            groups.setdefault(_study_of(path, limits), []).append(path)
    nameless = groups.pop("", [])
    return [(*group, *nameless) for group in groups.values()] or [tuple(nameless)]


def _study_of(path: Path, limits: Limits) -> str:
    """Return the StudyInstanceUID of a file, empty where it has none or is damaged."""
    try:
        return Attributes([read_header(path, limits=limits).dataset]).text("StudyInstanceUID")
    except ScanRefused:
        return ""


def _files(source: Path | Sequence[Path], scratch: Path | None, limits: Limits) -> list[Path]:
    """Return the files of a source, sorted, without following links below it."""
    if not isinstance(source, Path):
        return list(source)
    if not source.is_dir():
        target = source.resolve()  # the source itself was named by the user: a link to it is meant
        if not is_zip(target):
            return [target]
        if scratch is None:
            raise UsageError("usage", "expected a scratch folder to unpack a zip into: give scratch, or use opened()")
        return list(unpack(target, scratch, limits=limits))
    files: list[Path] = []
    for folder, folders, names in os.walk(source, onerror=_unreadable):
        folders.sort()
        files += [Path(folder) / name for name in sorted(names)]
        if len(files) > limits.files:
            raise ScanRefused("dicom-too-large", f"expected at most {limits.files} files, found more: name one study")
    return files


def _unreadable(error: OSError) -> None:
    reason = error.strerror or type(error).__name__
    raise ScanRefused("scan-missing", f"expected a readable folder, found: {reason}: check its rights") from error


def _file_finding(refused: ScanRefused, path: Path) -> Finding:
    return replace(finding(refused.code, refused.message), path=path)


def _add(groups: dict[str, _Group], path: Path, raw: RawHeader, limits: Limits) -> None:
    """Add a file to its series; raise `ScanRefused` where it has none."""
    read = Attributes([raw.dataset, raw.meta])
    if read.first_text(*CLASS_KEYS) == DICOMDIR_CLASS:
        raise ScanRefused("dicom-not-dicom", "expected an image, found a DICOMDIR, an index of others: passed over")
    uid = read.text("SeriesInstanceUID")
    key = uid or "\n".join([str(path.parent), *(read.text(keyword) for keyword in SERIES_KEYS)])
    try:
        planes = parse(path, raw, limits=limits)
    except ScanRefused as refused:
        if not uid:
            raise
        _group(groups, key, read, path).findings.append(_file_finding(refused, path))
        return
    group = _group(groups, key, read, path)
    if not planes:
        group.findings.append(
            _with_path("dicom-sop-class", "expected images of slices, found another object: left out", path)
        )
        return
    first = group.instances.setdefault(planes[0].SOPInstanceUID or str(path), path)
    if first is not path:
        group.findings.append(_same_instance(first, path))
        return
    group.slices += planes


def _group(groups: dict[str, _Group], key: str, read: Attributes, path: Path) -> _Group:
    """Return the series that a file belongs to, with the file counted."""
    group = groups.setdefault(key, _Group(_about(read, read.text("SeriesInstanceUID"), key)))
    group.objects += 1
    group.folders.add(path.parent)
    return group


def _about(read: Attributes, uid: str, key: str) -> Series:
    message = "expected a SeriesInstanceUID, found none: files of one folder that look alike are taken as one series"
    return Series(
        label=short_hash(key),
        StudyInstanceUID=read.text("StudyInstanceUID"),
        SeriesInstanceUID=uid,
        Modality=read.text("Modality").upper(),
        SeriesDescription=read.text("SeriesDescription"),
        SeriesNumber=read.integer("SeriesNumber", low=-(2**31), high=2**31),
        BodyPartExamined=read.text("BodyPartExamined").upper(),
        SOPClassUID=read.first_text(*CLASS_KEYS),
        contrast=bool(read.text("ContrastBolusAgent") or read.items("ContrastBolusAgentSequence")),
        findings=() if uid else (finding("dicom-no-uid", message),),
    )


def _with_path(code: str, message: str, path: Path) -> Finding:
    return replace(finding(code, message), path=path)


def _same_instance(first: Path, second: Path) -> Finding:
    """Tell a second copy of a file from another image with the same UID."""
    if _digest(first) == _digest(second):
        return _with_path("dicom-copied-file", "the same instance lies there twice: the copy is left out", second)
    message = "expected one image for each SOPInstanceUID, found two that differ: keep the right one"
    return _with_path("dicom-duplicate-uid", message, second)


def _digest(path: Path) -> str:
    open_regular(path).close()
    return sha256_file(path)


def _close(group: _Group, damaged: Sequence[Finding]) -> Series:
    """Return the finished series; a damaged file of no other series in one of its folders may be one of its slices."""
    own = {item.path for item in group.findings}
    near = [item for item in damaged if item.path and item.path.parent in group.folders and item.path not in own]
    slices = sorted(group.slices, key=lambda one: (one.InstanceNumber is None, one.InstanceNumber or 0, one.frame))
    return replace(
        group.about,
        slices=tuple(slices),
        objects=group.objects,
        findings=(*group.about.findings, *group.findings, *near),
    )
