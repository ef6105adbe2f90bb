"""`dints-deploy dicom`: look into DICOM folders and zips."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dints_deploy.cli.console import JsonOption, failing, say, say_json

dicom_app = typer.Typer(no_args_is_help=True, help="Look into DICOM folders and zips.")


@dicom_app.callback()
def options() -> None:
    """Look into DICOM folders and zips."""


@dicom_app.command("inspect")
def inspect_command(
    source: Annotated[Path, typer.Argument(help="A DICOM folder, a zip of one, or a single file.")],
    as_json: JsonOption = False,
) -> None:
    """Print the studies, series and what the geometry gate finds; no names, ids or dates of patients.

    Example: dints-deploy dicom inspect study/
    """
    with failing(as_json):
        from dints_deploy.dicom.inspect import as_lines, describe
        from dints_deploy.dicom.series import opened

        with opened(source) as study:
            tree = describe(study)
        say_json(tree) if as_json else say("\n".join(as_lines(tree)))
