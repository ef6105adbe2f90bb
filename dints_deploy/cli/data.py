"""`dints-deploy data`: fetch a public task, look at a dataset, plan a recipe for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dints_deploy.catalog.dataset import read_dataset
from dints_deploy.cli.console import JsonOption, failing, progress, say, say_json
from dints_deploy.cli.extra import needs_search_extra
from dints_deploy.cli.segment import parse_bytes
from dints_deploy.errors import UsageError
from dints_deploy.files import write_text

EXIT_FAILED = 1

data_app = typer.Typer(no_args_is_help=True, help="Datasets to train on or to measure with, in MSD layout.")


@data_app.command("fetch")
def fetch_command(
    task: Annotated[str, typer.Argument(help="Number or name of a task of the Medical Segmentation Decathlon.")],
    out: Annotated[Path, typer.Option(help="Folder that gets the task's folder.")] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Download a task of the Medical Segmentation Decathlon, check its checksum, unpack it.

    Example: dints-deploy data fetch hippocampus --out data
    """
    with failing(as_json):
        with needs_search_extra("data fetch"):
            from dints_search.fetch import fetch
        with progress("fetch") as bar:
            folder = fetch(task, out, progress=bar)
        cases = len(read_dataset(folder).cases)
        say_json({"folder": str(folder), "cases": cases}) if as_json else say(f"{folder}: {cases} labelled cases")


@data_app.command("check")
def check_command(
    folder: Annotated[Path, typer.Argument(help="A folder in MSD layout (dataset.json, imagesTr, labelsTr).")],
    as_json: JsonOption = False,
) -> None:
    """Read every case and list what is wrong: files, grids, label values, voxels, classes that no case shows.

    Example: dints-deploy data check Task04_Hippocampus
    """
    with failing(as_json):
        from dints_deploy.runtime.check import check_dataset

        with progress("check") as bar:
            report = check_dataset(folder, progress=bar)
        say_json(report.as_dict()) if as_json else _show_check(report)
    if not report.sound:
        raise typer.Exit(EXIT_FAILED)


@data_app.command("plan")
def plan_command(
    folder: Annotated[Path, typer.Argument(help="A folder in MSD layout.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The recipe to write (.toml).")],
    task: Annotated[
        str | None, typer.Option(help="Start from this task's recipe: its labels, codes and words stay.")
    ] = None,
    max_memory: Annotated[str, typer.Option(help="Activations that a training step may keep, such as 8G.")] = "8G",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="With --task: NAME=VALUE of its recipe, such as dataset.labels=[...]."),
    ] = None,
    channels: Annotated[float, typer.Option(min=1 / 32, help="Channel multiplier of the network.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Measure a dataset and write a recipe for it: spacing, window, batch, intensities; edit it as you like.

    Example: dints-deploy data plan MyTask -o mytask.toml --max-memory 4G
    """
    with failing(as_json):
        with needs_search_extra("data plan"):
            from dints_search.dataset import check_dataset
            from dints_search.fingerprint import fingerprint
            from dints_search.plan import plan, write_plan
            from dints_search.recipe import find_recipe, override
        memory_bytes = parse_bytes(max_memory)
        if not memory_bytes:
            raise UsageError("usage", f"expected --max-memory SIZE above 0, such as 8G, found {max_memory}")
        if output.exists():
            raise UsageError("usage", f"expected no {output} yet: it may hold your changes; choose another with -o")
        if settings and not task:
            raise UsageError("usage", "expected --set with --task: edit the recipe that is written")
        dataset = read_dataset(folder)
        start = override(find_recipe(task), settings or []) if task else None
        if start is not None:
            check_dataset(dataset, start)
        with progress("fingerprint") as bar:
            measured = fingerprint(dataset, progress=bar)
        recipe, reasons = plan(
            dataset,
            measured,
            start=start,
            memory_bytes=memory_bytes,
            channel_multiplier=channels,
        )
        write_text(output, write_plan(recipe, reasons))
        document = {"recipe": str(output), "reasons": reasons, "fingerprint": measured.model_dump(mode="json")}
        say_json(document) if as_json else say("\n".join([*reasons, f"written: {output}"]))


def _show_check(report: Any) -> None:
    from rich.table import Column, Table

    table = Table(Column("case", overflow="fold", no_wrap=False), "voxels", "spacing in mm")
    for name in (*report.dataset.labels.values(), "remarks"):
        table.add_column(name)
    for case in report.cases:
        counts = ["-" if case.fault else str(case.labels.get(value, 0)) for value in report.dataset.labels]
        sizes = " x ".join(str(n) for n in case.shape), " x ".join(f"{mm:g}" for mm in case.spacing)
        table.add_row(case.id, *sizes, *counts, "faulty" if case.fault else ", ".join(case.remarks))
    say(table)
    bad = [f"case {case.id}: {case.fault}" for case in report.cases if case.fault]
    say("\n".join([f"{len(report.cases)} cases, {len(bad)} with a fault", *bad, *report.faults]))
