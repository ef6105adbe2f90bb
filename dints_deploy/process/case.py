"""process_case: read -> segment -> outputs -> self-check, for the command line and the daemon's worker alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from dints_deploy.catalog.catalog import LoadedEntry
from dints_deploy.catalog.entry import Entry
from dints_deploy.errors import DintsError, ScanRefused, UsageError
from dints_deploy.files import make_folder
from dints_deploy.process.outputs import Result, check_formats, write_outputs, write_refusal_report
from dints_deploy.process.source import Scan, Source, open_studies, read_source
from dints_deploy.runtime.memory import Plan
from dints_deploy.runtime.parity import parity_status
from dints_deploy.runtime.pipeline import ahead
from dints_deploy.runtime.report import describe
from dints_deploy.runtime.segment import Progress, segment
from dints_deploy.runtime.sessions import WarmSessions

if TYPE_CHECKING:
    from dints_deploy.dicom.series import Study


READING_COPIES: Final = 3
"""Of a scan that are held while it is read: its bytes, joined with the header, and the voxels."""


def result_time() -> datetime:
    """Return the date and time that results carry: `$SOURCE_DATE_EPOCH` where it is set, otherwise now, in local time.

    The variable holds seconds since 1970-01-01 UTC, and gives UTC: two runs with the same value write equal objects.
    (Source: reproducible-builds.org/specs/source-date-epoch.)

    Raises:
        UsageError: `usage` where it is no such number.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is None:
        return datetime.now().astimezone()
    try:
        return datetime.fromtimestamp(int(given), UTC)
    except (ValueError, OverflowError, OSError):
        raise UsageError("usage", f"expected seconds since 1970 in SOURCE_DATE_EPOCH, found {given!r}") from None


@dataclass(frozen=True)
class Request:
    """What to do with one case.

    Attributes:
        channels: channel name -> scan, in the entry's order; a single scan under "".
        stem: path of the outputs without suffix; `<stem>.nii.gz`, `<stem>.png`, `<stem>.html` ...
        formats: of `outputs.OUTPUTS`, in order.
        labels_path: of the NIfTI output where the user named it.
        engine, precision, device, threads, max_ram_bytes: as for `segment`.
        when: date and time in DICOM objects, of `result_time`; given, two runs write the same bytes.
        supersedes: DICOM objects of an earlier result that this one replaces; the new ones say so.
    """

    channels: Mapping[str, Scan]
    stem: Path
    formats: tuple[str, ...] = ("nifti",)
    labels_path: Path | None = None
    engine: str = "auto"
    precision: str = "fp32"
    device: str = "cpu"
    threads: int | None = None
    max_ram_bytes: int | None = None
    when: datetime = field(default_factory=result_time)
    supersedes: tuple[Path, ...] = ()


@dataclass(frozen=True, eq=False)
class Outcome:
    """A finished case: its record (see `describe`) and the files written, by format."""

    record: dict[str, Any]
    files: dict[str, Path] = field(default_factory=dict)


@dataclass(eq=False)
class ReadCase:
    """A case that has been read, or the reason why it could not be. A context: it drops the scan and unpacked files.

    Attributes:
        request: what to do with it.
        studies: channel name -> study, for DICOM.
        found: the scan and the entry that takes it; None where there is an error.
        error: why it could not be read, for `finish_case` to raise.
    """

    request: Request
    studies: dict[str, Study] = field(default_factory=dict)
    found: tuple[Source, Entry] | None = None
    error: DintsError | None = None
    resources: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.studies, self.found = {}, None  # the scan is large, and a batch goes on
        self.resources.close()


def process_case(
    request: Request,
    candidates: Mapping[str, Entry],
    load: Callable[[str], LoadedEntry],
    *,
    warm: WarmSessions | None = None,
    planned: Callable[[Plan], None] = lambda plan: None,
    progress: Progress = lambda done, total: None,
) -> Outcome:
    """Read a scan, find its entry, segment it, write the outputs, read them back.

    A DICOM study that is refused gets its refusal as an SR beside the outputs, where `dicom-sr` is asked for.

    Args:
        request: what to do.
        candidates: name -> entry to choose from.
        load: the verified entry of a name.
        warm: networks that stay loaded between cases; None loads them for this one.
        planned: called with the plan before the first window.
        progress: called after every window.

    Raises:
        ScanRefused, EntryError, EngineError, OutputError, UsageError: with their codes; no partial file is left, and
            no output of a case is left when a later one fails.
    """
    with read_case(request, candidates) as case:
        return finish_case(case, load, warm=warm, planned=planned, progress=progress)


def read_cases(requests: Sequence[Request], candidates: Mapping[str, Entry]) -> Iterator[ReadCase]:
    """Return the cases, read in order: the next while one is worked on, unless a memory limit is to be kept."""
    reading = (read_case(request, candidates) for request in requests)
    alone = len(requests) == 1 or any(request.max_ram_bytes is not None for request in requests)
    return reading if alone else ahead(reading)


def read_case(request: Request, candidates: Mapping[str, Entry]) -> ReadCase:
    """Read a scan and find its entry; an error is kept, to be raised by `finish_case`."""
    case = ReadCase(request)
    try:
        check_formats(request.formats)
        case.studies = open_studies(request.channels, case.resources)
        limit = request.max_ram_bytes and request.max_ram_bytes // READING_COPIES
        case.found = read_source(request.channels, case.studies, candidates, max_bytes=limit)
    except DintsError as error:
        case.error = error
    return case


def finish_case(
    case: ReadCase,
    load: Callable[[str], LoadedEntry],
    *,
    warm: WarmSessions | None = None,
    planned: Callable[[Plan], None] = lambda plan: None,
    progress: Progress = lambda done, total: None,
) -> Outcome:
    """Segment a case that was read, write the outputs, read them back; arguments and errors as for `process_case`."""
    request = case.request
    try:
        if case.found is None:
            raise case.error or RuntimeError("expected a case that was read, or an error")
        source, spec = case.found
        return _segmented(request, source, load(spec.name), warm, planned, progress)
    except ScanRefused as refusal:
        if case.studies and "dicom-sr" in request.formats:
            report = write_refusal_report(list(case.studies.values()), refusal, request.stem, request.when)
            refusal.add_note(f"the refusal is written as {report}")
        raise


def _segmented(
    request: Request,
    source: Source,
    entry: LoadedEntry,
    warm: WarmSessions | None,
    planned: Callable[[Plan], None],
    progress: Progress,
) -> Outcome:
    make_folder(request.stem.parent)
    segmentation = segment(
        source.scan,
        entry,
        engine=request.engine,
        precision=request.precision,
        device=request.device,
        threads=request.threads,
        max_ram_bytes=request.max_ram_bytes,
        modality=source.modality,
        warm=warm,
        planned=planned,
        progress=progress,
    )
    parity = parity_status(entry, segmentation.session)
    record = describe(segmentation, entry, source.scan, input_digests=source.digests, parity=parity)
    record |= _about_series(source)
    result = Result(
        request.stem,
        request.labels_path,
        entry,
        source,
        segmentation,
        record,
        request.when,
        request.formats,
        request.supersedes,
    )
    return Outcome(record, write_outputs(result))


def _about_series(source: Source) -> dict[str, Any]:
    if not source.dicom:
        return {}
    chosen = {name: volume.series.label for name, volume in source.dicom.items()}
    findings = [str(item) for volume in source.dicom.values() for item in volume.report.findings]
    lines = {"taken": list(source.taken), "not_chosen": list(source.not_chosen), "handled": list(source.handled)}
    return {"series": {"chosen": chosen, **lines, "findings": findings}}
