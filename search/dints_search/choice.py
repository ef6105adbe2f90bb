"""From a finished search to the genotype that a person asked for: a decoder, or a budget and what it limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dints_deploy.errors import DatasetError, UsageError
from dints_deploy.files import write_text
from dints_search.budget import decode_within
from dints_search.cost import CostTable, Setting, latency_table, memory_table, work_table
from dints_search.decode import DECODERS, Infeasible
from dints_search.genotype import Genotype
from dints_search.recipe import Recipe
from dints_search.space import ArchitectureParameters, SearchSpace

BYTES_PER_MIB: Final = 2**20


@dataclass(frozen=True)
class Choice:
    """How to choose a network among all.

    Attributes:
        decoder: one of `DECODERS`.
        max_gmac, max_memory, max_latency: a budget, at most one of them: multiply-adds of one window in 10^9, MiB of
            activations that a training step of one window keeps, milliseconds of one window on this machine. They are
            counted for the network that is retrained: the recipe's window and its channel multiplier.
        joint: let the budget change operations too, not edges alone.
    """

    decoder: str = "dints"
    max_gmac: float | None = None
    max_memory: float | None = None
    max_latency: float | None = None
    joint: bool = False


@dataclass(frozen=True)
class Chosen:
    """A genotype and, where there was a budget, what it is predicted to cost, in the budget's unit."""

    genotype: Genotype
    budget: str = ""
    limit: float = 0.0
    predicted: float = 0.0


@dataclass(frozen=True)
class _Budget:
    unit: str
    per_unit: float
    table: Callable[[Setting], CostTable]


BUDGETS: Final[dict[str, _Budget]] = {
    "max_gmac": _Budget("GMAC", 1.0, work_table),
    "max_memory": _Budget("MiB", BYTES_PER_MIB, memory_table),
    "max_latency": _Budget("ms", 1e-3, latency_table),
}
"""What each budget limits."""


def check_choice(choice: Choice) -> None:
    """Refuse a wish that contradicts itself, before the search begins.

    Raises:
        UsageError: `usage`.
    """
    if choice.decoder not in DECODERS:
        raise UsageError("usage", f"expected a decoder of {', '.join(DECODERS)}, found {choice.decoder!r}")
    budgets = _budgets(choice)
    if len(budgets) > 1:
        raise UsageError("usage", "expected at most one of --max-gmac, --max-memory and --max-latency, found several")
    if any(limit <= 0 for limit in budgets.values()):
        raise UsageError("usage", f"expected a budget of more than 0, found {min(budgets.values())}")
    if budgets and choice.decoder != "dints":
        raise UsageError("usage", f"expected the decoder dints with a budget, found {choice.decoder!r}")
    if choice.joint and not budgets:
        raise UsageError("usage", "expected --joint with a budget: without one, operations are the likeliest anyway")


def choose(parameters: ArchitectureParameters, choice: Choice, recipe: Recipe) -> Chosen:
    """Return the genotype of a search that a choice leads to.

    Raises:
        DatasetError: `genotype-invalid` when the decoder leads to no network, or none keeps the budget.
    """
    budgets = _budgets(choice)
    if not budgets:
        return Chosen(_network(DECODERS[choice.decoder](parameters), recipe))
    name, limit = next(iter(budgets.items()))
    budget = BUDGETS[name]
    table = budget.table(deployed_setting(recipe, parameters.space)).scaled(1 / budget.per_unit)
    genotype = _network(decode_within(parameters, table, limit, joint=choice.joint), recipe, budget.unit)
    return Chosen(genotype, budget.unit, limit, table.of(genotype))


def deployed_setting(recipe: Recipe, space: SearchSpace) -> Setting:
    """Return what a network costs when it is retrained and deployed: the recipe's window and channels."""
    return Setting(
        space,
        recipe.window,
        in_channels=len(recipe.channels),
        num_classes=len(recipe.labels) + 1,
        channel_multiplier=recipe.retraining.channel_multiplier,
        up=recipe.search.up,
        direct_skip=recipe.search.direct_skip,
    )


def write_choice(folder: Path, chosen: Chosen) -> Path:
    """Write the genotype of a run and return its path."""
    path = folder / "genotype.json"
    write_text(path, chosen.genotype.to_json())
    return path


def _budgets(choice: Choice) -> dict[str, float]:
    wanted = {name: getattr(choice, name) for name in BUDGETS}
    return {name: limit for name, limit in wanted.items() if limit is not None}


def _network(found: Genotype | Infeasible, recipe: Recipe, unit: str = "") -> Genotype:
    if isinstance(found, Infeasible):
        raise DatasetError(
            "genotype-invalid",
            f"{found.reason} {unit}: give a greater budget" if unit else f"{found.reason}: choose another --decode",
        )
    return found.model_copy(update={"up": recipe.search.up, "direct_skip": recipe.search.direct_skip})
