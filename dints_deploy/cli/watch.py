"""`dints-deploy watch`: the daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dints_deploy.cli.console import JsonOption, failing


def watch_command(
    config: Annotated[Path, typer.Option("--config", help="The daemon's appliance.toml; see dints-deploy init.")],
    as_json: JsonOption = False,
) -> None:
    """Receive studies, segment them, send the results, until SIGTERM or Ctrl-C. Research use only.

    SIGHUP reads routes, destinations and retention again. Log lines go to standard error as JSON.

    Example: dints-deploy watch --config /etc/dints-deploy/appliance.toml
    """
    with failing(as_json):
        from dints_deploy.service.daemon import run_daemon

        run_daemon(config)
