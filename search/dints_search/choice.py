"""From a finished search to the genotype that a person asked for: a decoder, or a budget and what it limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dints_deploy.errors import DatasetError, UsageError
from dints_deploy.files import write_text
from dints_search.budget import decode_within, least_cost
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
    counted: bool = True
    """And not measured: known at once, and the same every time."""


BUDGETS: Final[dict[str, _Budget]] = {
    "max_gmac": _Budget("GMAC", 1.0, work_table),
    "max_memory": _Budget("MiB", BYTES_PER_MIB, memory_table),
    "max_latency": _Budget("ms", 1e-3, latency_table, counted=False),
}
"""What each budget limits."""


def check_choice(choice: Choice, recipe: Recipe) -> None:
    """Refuse a wish that contradicts itself, or that no network of the space can fulfil, before the search begins.

    Raises:
        UsageError: `usage`. DatasetError: `genotype-invalid` when even the cheapest network does not keep the budget.
    """
    if choice.decoder not in DECODERS:
        raise UsageError("usage", f"expected a decoder of {', '.join(DECODERS)}, found {choice.decoder!r}")
    budgets = _budgets(choice)
    if len(budgets) > 1:
        raise UsageError("usage", "expected at most one of --max-gmac, --max-memory and --max-latency, found several")
    if wrong := [limit for limit in budgets.values() if not 0 < limit < math.inf]:
        raise UsageError("usage", f"expected a budget of more than 0, found {wrong[0]}")
    if budgets and choice.decoder != "dints":
        raise UsageError("usage", f"expected the decoder dints with a budget, found {choice.decoder!r}")
    if choice.joint and not budgets:
        raise UsageError("usage", "expected --joint with a budget: without one, operations are the likeliest anyway")
    for name, limit in budgets.items():
        budget, space = BUDGETS[name], SearchSpace(recipe.search.num_blocks, recipe.search.num_depths)
        if budget.counted:
            least = least_cost(space, _table(budget, recipe, space))
            if limit < least:
                raise _refusal(f"expected a budget of at least {least:.6g}, found {limit:.6g}", budget.unit)


def choose(parameters: ArchitectureParameters, choice: Choice, recipe: Recipe) -> Chosen:
    """Return the genotype of a search that a choice leads to.

    Raises:
        DatasetError: `genotype-invalid` when the decoder leads to none, or none keeps the budget.
    """
    budgets = _budgets(choice)
    if not budgets:
        return Chosen(_network(DECODERS[choice.decoder](parameters), recipe))
    name, limit = next(iter(budgets.items()))
    budget = BUDGETS[name]
    table = _table(budget, recipe, parameters.space)
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


def _table(budget: _Budget, recipe: Recipe, space: SearchSpace) -> CostTable:
    """Return what the pieces of a network cost in a budget's unit."""
    return budget.table(deployed_setting(recipe, space)).scaled(1 / budget.per_unit)


def _refusal(reason: str, unit: str) -> DatasetError:
    advice = f"{reason} {unit}: give a greater budget" if unit else f"{reason}: choose another --decode"
    return DatasetError("genotype-invalid", advice)


def _network(found: Genotype | Infeasible, recipe: Recipe, unit: str = "") -> Genotype:
    if isinstance(found, Infeasible):
        raise _refusal(found.reason, unit)
    return found.model_copy(update={"up": recipe.search.up, "direct_skip": recipe.search.direct_skip})
