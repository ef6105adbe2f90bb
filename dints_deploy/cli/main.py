"""The command line: one file per noun, each command parses, calls one function, prints, and returns an exit code."""

from __future__ import annotations

from typing import Annotated

import typer

from dints_deploy.cli.audit import audit_app
from dints_deploy.cli.crossval import crossval_command
from dints_deploy.cli.data import data_app
from dints_deploy.cli.dicom import dicom_app
from dints_deploy.cli.doctor import doctor_command
from dints_deploy.cli.evaluate import evaluate_command
from dints_deploy.cli.export import export_command
from dints_deploy.cli.init import init_command
from dints_deploy.cli.jobs import jobs_app
from dints_deploy.cli.publish import publish_command
from dints_deploy.cli.retrain import retrain_command
from dints_deploy.cli.route import route_app
from dints_deploy.cli.search import search_app
from dints_deploy.cli.segment import segment_command
from dints_deploy.cli.verify import verify_command
from dints_deploy.cli.watch import watch_command
from dints_deploy.cli.zoo import zoo_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Segment 3-D medical scans with networks of a zoo, and make such networks. Research use only.",
)
app.command("segment")(segment_command)
app.command("evaluate")(evaluate_command)
app.command("verify")(verify_command)
app.command("retrain")(retrain_command)
app.command("crossval")(crossval_command)
app.command("publish")(publish_command)
app.command("export")(export_command)
app.command("doctor")(doctor_command)
app.command("init")(init_command)
app.command("watch")(watch_command)
app.add_typer(search_app, name="search")
app.add_typer(data_app, name="data")
app.add_typer(dicom_app, name="dicom")
app.add_typer(zoo_app, name="zoo")
app.add_typer(route_app, name="route")
app.add_typer(jobs_app, name="jobs")
app.add_typer(audit_app, name="audit")


def _version(asked: bool) -> None:
    if asked:
        from dints_deploy.runtime.report import software_version

        typer.echo(software_version())
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Segment 3-D medical scans with networks of a zoo, and make such networks. Research use only."""


def main() -> None:
    """Run the command line."""
    app()
