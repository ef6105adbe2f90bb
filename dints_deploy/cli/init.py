"""`dints-deploy init`: write a first appliance.toml."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dints_deploy.cli.console import JsonOption, failing, say, say_json
from dints_deploy.errors import UsageError


def init_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("appliance.toml"),
    data_dir: Annotated[Path | None, typer.Option(help="Where the daemon keeps everything.")] = None,
    ae_title: Annotated[str | None, typer.Option(help="AE title under which studies are received.")] = None,
    port: Annotated[int | None, typer.Option(help="Port on which studies are received.")] = None,
    caller: Annotated[list[str] | None, typer.Option(help="AE title that may send; several times; * for all.")] = None,
    entry: Annotated[str | None, typer.Option(help="The zoo entry that studies go to.")] = None,
    pacs: Annotated[str | None, typer.Option(help="Where results go: TITLE@HOST:PORT, or 'none': a folder.")] = None,
    folder: Annotated[Path | None, typer.Option(help="A folder that is watched as well.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a commented appliance.toml from a few answers, asked on a terminal where no option gives them.

    Example: dints-deploy init -o appliance.toml --ae-title DINTS --caller MR1 --pacs PACS@10.1.2.3:104
    """
    with failing(as_json):
        from dints_deploy.config.initial import Answers, write_initial

        default = Answers()
        answers = Answers(
            data_dir=Path(_answer("Data folder", data_dir, default.data_dir)).absolute(),
            ae_title=_answer("Our AE title", ae_title, default.ae_title),
            port=int(_answer("Port", port, default.port)),
            callers=caller or _answer("AE titles that may send, * for all", None, "*").replace(",", " ").split(),
            entry=_answer("Zoo entry", entry, default.entry),
            pacs=_pacs(_answer("PACS for results (TITLE@HOST:PORT), or none", pacs, "none")),
            folder=None if folder is None else folder.absolute(),
        )
        config = write_initial(output, answers)
        if as_json:
            say_json({"file": str(output), "config": config.model_dump(mode="json")})
        else:
            say(f"wrote {output}: read it, then run dints-deploy watch --config {output}")


def _answer(question: str, given: object | None, default: object) -> str:
    """Return what an option gave, else what a person on the terminal says, else the default."""
    if given is not None:
        return str(given)
    if not sys.stdin.isatty():
        return str(default)
    return str(typer.prompt(question, default=str(default), err=True))


def _pacs(text: str) -> tuple[str, str, int] | None:
    if text == "none":
        return None
    title, _, place = text.partition("@")
    host, _, port = place.rpartition(":")
    if not (title and host and port.isdigit()):
        raise UsageError("usage", f"expected --pacs TITLE@HOST:PORT, found {text}: for example PACS@10.1.2.3:104")
    return title, host, int(port)
