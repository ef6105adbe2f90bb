"""`dints-deploy audit`: is the audit trail whole?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dints_deploy.cli.console import JsonOption, failing, say, say_json

audit_app = typer.Typer(no_args_is_help=True, help="Check the daemon's audit trail.")


@audit_app.callback()
def options() -> None:
    """Check the daemon's audit trail."""


@audit_app.command("verify")
def audit_verify_command(
    config: Annotated[Path, typer.Option("--config", help="The daemon's appliance.toml.")],
    as_json: JsonOption = False,
) -> None:
    """Check every line of the audit trail against the one before it, and its head against the anchor.

    Example: dints-deploy audit verify --config appliance.toml
    """
    with failing(as_json):
        from dints_deploy.config import load_config
        from dints_deploy.service.audit import Trail, verify_trail

        settings = load_config(config)
        head = verify_trail(settings.data_dir, settings.audit_anchor)
        path = Trail(settings.data_dir, settings.audit_anchor).path
        if as_json:
            say_json({"file": str(path), "lines": head.seq, "sha256": head.sha256})
        else:
            say(f"{path}: {head.seq} lines, unbroken, head {head.sha256}")
