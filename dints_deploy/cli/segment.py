"""`dints-deploy segment`: scans in, labels out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from dints_deploy.catalog.catalog import LoadedEntry, entry_folders, load_entry, read_entry
from dints_deploy.catalog.entry import RESEARCH_USE
from dints_deploy.cli.cases import PlannedCase, plan_cases
from dints_deploy.cli.console import (
    JsonOption,
    failing,
    notes_of,
    printable,
    progress,
    say,
    say_error,
    say_json,
    say_note,
)
from dints_deploy.errors import DintsError, EngineError, EntryError, ScanRefused, UsageError
from dints_deploy.process.case import Outcome, ReadCase, Request, finish_case, read_cases
from dints_deploy.process.outputs import check_formats
from dints_deploy.runtime.engine import check_engine
from dints_deploy.runtime.memory import Plan
from dints_deploy.runtime.sessions import WarmSessions

EXIT_FAILED: Final = 1
NO_ROOM: Final = "expected room for this scan, found the memory full: free some, or set a limit with --max-ram"
UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def segment_command(
    scans: Annotated[
        list[Path] | None,
        typer.Argument(
            help="NIfTI files or a folder of them, DICOM folders or zips, one case each; or a study's DICOM files.",
            show_default=False,
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
    engine: Annotated[str, typer.Option(help="auto, openvino, onnx, onnx-trt or tensorrt.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32; others need a local parity certificate.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cpu",
    to: Annotated[
        str,
        typer.Option(
            help="Comma-separated: nifti, dicom-seg, dicom-labelmap, dicom-sr, rtstruct, dicom-sc, preview, html."
        ),
    ] = "nifti",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
    max_ram: Annotated[
        str | None,
        typer.Option(
            help="Keep the run within this, such as 4G, in blocks if need be; refuse in advance what cannot. "
            "DICOM objects and the page come after it."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Segment scans with a zoo entry. Research use only.

    Example: dints-deploy segment scan.nii.gz -o out/ --to nifti,preview,html
    """
    with failing(as_json):
        cases = plan_cases(scans or [], channel or [], output)
        formats = tuple(part.strip() for part in to.split(",") if part.strip())
        check_formats(formats)
        check_engine(engine, device)
        settings: dict[str, Any] = {
            "formats": formats,
            "engine": engine,
            "precision": precision,
            "device": device,
            "threads": threads,
            "max_ram_bytes": parse_bytes(max_ram),
        }
        _segment_all(cases, settings, Entries(model), as_json=as_json)


def _segment_all(cases: list[PlannedCase], settings: dict[str, Any], entries: Entries, *, as_json: bool) -> None:
    """Process the cases with warm networks, show them, and exit with the code that tells the worst."""
    requests = [Request(case.channels, case.stem, labels_path=case.labels_path, **settings) for case in cases]
    quiet = as_json or len(cases) > 1
    with WarmSessions() as warm:
        reading = zip(cases, read_cases(requests, entries.candidates), strict=True)
        results = [_run(case, read, entries, warm, quiet=quiet) for case, read in reading]
    code = exit_code([result if isinstance(result, DintsError) else None for result in results])
    if as_json:
        say_json({"exit_code": code, "cases": [_as_json(c, r) for c, r in zip(cases, results, strict=True)]})
    elif len(cases) > 1:
        _show_all(cases, results)
    raise typer.Exit(code)


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


def _run(
    case: PlannedCase, read: ReadCase, entries: Entries, warm: WarmSessions, *, quiet: bool
) -> Outcome | DintsError:
    """Process one case; an error of this case does not end the call."""
    try:
        with read, progress(case.name) as report:
            outcome = finish_case(read, entries.load, warm=warm, planned=_tell_price(case), progress=report)
    except (DintsError, MemoryError) as fault:
        error = fault if isinstance(fault, DintsError) else EngineError("engine-memory", NO_ROOM)
        say_error(error, case.name)
        return _alone(error)
    if not quiet:
        _show(case, outcome)
    return outcome


def _alone(error: DintsError) -> DintsError:
    """Return the error without the frames it came through: they hold the scan, and other scans follow."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _tell_price(case: PlannedCase) -> Callable[[Plan], None]:
    """Return what says, before the run, what keeping the memory limit costs."""

    def tell(plan: Plan) -> None:
        if plan.again:
            share = plan.again / plan.windows
            say_note(
                f"{case.name}: {len(plan.blocks)} blocks to keep within the memory: "
                f"{plan.again} of {plan.windows} windows are run again ({share:+.0%})"
            )

    return tell


def _show_all(cases: list[PlannedCase], results: list[Outcome | DintsError]) -> None:
    """Print one table of all cases."""
    from rich.table import Table
    from rich.text import Text

    table = Table("scan", "result", "structures, mL", "s", "written")
    for case, result in zip(cases, results, strict=True):
        if isinstance(result, DintsError):
            cells = [_status(result), result.code, "", ""]
        else:
            volumes = ", ".join(f"{s['name']} {s['volume_ml']:.3f}" for s in result.record["structures"])
            seconds = sum(result.record["seconds"][stage] for stage in ("prepare", "load", "sweep", "postprocess"))
            cells = ["done", volumes, f"{seconds:.1f}", " ".join(str(path) for path in result.files.values())]
        table.add_row(*(Text(printable(cell), overflow="fold") for cell in (case.name, *cells)))
    say(table)
    say(RESEARCH_USE)


def _show(case: PlannedCase, outcome: Outcome) -> None:
    record = outcome.record
    engine, model, series = record["engine"], record["model"], record.get("series", {})
    volumes = ", ".join(f"{s['name']} {s['volume_ml']:.3f} mL" for s in record["structures"])
    lines = [
        f"{case.name}: {volumes}",
        f"  {model['entry']} {model['version']}, {engine['name']} {engine['precision']} ({engine['why']})",
        *[f"  taken: {line}" for line in series.get("taken", [])],
        *[f"  not taken: {line}" for line in series.get("not_chosen", [])],
        *[f"  {line}" for line in series.get("handled", [])],
        *[f"  {path}" for path in outcome.files.values()],
        f"  {RESEARCH_USE}",
    ]
    for line in lines:
        say(printable(line))


def _as_json(case: PlannedCase, result: Outcome | DintsError) -> dict[str, Any]:
    if isinstance(result, DintsError):
        status = _status(result)
        noted = {"notes": notes} if (notes := notes_of(result)) else {}
        return {"case": case.name, "status": status, "code": result.code, "message": result.message, **noted}
    files = {name: str(path) for name, path in result.files.items()}
    return {"case": case.name, "status": "done", "files": files, **result.record}


def _status(error: DintsError) -> str:
    return "refused" if isinstance(error, ScanRefused) else "failed"


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
