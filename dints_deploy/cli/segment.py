"""`dints-deploy segment`: scans in, labels out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from dints_deploy.catalog.catalog import LoadedEntry, entry_folders, load_entry, read_entry
from dints_deploy.catalog.entry import RESEARCH_USE
from dints_deploy.cli.console import JsonOption, failing, printable, progress, say, say_error, say_json
from dints_deploy.errors import DintsError, EntryError, ScanRefused, UsageError
from dints_deploy.process.case import Outcome, Request, process_case
from dints_deploy.process.outputs import check_formats
from dints_deploy.process.source import NIFTI_SUFFIXES, Scan, cases_of, first_file, output_stem

EXIT_FAILED: Final = 1
UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def segment_command(
    scans: Annotated[
        list[Path] | None,
        typer.Argument(
            help="NIfTI files, DICOM folders or zips, one case each; or a study's DICOM files.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A file (.nii, .nii.gz) for one scan, or a folder.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Zoo entry; without it, the only one that accepts the scan.")
    ] = None,
    channel: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE or NAME=FOLDER, once per channel of one case, instead of SCAN.")
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, openvino, onnx or tensorrt.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32; others need a local parity certificate.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cpu",
    to: Annotated[
        str,
        typer.Option(
            help="Comma-separated: nifti, dicom-seg, dicom-labelmap, dicom-sr, rtstruct, dicom-sc, preview, html."
        ),
    ] = "nifti",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
    max_ram: Annotated[str | None, typer.Option(help="Refuse in advance what needs more memory, such as 4G.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Segment scans with a zoo entry. Research use only.

    Example: dints-deploy segment scan.nii.gz -o out/ --to nifti,preview,html
    """
    with failing(as_json):
        cases = plan_cases(scans or [], channel or [], output)
        formats = tuple(part.strip() for part in to.split(",") if part.strip())
        check_formats(formats)
        settings: dict[str, Any] = {
            "formats": formats,
            "engine": engine,
            "precision": precision,
            "device": device,
            "threads": threads,
            "max_ram_bytes": parse_bytes(max_ram),
        }
        entries = Entries(model)
        results = [_run(case, settings, entries, quiet=as_json) for case in cases]
        code = exit_code([result if isinstance(result, DintsError) else None for result in results])
        if as_json:
            say_json({"exit_code": code, "cases": [_as_json(c, r) for c, r in zip(cases, results, strict=True)]})
        raise typer.Exit(code)


@dataclass(frozen=True)
class PlannedCase:
    """One case of a call: its files, its name in messages, where its outputs go."""

    channels: Mapping[str, Scan]
    name: str
    stem: Path
    labels_path: Path | None


class Entries:
    """The entries of a call: the one named, or all that have weights; each is verified and loaded once."""

    def __init__(self, model: str | None) -> None:
        if model is not None:
            loaded = load_entry(model)
            self._loaded = {loaded.spec.name: loaded}
            self.candidates = {loaded.spec.name: loaded.spec}
        else:
            self._loaded = {}
            self.candidates = {}
            for name, folder in entry_folders().items():
                try:
                    spec = read_entry(folder)
                except EntryError as error:  # one damaged entry must not stop the others
                    say_error(error, f"entry {name} is left out")
                    continue
                if spec.members and spec.name == name:
                    self.candidates[name] = spec

    def load(self, name: str) -> LoadedEntry:
        """Return a verified entry."""
        if name not in self._loaded:
            self._loaded[name] = load_entry(name)
        return self._loaded[name]


def plan_cases(scans: list[Path], channels: list[str], output: Path | None) -> list[PlannedCase]:
    """Return the cases of a call and where each one's outputs go.

    Raises:
        UsageError: `usage` when the call makes no sense.
    """
    if bool(scans) == bool(channels):
        raise UsageError("usage", "expected SCANs or --channel NAME=FILE, one of the two: see --help")
    inputs: list[dict[str, Scan]] = [{"": scan} for scan in cases_of(scans)] or [_parse_channels(channels)]
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


def _run(case: PlannedCase, settings: dict[str, Any], entries: Entries, *, quiet: bool) -> Outcome | DintsError:
    """Process one case; an error of this case does not end the call."""
    try:
        with progress(case.name) as report:
            request = Request(case.channels, case.stem, labels_path=case.labels_path, **settings)
            outcome = process_case(request, entries.candidates, entries.load, progress=report)
    except DintsError as error:
        say_error(error, case.name)
        return error
    if not quiet:
        _show(case, outcome)
    return outcome


def _show(case: PlannedCase, outcome: Outcome) -> None:
    record = outcome.record
    engine, model = record["engine"], record["model"]
    volumes = ", ".join(f"{s['name']} {s['volume_ml']:.3f} mL" for s in record["structures"])
    lines = [
        f"{case.name}: {volumes}",
        f"  {model['entry']} {model['version']}, {engine['name']} {engine['precision']} ({engine['why']})",
        *[f"  not taken: {line}" for line in record.get("series", {}).get("not_chosen", [])],
        *[f"  {path}" for path in outcome.files.values()],
        f"  {RESEARCH_USE}",
    ]
    for line in lines:
        say(printable(line))


def _as_json(case: PlannedCase, result: Outcome | DintsError) -> dict[str, Any]:
    if isinstance(result, DintsError):
        status = "refused" if isinstance(result, ScanRefused) else "failed"
        return {"case": case.name, "status": status, "code": result.code, "message": result.message}
    files = {name: str(path) for name, path in result.files.items()}
    return {"case": case.name, "status": "done", "files": files, **result.record}


def exit_code(errors: list[DintsError | None]) -> int:
    """Return 0 when all went well, 1 when any failed, else 3 when any was refused; one scan's own code for one scan."""
    found = [error for error in errors if error is not None]
    if len(errors) == 1 and found:
        return found[0].exit_code
    if any(not isinstance(error, ScanRefused) for error in found):
        return EXIT_FAILED
    return found[0].exit_code if found else 0


def parse_bytes(text: str | None) -> int | None:
    """Return the bytes of a text such as 4G or 512M; raise `UsageError` for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(?:([KMGT])I?)?B?", text.upper())
    if match is None:
        raise UsageError("usage", f"expected a size such as 4G or 512M, found {text!r}")
    return int(float(match[1]) * UNITS[match[2] or ""])
