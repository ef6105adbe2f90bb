"""`dints-deploy zoo`: list, show, verify, add and remove entries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dints_deploy.catalog.catalog import (
    add_entry,
    added_zoo,
    entry_folders,
    load_entry,
    read_entry,
    remove_entry,
    verify_entry,
)
from dints_deploy.cli.console import JsonOption, failing, say, say_error, say_json
from dints_deploy.errors import DintsError, EntryError

zoo_app = typer.Typer(no_args_is_help=True, help="List, show, verify, add and remove zoo entries.")

Name = Annotated[str, typer.Argument(help="Name of an entry.")]


@zoo_app.command("list")
def list_command(as_json: JsonOption = False) -> None:
    """List the entries of this machine.

    Example: dints-deploy zoo list
    """
    with failing(as_json):
        rows = []
        for name, folder in entry_folders().items():
            try:
                rows.append(_row(name, folder))
            except EntryError as error:  # one damaged entry must not hide the others
                say_error(error, name)
        if as_json:
            say_json(rows)
            return
        from rich.table import Table

        table = Table("entry", "version", "weights", "labels", "modality", "origin")
        table.columns[0].no_wrap = True
        for row in rows:
            weights = str(row["members"]) if row["members"] else "recipe"
            labels, modality = str(len(row["labels"])), "/".join(row["modality"])
            table.add_row(row["name"], row["version"], weights, labels, modality, row["origin"])
        say(table)


def _row(name: str, folder: Path) -> dict[str, Any]:
    spec = read_entry(folder)
    return {
        "name": name,
        "version": spec.version,
        "title": spec.title,
        "members": len(spec.members),
        "labels": [label.id for label in spec.labels],
        "modality": list(spec.accepts.modality),
        "licence": spec.licence,
        "origin": "added" if folder.parent == added_zoo() else "shipped",
    }


@zoo_app.command("show")
def show_command(name: Name, as_json: JsonOption = False) -> None:
    """Show everything an entry says about itself.

    Example: dints-deploy zoo show hippocampus
    """
    with failing(as_json):
        entry = load_entry(name)
        if as_json:
            say_json({"folder": str(entry.folder), "sha256": entry.digests, **entry.spec.model_dump(mode="json")})
            return
        card = entry.folder / "card.md"
        say(card.read_text(encoding="utf-8") if card.is_file() else entry.spec.intended_use)
        for path, digest in entry.digests.items():
            say(f"{digest}  {path}")


@zoo_app.command("verify")
def verify_command(
    names: Annotated[list[str] | None, typer.Argument(help="Entries, all by default; a path works too.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of entries: checksums, schema, paths, ONNX structure.

    Example: dints-deploy zoo verify hippocampus
    """
    results: list[dict[str, Any]] = []
    worst = 0
    for name in names or list(entry_folders()):
        try:
            entry = verify_entry(name)
            results.append({"name": name, "ok": True, "files": len(entry.digests)})
        except DintsError as error:
            say_error(error, name)
            results.append({"name": name, "ok": False, "code": error.code, "message": error.message})
            worst = max(worst, error.exit_code)
    if as_json:
        say_json(results)
    else:
        for result in results:
            say(f"{result['name']}: {_verdict(result)}")
    raise typer.Exit(worst)


def _verdict(result: dict[str, Any]) -> str:
    return f"verified, {result['files']} files" if result["ok"] else f"refused, {result['code']}"


@zoo_app.command("add")
def add_command(
    folder: Annotated[Path, typer.Argument(help="A folder with entry.toml and its ONNX files.")],
    as_json: JsonOption = False,
) -> None:
    """Copy an entry, or your own ONNX with an entry.toml, into this machine's zoo.

    Example: dints-deploy zoo add my-model/
    """
    with failing(as_json):
        entry = add_entry(folder)
        said = {"name": entry.spec.name, "folder": str(entry.folder)}
        say_json(said) if as_json else say(f"added {entry.spec.name} at {entry.folder}")


@zoo_app.command("remove")
def remove_command(name: Name, as_json: JsonOption = False) -> None:
    """Remove an entry that was added on this machine.

    Example: dints-deploy zoo remove my-model
    """
    with failing(as_json):
        folder = remove_entry(name)
        say_json({"name": name, "folder": str(folder)}) if as_json else say(f"removed {name} from {folder}")
