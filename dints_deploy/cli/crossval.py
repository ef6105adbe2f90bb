"""`dints-deploy crossval`: train and measure the five folds of a task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dints_deploy.catalog.dataset import FOLDS, read_dataset
from dints_deploy.cli.console import JsonOption, failing, progress, say, say_json
from dints_deploy.cli.extra import needs_search_extra
from dints_deploy.cli.retrain import note_search

if TYPE_CHECKING:
    from dints_search.crossval import CrossValidation
    from dints_search.recipe import Recipe


def crossval_command(
    genotype: Annotated[Path, typer.Option(help="genotype.json of the network.")],
    task: Annotated[str, typer.Option(help="Number or name of a task with a recipe, or a recipe's path.")],
    data: Annotated[Path, typer.Option(help="The task's folder in MSD layout.")],
    out: Annotated[Path, typer.Option(help="Folder for the folds' runs; folds that are done are kept.")],
    fold: Annotated[list[int] | None, typer.Option(help="Train only these folds; all five by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and augmentation.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps per fold, instead of the recipe's.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of the recipe, such as retraining.batch=4.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Keep prepared cases in this folder, not in memory.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train the network of a genotype on each of the five folds and measure it on the cases that it did not see.

    Run the same command again to continue where it stopped.

    Example: dints-deploy crossval --genotype genotype.json --task 4 --data Task04_Hippocampus --out runs/cv
    """
    with failing(as_json):
        with needs_search_extra("crossval"):
            import torch

            from dints_search.crossval import crossval, measured_folds
            from dints_search.genotype import read_genotype
            from dints_search.recipe import find_recipe, override, with_steps
        if threads is not None:
            torch.set_num_threads(threads)
        recipe = with_steps(override(find_recipe(task), settings or []), steps)
        folds, network = sorted(set(fold or range(FOLDS))), read_genotype(genotype)
        note_search(network, sorted({*folds, *measured_folds(out)}))
        with progress("crossval") as bar:
            result = crossval(
                recipe,
                network,
                read_dataset(data),
                out,
                folds=folds,
                seed=seed,
                device=device,
                cache=cache,
                report=lambda number, done, total: bar(folds.index(number) * total + done, len(folds) * total),
            )
        say_json({"out": str(out), **result.as_dict()}) if as_json else _show(result, recipe)


def _show(result: CrossValidation, recipe: Recipe) -> None:
    from rich.table import Table

    folds = ", ".join(f"fold {fold} {_number(dice)}" for fold, dice in result.folds.items())
    table = Table("structure", "Dice", "spread over folds", "over all cases", "NSD", title=folds)
    for value, name in recipe.label_names.items():
        dice, nsd = result.dice[value], result.nsd[value]
        row = (dice.mean, dice.deviation, dice.over_cases, nsd.mean)
        table.add_row(name, *(_number(score) for score in row))
    mean = result.mean_dice
    table.add_row("mean", _number(mean.mean), _number(mean.deviation), _number(mean.over_cases), "")
    say(table)
    for scores in recipe.published:
        say(f"published on the test set, {scores.method}: Dice {', '.join(_number(dice) for dice in scores.dice)}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
