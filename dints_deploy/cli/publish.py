"""`dints-deploy publish`: turn finished runs into a zoo entry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dints_deploy.catalog.dataset import read_dataset
from dints_deploy.cli.console import JsonOption, failing, progress, say, say_json
from dints_deploy.cli.extra import needs_search_extra


def publish_command(
    run: Annotated[list[Path], typer.Option(help="A finished run; several make an ensemble.")],
    name: Annotated[str, typer.Option(help="Name of the entry.")],
    data: Annotated[Path, typer.Option(help="The task's folder: parity windows and the evaluation come from it.")],
    out: Annotated[Path, typer.Option(help="Folder that gets the entry.")] = Path("zoo"),
    version: Annotated[str, typer.Option(help="Version of the entry.")] = "1.0.0",
    as_json: JsonOption = False,
) -> None:
    """Export, prove parity, evaluate the exported network, write the card: a complete zoo entry, or nothing.

    Example: dints-deploy publish --run runs/a --name hippocampus --data Task04_Hippocampus
    """
    with failing(as_json):
        with needs_search_extra("publish"):
            from dints_search.publish import publish
        with progress("publish") as bar:
            folder = publish(run, name, read_dataset(data), out, version=version, progress=bar)
        say_json({"entry": name, "folder": str(folder)}) if as_json else say(f"published {name} at {folder}")
