"""`dints-deploy doctor`: what this machine can run, and what is missing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dints_deploy.cli.console import JsonOption, failing, say, say_json


def doctor_command(
    config: Annotated[
        Path | None, typer.Option(help="An appliance.toml: its folders, ports and peers are looked at as well.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what this machine can run, what is missing, and the command to get it. Ends with 1 where there is a problem.

    With --config, peers are asked whether they answer (C-ECHO); nothing else leaves the machine.

    Example: dints-deploy doctor --config appliance.toml
    """
    with failing(as_json):
        from dints_deploy.runtime.doctor import CHECKS, examine

        checks = CHECKS
        if config is not None:
            from dints_deploy.service.doctor import daemon_checks

            checks += daemon_checks(config)
        findings = examine(checks)
        problems = sum(finding.status == "problem" for finding in findings)
        if as_json:
            say_json({"problems": problems, "findings": [asdict(finding) for finding in findings]})
        else:
            for finding in findings:
                say(f"{finding.status:<8} {finding.subject}: {finding.found}")
                if finding.fix:
                    say(f"         -> {finding.fix}")
            say(f"{problems} problem(s)")
    raise typer.Exit(1 if problems else 0)
