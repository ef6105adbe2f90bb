"""The most likely feasible network under a budget: a dynamic programme over (levels entered so far, cost so far).

Costs lie on a grid of `resolution` steps and are rounded up, once for the stems at each end and once for every block,
so a network found keeps the budget. No feasible network of at most (1 - (L + 2) / resolution) of the budget is more
likely; with `joint`, where operations are rounded too, the share is 1 - (2 L + 2) / resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dints_search.cost import CostTable
from dints_search.decode import (
    Floats,
    Infeasible,
    Ints,
    best_path,
    likeliest_operations,
    operation_losses,
    pattern_scores,
)
from dints_search.genotype import Genotype
from dints_search.space import ArchitectureParameters, Patterns, SearchSpace, all_patterns, build_genotype

RESOLUTION: Final = 8192
"""Steps of the grid from nothing to the budget."""

FINENESS: Final = 16
"""Steps within one, for the costs of single operations: at most 13 edges are rounded, so less than one step is lost."""

SLACK: Final = 1e-9
"""Of a step, what is forgiven before rounding up, so that whole numbers stay what they are."""


@dataclass(frozen=True, eq=False)
class Choices:
    """Ways through one block, K of them.

    Attributes:
        pattern: (K,), the edges. operations: (K, E), what they carry.
        steps: (K,), cost on the grid. score: (K,), log P.
    """

    pattern: Ints
    operations: Ints
    steps: Ints
    score: Floats

    def take(self, rows: Ints) -> Choices:
        """Return some of the choices."""
        return Choices(self.pattern[rows], self.operations[rows], self.steps[rows], self.score[rows])


def decode_within(
    parameters: ArchitectureParameters,
    cost: CostTable,
    limit: float,
    *,
    joint: bool = False,
    resolution: int = RESOLUTION,
) -> Genotype | Infeasible:
    """Return the most likely feasible network that costs at most `limit`.

    Args:
        parameters: alpha_c and alpha_a.
        cost: of the pieces, in the unit of `limit`.
        limit: the budget, more than 0.
        joint: choose the operations too; without, each edge has its likeliest. The likelihood is then that of edges and
            operations together, so without a budget in force both give the same network.
        resolution: steps of the cost grid.
    """
    if not limit > 0:
        raise ValueError(f"expected a budget of more than 0, found {limit}")
    space, unit = parameters.space, limit / resolution
    table = all_patterns(space)
    first, last = _ends(space, cost)
    reached = np.full((len(first), resolution + 1), -np.inf)  # log P of the best way to (levels, steps)
    for nodes, steps in enumerate(_round_up(first / unit)):
        reached[nodes, steps : steps + 1] = 0.0
    ways = []
    for block in range(space.num_blocks):
        choices = _joint_choices if joint else _plain_choices
        kept = _pareto(table, choices(parameters, cost.cells / unit, block, resolution), resolution)
        reached, origin = _advance(table, reached, kept)
        ways.append((kept, origin))
    for nodes, steps in enumerate(_round_up(last / unit)):
        reached[nodes, max(0, resolution + 1 - steps) :] = -np.inf
    if not np.isfinite(reached).any():
        return _too_small(parameters, cost, limit, joint=joint, resolution=resolution)
    return _trace_back(parameters, ways, reached)


def _ends(space: SearchSpace, cost: CostTable) -> tuple[Floats, Floats]:
    """Return what the stems of every set of levels cost, at the input and at the output (with the head)."""
    sets = [tuple(int(on) for on in row) for row in space.node_sets]
    return np.array([cost.entering(row) for row in sets]), np.array([cost.leaving(row) for row in sets])


def _round_up(steps: Floats) -> Ints:
    rounded: Ints = np.ceil(steps - SLACK).astype(np.int64)
    return rounded


def _plain_choices(parameters: ArchitectureParameters, cells: Floats, block: int, resolution: int) -> Choices:
    """Return a block's patterns, each with the likeliest operations; cells (E, N) are in steps."""
    active = all_patterns(parameters.space).active
    operations = likeliest_operations(parameters)[block]  # (E,)
    steps = _round_up(active @ cells[np.arange(len(cells)), operations])
    fits = np.flatnonzero(steps <= resolution)
    everywhere = np.broadcast_to(operations, active.shape)
    return Choices(np.arange(len(active)), everywhere, steps, pattern_scores(parameters)[block]).take(fits)


def _joint_choices(parameters: ArchitectureParameters, cells: Floats, block: int, resolution: int) -> Choices:
    """Return a block's patterns with every selection of operations that no cheaper and likelier one beats."""
    space, likeliest = parameters.space, likeliest_operations(parameters)[block]
    scores, losses = pattern_scores(parameters)[block], operation_losses(parameters)[block]
    fine = _round_up(cells * FINENESS)  # (E, N)
    found = []
    fronts = {0: Choices(np.zeros(1, np.int64), likeliest[None], np.zeros(1, np.int64), np.zeros(1))}
    for e in range(space.num_edges):  # a front for every subset of the edges so far, edge 0 the most significant bit
        grown = {}
        for subset, front in fronts.items():
            grown[2 * subset] = front
            grown[2 * subset + 1] = _with_edge(front, e, fine[e], losses[e], resolution * FINENESS)
        fronts = grown
    for number, front in fronts.items():
        if number:
            pattern = np.full(len(front.steps), number - 1)
            steps = -(-front.steps // FINENESS)
            found.append(Choices(pattern, front.operations, steps, front.score + scores[number - 1]))
    columns = (np.concatenate([getattr(c, name) for c in found]) for name in Choices.__dataclass_fields__)
    return Choices(*columns)


def _with_edge(front: Choices, edge: int, steps: Ints, losses: Floats, limit: int) -> Choices:
    """Return the undominated ways to add an edge, with any of its operations, to each way of a front."""
    total = (front.steps[:, None] + steps).ravel()
    score = (front.score[:, None] + losses).ravel()
    rows = _undominated(total, score)
    rows = rows[total[rows] <= limit]
    operations = front.operations[rows // len(steps)].copy()
    operations[:, edge] = rows % len(steps)
    return Choices(front.pattern[rows // len(steps)], operations, total[rows], score[rows])


def _undominated(steps: Ints, score: Floats) -> Ints:
    """Return the rows that no other row beats in both, by rising steps."""
    order = np.lexsort((-score, steps))
    ranked = score[order]
    before = np.maximum.accumulate(np.concatenate([[-np.inf], ranked[:-1]]))
    rows: Ints = order[np.flatnonzero(ranked > before)]
    return rows


def _pareto(table: Patterns, choices: Choices, resolution: int) -> Choices:
    """Return the choices that no other one with the same levels at both ends beats."""
    ends = table.in_set[choices.pattern] * (table.out_set.max() + 1) + table.out_set[choices.pattern]
    kept = [np.zeros(0, dtype=np.int64)]
    order = np.argsort(ends, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(ends[order])) + 1):
        kept.append(group[_undominated(choices.steps[group], choices.score[group])])
    rows = np.concatenate(kept)
    return choices.take(rows[choices.steps[rows] <= resolution])


def _advance(table: Patterns, reached: Floats, choices: Choices) -> tuple[Floats, NDArray[np.int32]]:
    """Return log P of the best way to each (levels, steps) after a block, and the choice it takes; -1 for none."""
    after, origin = np.full_like(reached, -np.inf), np.full(reached.shape, -1, dtype=np.int32)
    width = reached.shape[1]
    possible = reached.max(axis=1) > -np.inf
    for k, (pattern, steps, score) in enumerate(zip(choices.pattern, choices.steps, choices.score, strict=True)):
        nodes, entered = table.in_set[pattern], table.out_set[pattern]
        if possible[nodes]:
            candidate = reached[nodes, : width - steps] + score
            target = after[entered, steps:]
            better = candidate > target
            np.copyto(target, candidate, where=better)
            np.copyto(origin[entered, steps:], k, where=better)
    return after, origin


def _trace_back(
    parameters: ArchitectureParameters, ways: list[tuple[Choices, NDArray[np.int32]]], reached: Floats
) -> Genotype:
    """Return the genotype of the best way to the end."""
    table = all_patterns(parameters.space)
    nodes, steps = (int(n) for n in np.unravel_index(reached.argmax(), reached.shape))
    rows = []
    for choices, origin in reversed(ways):
        k = origin[nodes, steps]
        rows.append((table.active[choices.pattern[k]], choices.operations[k]))
        nodes, steps = int(table.in_set[choices.pattern[k]]), int(steps - choices.steps[k])
    active, operations = (np.stack(column) for column in zip(*reversed(rows), strict=True))
    return build_genotype(active, operations, source="decoded: most likely feasible network under a budget")


def least_cost(space: SearchSpace, cost: CostTable, operations: Ints | None = None) -> float:
    """Return the cost of the cheapest feasible network, with these operations (L, E) or with the cheapest ones."""
    table = all_patterns(space)
    if operations is None:
        operations = np.broadcast_to(cost.cells.argmin(axis=1), (space.num_blocks, space.num_edges))
    cells = cost.cells[np.arange(space.num_edges), operations]  # (L, E)
    first, last = _ends(space, cost)
    chosen = best_path(space, -(cells @ table.active.T), first=-first, last=-last)
    return cost.of(build_genotype(table.active[chosen], operations))


def least_share(space: SearchSpace, cost: CostTable) -> float:
    """Return what share of the cost of the whole space the cheapest feasible network takes: sigma's floor."""
    return least_cost(space, cost) / cost.whole(space.num_blocks)


def _too_small(
    parameters: ArchitectureParameters, cost: CostTable, limit: float, *, joint: bool, resolution: int
) -> Infeasible:
    """Say what the cheapest feasible network costs."""
    space = parameters.space
    least = least_cost(space, cost, None if joint else likeliest_operations(parameters))
    if limit >= least:  # the grid rounds up: say what surely suffices
        least /= 1 - ((2 if joint else 1) * space.num_blocks + 2) / resolution
    return Infeasible(f"expected a budget of at least {least:.6g}, the cheapest feasible network, found {limit:.6g}")
