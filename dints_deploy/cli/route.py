"""`dints-deploy route`: try routes on a study before it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dints_deploy.cli.console import JsonOption, failing, say, say_json

route_app = typer.Typer(no_args_is_help=True, help="Try the daemon's routes on a study.")


@route_app.callback()
def options() -> None:
    """Try the daemon's routes on a study."""


@route_app.command("test")
def route_test_command(
    source: Annotated[Path, typer.Argument(help="A DICOM folder, a zip of one, or a single file.")],
    config: Annotated[Path, typer.Option("--config", help="The daemon's appliance.toml.")],
    called: Annotated[str | None, typer.Option(help="Our AE title, or the watched folder, that it comes to.")] = None,
    calling: Annotated[str, typer.Option(help="AE title of the sender.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Show which routes would take a study and why, and which series each would process; nothing is sent or kept.

    Without --called the study is tried at every AE title and folder of the configuration.

    Example: dints-deploy route test study/ --config appliance.toml --called DINTS --calling MR1
    """
    with failing(as_json):
        from dints_deploy.config import load_config
        from dints_deploy.service.rehearse import as_lines, rehearse

        found = rehearse(source, load_config(config), called=called, calling=calling)
        _show(found, as_json, as_lines(found))


def _show(found: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    say_json(found) if as_json else say("\n".join(lines))
