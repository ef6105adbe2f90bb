"""`dints-deploy jobs`: what the daemon does and did; retry, put aside, remove."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dints_deploy.cli.console import JsonOption, failing, say, say_json

if TYPE_CHECKING:
    from dints_deploy.service.store import Store

jobs_app = typer.Typer(no_args_is_help=True, help="See the daemon's jobs; retry, put aside or remove them.")

ConfigOption = Annotated[Path, typer.Option("--config", help="The daemon's appliance.toml.")]
Job = Annotated[str, typer.Argument(help="Identifier of a job, or its beginning.")]


@jobs_app.command("list")
def list_command(
    config: ConfigOption,
    state: Annotated[str | None, typer.Option(help="Only jobs in this state: queued, running, done ...")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """List jobs, those that wait for somebody first, and the studies that are coming in.

    Example: dints-deploy jobs list --config appliance.toml --state quarantined
    """
    with failing(as_json), _store(config) as store:
        from dints_deploy.service.jobs import list_jobs, list_studies

        _check_state(state)
        jobs, studies = list_jobs(store, state=state, limit=limit), list_studies(store)
        if as_json:
            say_json({"jobs": jobs, "receiving": studies})
            return
        from rich.table import Table

        table = Table("job", "study", "rev", "route", "state", "tries", "reason", "since")
        table.columns[0].no_wrap = True
        for job in jobs:
            words = (job["id"][:10], job["study"], job["revision"], job["route"], job["state"], job["attempts"])
            table.add_row(*map(str, words), job["code"], job["created_at"][:19])
        say(table)
        for study in studies:
            say(f"study {study['study']} is coming in, {study['objects']} objects: {study['reason'] or 'just begun'}")


@jobs_app.command("show")
def show_command(job: Job, config: ConfigOption, as_json: JsonOption = False) -> None:
    """Show everything about a job: why its study counted as complete, its deliveries, its history.

    Example: dints-deploy jobs show 3f2a --config appliance.toml
    """
    with failing(as_json), _store(config) as store:
        from dints_deploy.service.jobs import show_job

        found = show_job(store, job)
        say_json(found) if as_json else say("\n".join(_lines(found)))


@jobs_app.command("retry")
def retry_command(job: Job, config: ConfigOption, as_json: JsonOption = False) -> None:
    """Run a job again that was put aside or refused, or only deliver it again where it has a result.

    Example: dints-deploy jobs retry 3f2a --config appliance.toml
    """
    with failing(as_json), _store(config) as store:
        from dints_deploy.service.jobs import retry_job

        state = retry_job(store, job)
        said = {"job": job, "state": state}
        say_json(said) if as_json else say(f"job {job} is {state} again")


@jobs_app.command("quarantine")
def quarantine_command(job: Job, config: ConfigOption, as_json: JsonOption = False) -> None:
    """Put a job aside until it is retried; a worker that runs it is ended.

    Example: dints-deploy jobs quarantine 3f2a --config appliance.toml
    """
    with failing(as_json), _store(config) as store:
        from dints_deploy.service.jobs import quarantine_job

        quarantine_job(store, job)
        said = {"job": job, "state": "quarantined"}
        say_json(said) if as_json else say(f"job {job} is put aside")


@jobs_app.command("purge")
def purge_command(job: Job, config: ConfigOption, as_json: JsonOption = False) -> None:
    """Remove a job's study with its objects and results; the daemon does it at its next look, or its next start.

    Example: dints-deploy jobs purge 3f2a --config appliance.toml
    """
    with failing(as_json), _store(config) as store:
        from dints_deploy.service.jobs import mark_purged

        study = mark_purged(store, job)
        said = {"job": job, "study": study, "removed": "at the daemon's next look"}
        say_json(said) if as_json else say(f"study {study} is removed at the daemon's next look")


@contextmanager
def _store(config: Path) -> Iterator[Store]:
    """Yield the database that a configuration names."""
    from dints_deploy.config import load_config
    from dints_deploy.service.jobs import open_existing

    store = open_existing(load_config(config).data_dir)
    try:
        yield store
    finally:
        store.close()


def _check_state(state: str | None) -> None:
    from dints_deploy.errors import UsageError
    from dints_deploy.service.states import JOB_STATES

    if state is not None and state not in JOB_STATES:
        raise UsageError("usage", f"expected --state of {', '.join(JOB_STATES)}, found {state}")


def _lines(job: dict[str, Any]) -> list[str]:
    """Return what `show_job` returns as lines for a terminal."""
    lines = [f"{name}: {job[name]}" for name in ("id", "study", "revision", "route", "entry", "state")]
    lines.append(f"complete because: {job['complete_because']}")
    lines.append(f"attempts: {job['attempts']}, crashes {job['crashes']}, interruptions {job['interruptions']}")
    if job["code"]:
        lines.append(f"reason: {job['message']} [{job['code']}]")
    lines += [f"file: {name}  {digest}" for name, digest in job["files"].items()]
    for one in job["deliveries"]:
        reason = f": {one['message']} [{one['code']}]" if one["code"] else ""
        lines.append(f"to {one['destination']}: {one['state']}, {one['attempts']} tries{reason}")
    lines += [f"conflict: object {digest[:12]} came under the name of another" for digest in job["conflicts"]]
    for event in job["history"]:
        rest = {key: value for key, value in event.items() if key not in HIDDEN}
        lines.append(f"{event['time']}  {event['action']}  " + "  ".join(f"{k}={v}" for k, v in rest.items()))
    return lines


HIDDEN = frozenset({"seq", "previous", "time", "action", "study", "job"})
"""What a line of history need not repeat."""
