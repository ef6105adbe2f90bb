"""process_case: read -> segment -> outputs -> self-check, for the command line and the daemon's worker alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from dints_deploy.catalog.catalog import LoadedEntry
from dints_deploy.errors import OutputError, ScanRefused, UsageError
from dints_deploy.files import make_folder, replacing, sha256_file, write_text
from dints_deploy.imaging.nifti import read_nifti, write_nifti
from dints_deploy.imaging.volume import Volume
from dints_deploy.runtime.parity import parity_status
from dints_deploy.runtime.report import describe
from dints_deploy.runtime.segment import Progress, Segmentation, segment

NIFTI_SUFFIXES: Final = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Request:
    """What to do with one case.

    Attributes:
        channels: channel name -> file, in the entry's order; a single file under the name "" holds all channels.
        stem: path of the outputs without suffix; `<stem>.nii.gz`, `<stem>.png`, `<stem>.html`.
        formats: of OUTPUTS, in order.
        engine, precision, device, threads, max_ram_bytes: as for `segment`.
    """

    channels: Mapping[str, Path]
    stem: Path
    formats: tuple[str, ...] = ("nifti",)
    labels_path: Path | None = None
    engine: str = "auto"
    precision: str = "fp32"
    device: str = "cpu"
    threads: int | None = None
    max_ram_bytes: int | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """A finished case: its record (see `describe`) and the files written, by format."""

    record: dict[str, Any]
    files: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Result:
    """Everything that an output may show."""

    request: Request
    entry: LoadedEntry
    scan: Volume
    segmentation: Segmentation
    record: dict[str, Any]


def process_case(
    request: Request,
    choose: Callable[[Volume], LoadedEntry],
    *,
    progress: Progress = lambda done, total: None,
) -> Outcome:
    """Read a scan, segment it, write the outputs, read them back.

    Args:
        request: what to do.
        choose: the entry for a scan.
        progress: called after every window.

    Raises:
        ScanRefused, EntryError, EngineError, OutputError, UsageError: with their codes; no partial file is left, and
            no output of a case is left when a later one fails.
    """
    check_formats(request.formats)
    scan = read_channels(request.channels)
    entry = choose(scan)
    make_folder(request.stem.parent)
    segmentation = segment(
        scan,
        entry,
        engine=request.engine,
        precision=request.precision,
        device=request.device,
        threads=request.threads,
        max_ram_bytes=request.max_ram_bytes,
        progress=progress,
    )
    digests = {name or "scan": sha256_file(path) for name, path in request.channels.items()}
    record = describe(
        segmentation, entry, scan, input_digests=digests, parity=parity_status(entry, segmentation.session)
    )
    return Outcome(record, _write_all(_Result(request, entry, scan, segmentation, record)))


def _write_all(result: _Result) -> dict[str, Path]:
    """Write every format; when one fails, remove those already written, so that a case is whole or absent."""
    files: dict[str, Path] = {}
    with ExitStack() as undo:
        for name in result.request.formats:
            files[name] = OUTPUTS[name](result)
            undo.callback(files[name].unlink, missing_ok=True)
        undo.pop_all()
    return files


def check_formats(formats: tuple[str, ...]) -> None:
    """Refuse an output format that is not known; raise `UsageError`."""
    if unknown := [name for name in formats if name not in OUTPUTS]:
        raise UsageError("usage", f"expected outputs of {', '.join(OUTPUTS)}, found {', '.join(unknown)}")


def read_channels(channels: Mapping[str, Path]) -> Volume:
    """Read the channels of one case into one Volume.

    Raises:
        ScanRefused: of `read_nifti`, or `frame-mismatch` when the channels lie on different grids.
    """
    volumes = [read_nifti(path) for path in channels.values()]
    first = volumes[0]
    for name, volume in zip(channels, volumes, strict=True):
        if not volume.grid.same_as(first.grid, tolerance_mm=0.01):
            raise ScanRefused(
                "frame-mismatch", f"expected all channels on one grid, channel {name} has another: register them first"
            )
    if len(volumes) == 1:
        return first
    data = np.concatenate([v.data.astype(np.float32, copy=False) for v in volumes])
    return Volume(data, first.affine)


def _nifti(result: _Result) -> Path:
    """Write the label map and read it back: same grid, same voxels, or no file."""
    path = result.request.labels_path or result.request.stem.with_name(result.request.stem.name + ".nii.gz")
    labels = result.segmentation.labels
    write_nifti(path, labels)
    written = read_nifti(path)
    if not written.grid.same_as(labels.grid) or not np.array_equal(written.data, labels.data):
        path.unlink(missing_ok=True)
        raise OutputError(
            "output-selfcheck", f"expected {path} to read back as the mask that was computed: it does not"
        )
    return path


def _preview(result: _Result) -> Path:
    from dints_deploy.runtime.preview import render

    path = result.request.stem.with_name(result.request.stem.name + ".png")
    spec = result.entry.spec
    columns = [("image", None), ("prediction", result.segmentation.labels)]
    sheet = render(result.scan, columns, spec, f"{spec.name} {spec.version}")
    with replacing(path) as partial:
        sheet.save(partial)
    return path


def _html(result: _Result) -> Path:
    from dints_deploy.runtime.page import render_page
    from dints_deploy.runtime.preview import PLANES, picture

    path = result.request.stem.with_name(result.request.stem.name + ".html")
    spec, labels = result.entry.spec, result.segmentation.labels
    pictures = [(plane.name, picture(result.scan, labels, spec, plane, middle_of=labels)) for plane in PLANES]
    write_text(path, render_page(result.record, spec, pictures))
    return path


OUTPUTS: Final[dict[str, Callable[[_Result], Path]]] = {"nifti": _nifti, "preview": _preview, "html": _html}
"""Output format -> what writes it and returns its path."""


def output_stem(scan: Path) -> str:
    """Return a scan's file name without its NIfTI suffix."""
    for suffix in NIFTI_SUFFIXES:
        if scan.name.lower().endswith(suffix):
            return scan.name[: -len(suffix)]
    return scan.name
