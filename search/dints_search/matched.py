"""Random feasible networks of a given cost, to compare a searched one with: uniform, but for the cost.

Plain rejection would wait for ever where the cost is a rare one. So networks are drawn with a probability proportional
to exp(-theta * cost), theta chosen for the mean to be the target, and one of cost c is kept with the probability that
makes up for it, exp(theta * (c - c_max)) for a positive theta. What is kept is uniform, exactly.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from dints_search.cost import CostTable
from dints_search.genotype import Genotype
from dints_search.space import NUM_OPERATIONS, SearchSpace, all_patterns, build_genotype

Floats = NDArray[np.float64]

MOST_DRAWS: Final = 3_000
"""Draws after which a cost counts as one that no network has."""

STEEPEST: Final = 1_000.0
"""Greatest |theta| times the target: beyond it only the cheapest or the dearest network is left."""


@dataclass(frozen=True)
class Matched:
    """A random network of about the wanted cost, what it costs, and how many draws it took to find it."""

    genotype: Genotype
    cost: float
    draws: int


def sample_within(
    space: SearchSpace, rng: random.Random, cost: CostTable, target: float, *, tolerance: float = 0.05
) -> Matched:
    """Draw a feasible network whose cost is within a share of the target.

    Among those networks every topology is as likely as it would be if topologies were drawn uniformly, and operations
    uniformly for each active edge, until the cost fits.

    Args:
        space: L and D.
        rng: of the draws.
        cost: of the pieces, in the unit of `target`.
        target: more than 0.
        tolerance: share of the target by which the cost may differ.

    Raises:
        ValueError: the target is not positive, or no network of that cost was found.
    """
    return next(samples_within(space, rng, cost, target, tolerance=tolerance))


def samples_within(
    space: SearchSpace, rng: random.Random, cost: CostTable, target: float, *, tolerance: float = 0.05
) -> Iterator[Matched]:
    """Yield draws of `sample_within` without end, each independent of the others."""
    if not target > 0 or not tolerance > 0:
        raise ValueError(f"expected a target and a tolerance of more than 0, found {target} and {tolerance}")
    tilted = _Tilted(space, cost, _theta(space, cost, target))
    nearest = target * (1 + math.copysign(tolerance, tilted.theta))
    draws = 0
    while draws < MOST_DRAWS:
        draws += 1
        genotype = tilted.draw(rng)
        found = cost.of(genotype)
        within = abs(found - target) <= tolerance * target
        if within and rng.random() < math.exp(tilted.theta * (found - nearest)):
            yield Matched(genotype, found, draws)
            draws = 0
    raise ValueError(f"expected networks within {tolerance:.0%} of {target:.6g}, found none in {MOST_DRAWS} draws")


@dataclass(frozen=True, eq=False)
class _Tilted:
    """The networks of a space, each as likely as exp(-theta * cost) makes it."""

    space: SearchSpace
    cost: CostTable
    theta: float

    @cached_property
    def log_operations(self) -> Floats:
        """Return (E, N): the weight of an edge with an operation, as a logarithm."""
        return -self.theta * self.cost.cells - math.log(NUM_OPERATIONS)

    @cached_property
    def log_patterns(self) -> Floats:
        """Return (M,): the weight of a pattern with any operations."""
        weights: Floats = all_patterns(self.space).active @ logsumexp(self.log_operations, axis=1)
        return weights

    @cached_property
    def completions(self) -> list[Floats]:
        """Return for every row of nodes the weight (2^D - 1,) of what follows each set, the input stems left aside."""
        table, sets = all_patterns(self.space), self.space.node_sets
        rows = [np.array([-self.theta * self.cost.leaving(tuple(int(n) for n in nodes)) for nodes in sets])]
        for _ in range(self.space.num_blocks):
            after = self.log_patterns + rows[-1][table.out_set]
            rows.append(np.array([logsumexp(after[table.in_set == number]) for number in range(len(sets))]))
        return rows[::-1]

    @property
    def first(self) -> Floats:
        """Return (2^D - 1,): the weight of all networks that begin with a set."""
        entering = [self.cost.entering(tuple(int(n) for n in nodes)) for nodes in self.space.node_sets]
        weights: Floats = self.completions[0] - self.theta * np.array(entering)
        return weights

    def draw(self, rng: random.Random) -> Genotype:
        """Draw a network."""
        table = all_patterns(self.space)
        nodes = _pick(self.first, rng)
        active = []
        for after in self.completions[1:]:
            leaving = np.flatnonzero(table.in_set == nodes)
            pattern = leaving[_pick(self.log_patterns[leaving] + after[table.out_set[leaving]], rng)]
            nodes = int(table.out_set[pattern])
            active.append(table.active[pattern])
        operations = np.array([[_pick(row, rng) for row in self.log_operations] for _ in active])
        return build_genotype(np.stack(active), operations, source="drawn uniformly among networks of one cost")


def _theta(space: SearchSpace, cost: CostTable, target: float) -> float:
    """Return the theta whose mean cost is the target: where log Z + theta * target, a convex function, is least."""

    def height(scaled: float) -> float:
        theta = scaled / target
        return float(logsumexp(_Tilted(space, cost, theta).first)) + scaled

    return float(minimize_scalar(height, bounds=(-STEEPEST, STEEPEST), method="bounded").x) / target


def _pick(log_weights: Floats, rng: random.Random) -> int:
    """Draw an index in proportion to weights given as logarithms."""
    sums = np.cumsum(np.exp(log_weights - log_weights.max()))
    return int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))
