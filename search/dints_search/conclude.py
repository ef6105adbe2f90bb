"""What a search leaves behind for a person: the genotype and its picture, the curves, and the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from dints_deploy.catalog.dataset import Dataset
from dints_search.choice import Choice, Chosen, choose, write_choice
from dints_search.draw import draw_architecture, draw_relaxation
from dints_search.gap import (
    WITHIN,
    GapTable,
    Progress,
    all_decoded,
    keep_retrained,
    measure_gap,
    measure_retrained,
    read_gap,
    within_work,
    write_gap,
)
from dints_search.recipe import Recipe
from dints_search.report import actual_cost, renew_gap, write_report
from dints_search.search import Found
from dints_search.search_run import read_search_config
from dints_search.space import ArchitectureParameters

TIGHT: Final = 0.5
"""Share of the network's multiply-adds that a budget allows, so that the gap under a budget is measured too."""


def conclude(folder: Path, parameters: ArchitectureParameters, recipe: Recipe, choice: Choice) -> Chosen:
    """Write the chosen genotype into a search's folder, with pictures of it and of what the search holds likely.

    The genotype says which fold it was searched on: it has no unbiased score on the cases of that training part.

    Raises:
        DatasetError: `genotype-invalid` when the choice leads to none; what was chosen before stays.
        OutputError: a file cannot be written.
    """
    draw_relaxation(
        parameters, folder / "relaxation", title=f"likely edges and operations, sigma {recipe.search.sigma:g}"
    )
    config, chosen = read_search_config(folder), choose(parameters, choice, recipe)
    about = (
        f"searched on the training part of fold {config.fold} of {config.recipe.task}, sigma {recipe.search.sigma:g}"
    )
    chosen = replace(chosen, genotype=chosen.genotype.model_copy(update={"about": about, "searched_fold": config.fold}))
    write_choice(folder, chosen)
    draw_architecture(chosen.genotype, folder / "architecture", title=chosen.genotype.source)
    return chosen


def conclude_retraining(folder: Path, run: Path, dataset: Dataset, *, device: str = "cpu") -> GapTable:
    """Measure a finished run of a search's network on the cases that the search held out, and say so in its report.

    Raises:
        DatasetError: `cases-seen` when the run was trained on one of them; the search or the run is not finished.
    """
    gap = measure_retrained(read_gap(folder), run, dataset, device=device)
    write_gap(folder, gap)
    renew_gap(folder, gap)
    return gap


def report(
    folder: Path,
    found: Found,
    recipe: Recipe,
    chosen: Chosen | None,
    *,
    reason: str = "",
    progress: Progress = lambda done, total: None,
) -> GapTable:
    """Measure the discretisation gap of a search on its held-out cases, keep it, and write the report.

    Args:
        folder: of the search, concluded.
        found: the finished search.
        recipe: of the search.
        chosen: the network; None where the choice led to none.
        reason: why it led to none.
        progress: called after every network that is measured.

    Raises:
        DatasetError: `case-invalid`, naming the case.
        OutputError: a file cannot be written.
    """
    decoded = all_decoded(found.network, chosen)
    if chosen is not None:
        budget = TIGHT * actual_cost(chosen.genotype, recipe, "GMAC")
        decoded[f"{WITHIN} {budget:.3g} GMAC"] = within_work(found.network, recipe, budget)
    gap = measure_gap(found.network, decoded, found.parts.held_out, recipe, device=found.device, progress=progress)
    gap = keep_retrained(gap, folder)
    write_gap(folder, gap)
    write_report(folder, chosen, gap, reason=reason)
    return gap
