"""`dints-deploy export`: an entry's or a run's network in the form of an engine, with its parity proven."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from dints_deploy.catalog.catalog import runnable, verify_entry
from dints_deploy.catalog.dataset import read_dataset
from dints_deploy.cli.console import JsonOption, failing, say, say_json
from dints_deploy.cli.extra import needs_search_extra
from dints_deploy.errors import UsageError
from dints_deploy.files import make_folder, replacing


def export_command(
    entry: Annotated[str | None, typer.Argument(help="Zoo entry whose ONNX files are copied out.")] = None,
    run: Annotated[Path | None, typer.Option(help="A finished training run, instead of ENTRY (needs torch).")] = None,
    data: Annotated[Path | None, typer.Option(help="The run's task folder: parity is measured on its scans.")] = None,
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder for the files.")] = Path(),
    onnx: Annotated[bool, typer.Option("--onnx", help="Write ONNX (fp32), the only form of this version.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a network as ONNX, weights inside; from a run, proven equal to torch on real windows first.

    Example: dints-deploy export --run runs/a --data Task04_Hippocampus --onnx -o exported/
    """
    with failing(as_json):
        if not onnx:
            raise UsageError("usage", "expected --onnx: it is the only form that this version exports")
        if (entry is None) == (run is None):
            raise UsageError("usage", "expected ENTRY or --run RUN, one of the two")
        files = _copy_entry(entry, out) if entry is not None else _export_run(run, data, out)
        say_json({"files": [str(path) for path in files]}) if as_json else say("\n".join(str(path) for path in files))


def _copy_entry(name: str, out: Path) -> list[Path]:
    entry = runnable(verify_entry(name))
    make_folder(out)
    files = []
    for member in entry.spec.members:
        path = out / f"{entry.spec.name}-{member.onnx.replace('/', '-')}"
        with replacing(path) as partial:
            shutil.copyfile(entry.folder / member.onnx, partial)
        files.append(path)
    return files


def _export_run(run: Path | None, data: Path | None, out: Path) -> list[Path]:
    with needs_search_extra("export --run"):
        from dints_search.export import export_run
    if run is None or data is None:
        raise UsageError("usage", "expected --run RUN with --data DIR: parity is measured on real windows")
    return export_run(run, read_dataset(data), make_folder(out))
