"""`dints-deploy init`: write a first appliance.toml."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from dints_deploy.cli.console import JsonOption, failing, say, say_error, say_json
from dints_deploy.errors import UsageError

T = TypeVar("T")


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
            data_dir=_answer("Data folder", data_dir, default.data_dir, Path).absolute(),
            ae_title=_answer("Our AE title", ae_title, default.ae_title, str),
            port=_answer("Port", port, default.port, _port),
            callers=caller or _answer("AE titles that may send, * for all", None, "*", _titles),
            entry=_answer("Zoo entry", entry, default.entry, str),
            pacs=_answer("PACS for results (TITLE@HOST:PORT), or none", pacs, "none", _pacs),
            folder=None if folder is None else folder.absolute(),
        )
        config = write_initial(output, answers)
        if as_json:
            say_json({"file": str(output), "config": config.model_dump(mode="json")})
        else:
            say(f"wrote {output}: read it, then run dints-deploy watch --config {output}")


def _answer(question: str, given: object | None, default: object, read: Callable[[str], T]) -> T:
    """Return what an option gave, else what a person at a terminal says once it makes sense, else the default."""
    if given is not None or not sys.stdin.isatty():
        return read(str(default if given is None else given))
    while True:
        try:
            return read(str(typer.prompt(question, default=str(default), err=True)))
        except UsageError as error:
            say_error(error)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16):
        raise UsageError("usage", f"expected a port from 1 to 65535, found {text}: for example 11112")
    return int(text)


def _titles(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _pacs(text: str) -> tuple[str, str, int] | None:
    if text == "none":
        return None
    title, _, place = text.partition("@")
    host, _, port = place.rpartition(":")
    if not (title and host):
        raise UsageError("usage", f"expected a PACS as TITLE@HOST:PORT, found {text}: for example PACS@10.1.2.3:104")
    return title, host, _port(port)
