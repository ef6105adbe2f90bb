"""Random networks of one cost: all of that cost, and all that have it equally likely."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chisquare

from dints_search.cost import CostTable, Setting, work_table
from dints_search.genotype import OPERATIONS, Genotype
from dints_search.matched import sample_within, samples_within
from dints_search.space import SearchSpace, all_patterns, sample_genotype

Codes = tuple[tuple[int, ...], ...]

SPACE = SearchSpace(num_blocks=12, num_depths=4)
TINY = SearchSpace(num_blocks=2, num_depths=2)


@pytest.fixture(scope="module")
def work() -> CostTable:
    return work_table(Setting(SPACE, (48, 64, 48), in_channels=1, num_classes=3, channel_multiplier=0.25))


def edge_count(space: SearchSpace) -> CostTable:
    """Cost nothing but one for every edge and a half for a 3x3x3 convolution."""
    cells = np.ones((space.num_edges, len(OPERATIONS)))
    cells[:, 1] += 0.5
    idle = np.zeros(space.num_depths)
    return CostTable(cells, idle, idle, 0.0)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_rare_and_common_costs_are_met_within_the_tolerance(work: CostTable, share: float) -> None:
    target = share * work.whole(SPACE.num_blocks)
    found = [sample_within(SPACE, random.Random(seed), work, target) for seed in range(2)]
    for matched in found:
        assert matched.cost == work.of(matched.genotype)
        assert abs(matched.cost - target) <= 0.05 * target
        assert matched.draws < 1000
    assert len({matched.genotype.digest() for matched in found}) == 2


def code(genotype: Genotype) -> Codes:
    """Return the operation of every edge, -1 where it is idle."""
    return _codes(np.where(np.array(genotype.edge_active) == 1, np.array(genotype.edge_operation), -1))


def _codes(table: NDArray[np.integer]) -> Codes:
    return tuple(tuple(int(n) for n in row) for row in table)


def shape(codes: Codes) -> tuple[int, ...]:
    """Return the number of active edges of every block."""
    return tuple(sum(operation >= 0 for operation in row) for row in codes)


def test_networks_of_the_cost_are_drawn_as_plain_rejection_would_draw_them() -> None:
    """Every feasible topology counts alike, and each of its choices of operations alike."""
    cost, target, tolerance = edge_count(TINY), 4.0, 0.25
    table, weights = all_patterns(TINY), dict[Codes, float]()
    for first, second in itertools.product(range(len(table.active)), repeat=2):
        active = np.stack([table.active[first], table.active[second]])
        if table.out_set[first] != table.in_set[second] or active.sum() > (1 + tolerance) * target:
            continue
        for operations in itertools.product(range(5), repeat=int(active.sum())):
            if abs(active.sum() + 0.5 * operations.count(1) - target) <= tolerance * target:
                codes = np.full(active.shape, -1)
                codes[active == 1] = operations
                weights[_codes(codes)] = 5.0 ** -int(active.sum())
    expected: dict[tuple[int, ...], float] = {}
    for codes_, weight in weights.items():
        expected[shape(codes_)] = expected.get(shape(codes_), 0.0) + weight
    rng, seen, draws = random.Random(0), Counter[tuple[int, ...]](), 200
    for matched in itertools.islice(samples_within(TINY, rng, cost, target, tolerance=tolerance), draws):
        assert code(matched.genotype) in weights
        seen[shape(code(matched.genotype))] += 1
    shares = np.array(list(expected.values())) / sum(expected.values())
    assert chisquare([seen[key] for key in expected], shares * draws).pvalue > 0.001


def test_a_cost_that_no_network_has_is_refused(work: CostTable) -> None:
    with pytest.raises(ValueError, match="found none in"):
        sample_within(TINY, random.Random(0), edge_count(TINY), 100.0)
    with pytest.raises(ValueError, match="more than 0"):
        sample_within(SPACE, random.Random(0), work, 0.0)


def test_the_same_seed_draws_the_same_network(work: CostTable) -> None:
    target = work.of(sample_genotype(SPACE, random.Random(9)))
    first, again = (sample_within(SPACE, random.Random(1), work, target).genotype for _ in range(2))
    assert first.digest() == again.digest()
