"""process_case: read -> segment -> outputs -> self-check, for the command line and the daemon's worker alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dints_deploy.catalog.catalog import LoadedEntry
from dints_deploy.catalog.entry import Entry
from dints_deploy.errors import ScanRefused, UsageError
from dints_deploy.files import make_folder
from dints_deploy.process.outputs import Result, check_formats, write_outputs, write_refusal_report
from dints_deploy.process.source import Scan, Source, open_studies, read_source
from dints_deploy.runtime.parity import parity_status
from dints_deploy.runtime.report import describe
from dints_deploy.runtime.segment import Progress, segment


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


@dataclass(frozen=True, eq=False)
class Outcome:
    """A finished case: its record (see `describe`) and the files written, by format."""

    record: dict[str, Any]
    files: dict[str, Path] = field(default_factory=dict)


def process_case(
    request: Request,
    candidates: Mapping[str, Entry],
    load: Callable[[str], LoadedEntry],
    *,
    progress: Progress = lambda done, total: None,
) -> Outcome:
    """Read a scan, find its entry, segment it, write the outputs, read them back.

    A DICOM study that is refused gets its refusal as an SR beside the outputs, where `dicom-sr` is asked for.

    Args:
        request: what to do.
        candidates: name -> entry to choose from.
        load: the verified entry of a name.
        progress: called after every window.

    Raises:
        ScanRefused, EntryError, EngineError, OutputError, UsageError: with their codes; no partial file is left, and
            no output of a case is left when a later one fails.
    """
    check_formats(request.formats)
    with ExitStack() as resources:
        studies = open_studies(request.channels, resources)
        try:
            source, spec = read_source(request.channels, studies, candidates, max_bytes=request.max_ram_bytes)
            return _process(request, source, load(spec.name), progress)
        except ScanRefused as refusal:
            if studies and "dicom-sr" in request.formats:
                report = write_refusal_report(list(studies.values()), refusal, request.stem, request.when)
                refusal.add_note(f"the refusal is written as {report}")
            raise


def _process(request: Request, source: Source, entry: LoadedEntry, progress: Progress) -> Outcome:
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
        progress=progress,
    )
    parity = parity_status(entry, segmentation.session)
    record = describe(segmentation, entry, source.scan, input_digests=source.digests, parity=parity)
    record |= _about_series(source)
    result = Result(
        request.stem, request.labels_path, entry, source, segmentation, record, request.when, request.formats
    )
    return Outcome(record, write_outputs(result))


def _about_series(source: Source) -> dict[str, Any]:
    if not source.dicom:
        return {}
    chosen = {name: volume.series.label for name, volume in source.dicom.items()}
    findings = [str(item) for volume in source.dicom.values() for item in volume.report.findings]
    return {"series": {"chosen": chosen, "not_chosen": list(source.not_chosen), "findings": findings}}
