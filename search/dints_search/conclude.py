"""What a search leaves behind for a person: the genotype and its picture, the curves, and the report."""

from __future__ import annotations

from pathlib import Path

from dints_search.choice import Choice, Chosen, choose, write_choice
from dints_search.draw import draw_architecture, draw_relaxation
from dints_search.recipe import Recipe
from dints_search.space import ArchitectureParameters


def conclude(folder: Path, parameters: ArchitectureParameters, recipe: Recipe, choice: Choice) -> Chosen:
    """Write the chosen genotype into a search's folder, with pictures of it and of what the search holds likely.

    Raises:
        DatasetError: `genotype-invalid` when the choice leads to no network.
        OutputError: a file cannot be written.
    """
    chosen = choose(parameters, choice, recipe)
    write_choice(folder, chosen)
    draw_architecture(chosen.genotype, folder / "architecture", title=chosen.genotype.source)
    draw_relaxation(
        parameters, folder / "relaxation", title=f"likely edges and operations, sigma {recipe.search.sigma:g}"
    )
    return chosen
