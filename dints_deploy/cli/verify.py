"""`dints-deploy verify`: does a written DICOM object say the truth about itself?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from dints_deploy.cli.console import JsonOption, failing, say, say_json

EXIT_FAILED: Final = 1


def verify_command(
    result: Annotated[Path, typer.Argument(help="A SEG, SR, RTSTRUCT or secondary capture that dints-deploy wrote.")],
    source: Annotated[Path | None, typer.Option(help="The DICOM folder or zip that it was made from.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a result's provenance against the zoo, and its mask and identifiers against its source.

    Example: dints-deploy verify out/study_seg.seg.dcm --source study/
    """
    with failing(as_json):
        from dints_deploy.dicom.verify import verify_result

        verification = verify_result(result, source=source)
        if as_json:
            checks = [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in verification.checks]
            say_json({"kind": verification.kind, "passed": verification.passed, "checks": checks})
        else:
            from rich.table import Table

            table = Table("check", "", "found", title=f"{result.name}: {verification.kind or 'unknown object'}")
            for check in verification.checks:
                table.add_row(check.name, "ok" if check.passed else "FAILED", check.detail)
            say(table)
        raise typer.Exit(0 if verification.passed else EXIT_FAILED)
