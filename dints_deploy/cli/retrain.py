"""`dints-deploy retrain`: train a genotype's network on an MSD task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dints_deploy.catalog.dataset import Dataset, read_dataset
from dints_deploy.cli.console import JsonOption, failing, progress, resumable, say, say_json, say_note
from dints_deploy.cli.extra import needs_search_extra
from dints_deploy.errors import UsageError

if TYPE_CHECKING:
    from dints_search.genotype import Genotype
    from dints_search.recipe import Recipe


def retrain_command(
    task: Annotated[str, typer.Option(help="Number or name of a task with a recipe, or a recipe's path.")],
    data: Annotated[Path, typer.Option(help="The task's folder in MSD layout.")],
    out: Annotated[Path, typer.Option(help="Run folder to create.")],
    genotype: Annotated[Path | None, typer.Option(help="genotype.json of the network.")] = None,
    search: Annotated[
        Path | None,
        typer.Option(
            help="Run folder of a search instead: its network, its held-out cases measured, its report renewed."
        ),
    ] = None,
    fold: Annotated[int, typer.Option(help="Train on the training part of this fold, 0..4.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and augmentation.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was interrupted.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda:N; several processes: torchrun.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps, instead of the recipe's.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of the recipe, such as retraining.batch=4.")
    ] = None,
    origin: Annotated[
        Path | None, typer.Option("--from", help="Begin with the weights of this finished run, as for fine-tuning.")
    ] = None,
    teachers: Annotated[
        list[Path] | None,
        typer.Option("--teacher", help="A finished run to learn from besides the labels; repeat for an ensemble."),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Keep prepared cases in this folder, not in memory.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train the network of a genotype on one fold's training part; resumable at any time.

    Example: dints-deploy retrain --genotype genotype.json --task 4 --data Task04_Hippocampus --fold 0 --out runs/a
    """
    with failing(as_json):
        with needs_search_extra("retrain"):
            import torch

            from dints_search.recipe import find_recipe, override, with_steps
            from dints_search.world import leads
        if threads is not None:
            torch.set_num_threads(threads)
        if (genotype is None) == (search is None):
            raise UsageError(
                "usage", "expected either --genotype FILE or --search RUN: see dints-deploy retrain --help"
            )
        recipe = with_steps(override(find_recipe(task), settings or []), steps)
        options = {"fold": fold, "seed": seed, "resume": resume, "device": device, "cache": cache}
        options |= {"origin": origin, "teachers": teachers or ()}
        weights = _retrain(recipe, genotype, search, read_dataset(data), out, **options)
        if leads():
            say_json({"run": str(out), "weights": str(weights)}) if as_json else say(f"trained: {weights}")


def note_search(genotype: Genotype, folds: Sequence[int]) -> None:
    """Say where scores will flatter a network, as it was searched on cases that they are measured on."""
    searched = genotype.searched_fold
    if searched is not None and (others := [str(fold) for fold in folds if fold != searched]):
        say_note(
            f"note: the network was searched on the training part of fold {searched}, which holds the cases that fold "
            f"{', '.join(others)} measures: those scores flatter it"
        )


def _retrain(
    recipe: Recipe, genotype: Path | None, search: Path | None, dataset: Dataset, out: Path, **options: Any
) -> Path:
    """Train a genotype's network, or a search's without its held-out cases, which are measured at the end."""
    from dints_search.conclude import conclude_retraining
    from dints_search.genotype import read_genotype
    from dints_search.retrain import retrain
    from dints_search.search_run import read_search_config
    from dints_search.world import leads

    network = read_genotype(genotype or Path(search or "") / "genotype.json")
    without = read_search_config(search).held_out if search else {}
    if leads():
        note_search(network, [options["fold"]])
    if not set(without) <= {case.id for case in dataset.cases}:
        raise UsageError(
            "usage", f"expected the dataset of the search in {search}, found another: name {search}/genotype.json with "
            "--genotype to retrain its network on this one"
        )  # fmt: skip
    with resumable(), progress("retrain") as bar:
        weights = retrain(
            recipe,
            network,
            dataset,
            out,
            without=without,
            report=lambda step, loss, rate: bar(step, recipe.retraining.steps),
            **options,
        )
    if search and leads():
        conclude_retraining(search, out, dataset, device=options["device"])
    return weights
