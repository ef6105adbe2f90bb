"""The command line: one file per noun, each command parses, calls one function, prints, and returns an exit code.

A call imports the file of its own command only: the others' imports are a seventh of a quick command's time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, Final

import typer

HELP: Final = "Segment 3-D medical scans with networks of a zoo, and make such networks. Research use only."

COMMANDS: Final = {
    "segment": "segment.segment_command",
    "evaluate": "evaluate.evaluate_command",
    "verify": "verify.verify_command",
    "retrain": "retrain.retrain_command",
    "crossval": "crossval.crossval_command",
    "publish": "publish.publish_command",
    "export": "export.export_command",
    "doctor": "doctor.doctor_command",
    "init": "init.init_command",
    "watch": "watch.watch_command",
    "search": "search.search_app",
    "data": "data.data_app",
    "dicom": "dicom.dicom_app",
    "zoo": "zoo.zoo_app",
    "route": "route.route_app",
    "jobs": "jobs.jobs_app",
    "audit": "audit.audit_app",
}
"""Command -> where it is in this package; an app is a group of commands."""


def build(words: Sequence[str] = ()) -> typer.Typer:
    """Return the command line for a call with these words: the one command that they name, or else all."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)
    app.callback()(options)
    for name in words[:1] if words[:1] and words[0] in COMMANDS else COMMANDS:
        module, _, attribute = COMMANDS[name].partition(".")
        command = getattr(import_module(f"dints_deploy.cli.{module}"), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def __getattr__(name: str) -> Any:
    """Return `app`, the whole command line, made when it is asked for."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return build()


def _version(asked: bool) -> None:
    if asked:
        from dints_deploy.runtime.report import software_version

        typer.echo(software_version())
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Segment 3-D medical scans with networks of a zoo, and make such networks. Research use only."""


def main() -> None:
    """Run the command line."""
    build(sys.argv[1:])()
