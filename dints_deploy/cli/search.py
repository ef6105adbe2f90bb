"""`dints-deploy search`: find a network for a task, in the space of all DiNTS networks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from dints_deploy.catalog.dataset import read_dataset
from dints_deploy.cli.console import Bar, JsonOption, failing, progress, resumable, say, say_json, say_note
from dints_deploy.cli.extra import needs_search_extra
from dints_deploy.cli.search_profile import profile_command
from dints_deploy.errors import DatasetError, UsageError

if TYPE_CHECKING:
    from dints_search.choice import Choice, Chosen
    from dints_search.recipe import Recipe

search_app = typer.Typer(invoke_without_command=True, subcommand_metavar="[COMMAND]")
search_app.command("profile")(profile_command)


@search_app.callback()
def search_command(
    context: typer.Context,
    task: Annotated[
        str | None, typer.Option(help="Number or name of a task with a recipe, or a recipe's path.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The task's folder in MSD layout.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to create.")] = None,
    fold: Annotated[int, typer.Option(help="Search on the training part of this fold, 0..4.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, split, order and augmentation.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a search that was interrupted.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda; several processes: torchrun.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Share of the whole space's memory to aim at, in (0, 1].")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Iterations, instead of the recipe's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Patches of an iteration in each process.")] = None,
    window: Annotated[str | None, typer.Option(metavar="I,J,K", help="Voxels of a patch, multiples of 2^D.")] = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="L, blocks of the space.")] = None,
    depths: Annotated[int | None, typer.Option(min=2, max=5, help="D, levels of the space.")] = None,
    width: Annotated[float | None, typer.Option(help="Channel multiplier of the search network.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16, or on a GPU fp16.")] = None,
    memory: Annotated[str | None, typer.Option(help="Form of the memory loss: measured or reference.")] = None,
    unrolled: Annotated[bool, typer.Option("--unrolled", help="DARTS's second-order step, in fp32.")] = False,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Less memory, more time.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile; on a CPU minutes a block.")] = False,
    decode: Annotated[str, typer.Option(help="dints, block, darts or single-path.")] = "dints",
    max_gmac: Annotated[float | None, typer.Option(help="Budget, retrained: 10^9 multiply-adds of a window.")] = None,
    max_memory: Annotated[float | None, typer.Option(help="Budget, retrained: MiB that training keeps, fp32.")] = None,
    max_latency: Annotated[float | None, typer.Option(help="Budget, retrained: ms on this CPU, torch, fp32.")] = None,
    joint: Annotated[bool, typer.Option("--joint", help="Let the budget choose operations too.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of the recipe, such as search.architecture_rate=0.01.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Keep prepared cases in this folder, not in memory.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Search a network on one fold's training part, decode it, and draw it; resumable at any time.

    Example: dints-deploy search --task 4 --data Task04_Hippocampus --fold 0 --out runs/search --sigma 0.5
    """
    if context.invoked_subcommand is not None:
        return
    with failing(as_json):
        if task is None or data is None or out is None:
            _incomplete()
        with needs_search_extra("search"):
            import torch

            from dints_search.choice import Choice
            from dints_search.recipe import find_recipe, override
            from dints_search.search_run import with_search
        if threads is not None:
            torch.set_num_threads(threads)
        recipe = with_search(
            override(find_recipe(task), settings or []),
            **{"sigma": sigma, "steps": steps, "batch": batch, "window": _sizes(window), "num_blocks": blocks},
            **{"num_depths": depths, "channel_multiplier": width, "precision": precision, "memory": memory},
            **{"unrolled": unrolled or None, "checkpointing": checkpointing or None, "compiled": compiled or None},
        )
        choice = Choice(decode, max_gmac, max_memory, max_latency, joint)
        options = {"fold": fold, "seed": seed, "resume": resume, "device": device, "cache": cache}
        _tell(out, _search(recipe, choice, data, out, **options), as_json)


def _search(recipe: Recipe, choice: Choice, data: Path, out: Path, **options: Any) -> Chosen | None:
    """Search and conclude; None in a process that does not write."""
    from dints_search.budget import least_share
    from dints_search.choice import check_choice
    from dints_search.conclude import conclude, report
    from dints_search.fits import check_search_fits
    from dints_search.search import cost_table, search, search_setting
    from dints_search.world import leads

    def show(bar: Bar, done: int, figures: dict[str, float | str]) -> None:
        wanted = ("loss", "L_seg", "L_alpha", "L_eta", "L_tp", "L_m", "usage")
        names = {"loss": "L_w", "usage": "Me/Ma"}
        note = " ".join(f"{names.get(name, name)} {figures[name]:.3g}" for name in wanted if name in figures)
        bar(done, recipe.search.steps, note)

    check_search_fits(recipe)
    check_choice(choice, recipe)
    if leads() and recipe.search.memory == "measured":
        least = least_share(search_setting(recipe).space, cost_table(recipe))
        if recipe.search.sigma < least:
            say_note(f"note: no network takes less than {least:.3f} of the space's memory: sigma is below that")
    with resumable(), progress("search") as bar:
        found = search(recipe, read_dataset(data), out, report=partial(show, bar), **options)
    if not found.writes:
        return None
    try:
        chosen = conclude(out, found.network.architecture, recipe, choice)
    except DatasetError as refusal:
        if refusal.code != "genotype-invalid":
            raise
        if not (out / "genotype.json").exists():  # else the report is of that one
            with progress("measure the gap") as measured:
                report(out, found, recipe, None, reason=refusal.message, progress=measured)
        again = f"{refusal.message}. The search is kept in {out}: repeat the command with --resume"
        raise DatasetError(refusal.code, again) from refusal
    with progress("measure the gap") as measured:
        report(out, found, recipe, chosen, progress=measured)
    return chosen


def _incomplete() -> NoReturn:
    raise UsageError("usage", "expected --task, --data and --out: see dints-deploy search --help")


def _sizes(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(n) for n in text.split(","))
    except ValueError as fault:
        raise UsageError("usage", f"expected --window I,J,K, found {text!r}") from fault


def _tell(out: Path, chosen: Chosen | None, as_json: bool) -> None:
    if chosen is None:
        return
    edges = sum(sum(row) for row in chosen.genotype.edge_active)
    budget = f"{chosen.predicted:.4g} of {chosen.limit:g} {chosen.budget}" if chosen.budget else ""
    if as_json:
        genotype = {"genotype": str(out / "genotype.json"), "digest": chosen.genotype.digest(), "edges": edges}
        say_json({"run": str(out), **genotype, "predicted": chosen.predicted or None, "budget": chosen.budget or None})
    else:
        say(f"found: {out / 'genotype.json'}, {edges} edges" + (f", predicted to take {budget}" if budget else ""))
