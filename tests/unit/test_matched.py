"""Random networks of one cost: all of that cost, and all that have it equally likely."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from dints_search.cost import CostTable, Setting, work_table
from dints_search.genotype import OPERATIONS, Genotype
from dints_search.matched import sample_within, samples_within
from dints_search.space import SearchSpace, all_patterns, sample_genotype

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


@pytest.mark.parametrize("share", [0.3, 0.5, 0.67, 0.8])
def test_rare_and_common_costs_are_met_within_the_tolerance(work: CostTable, share: float) -> None:
    target = share * work.whole(SPACE.num_blocks)
    found = [sample_within(SPACE, random.Random(seed), work, target) for seed in range(3)]
    for matched in found:
        assert matched.cost == work.of(matched.genotype)
        assert abs(matched.cost - target) <= 0.05 * target
        assert matched.draws < 1000
    assert len({matched.genotype.digest() for matched in found}) == 3


def code(genotype: Genotype) -> tuple[tuple[int, ...], ...]:
    """Return the operation of every edge, -1 where it is idle."""
    pairs = zip(genotype.edge_active, genotype.edge_operation, strict=True)
    return tuple(tuple(o if on else -1 for on, o in zip(*rows, strict=True)) for rows in pairs)


@pytest.mark.parametrize("target", [3.0, 5.0])
def test_networks_of_the_cost_are_drawn_as_plain_rejection_would_draw_them(target: float) -> None:
    """Every feasible topology counts alike, and each of its choices of operations alike."""
    cost, weights = edge_count(TINY), {}
    table = all_patterns(TINY)
    for first, second in itertools.product(range(len(table.active)), repeat=2):
        if table.out_set[first] != table.in_set[second]:
            continue
        active = np.stack([table.active[first], table.active[second]])
        for operations in itertools.product(range(5), repeat=int(active.sum())):
            dear = active.sum() + 0.5 * operations.count(1)
            if abs(dear - target) <= 0.1 * target:
                codes = np.full(active.shape, -1)
                codes[active == 1] = operations
                weights[tuple(tuple(int(n) for n in row) for row in codes)] = 5.0 ** -int(active.sum())
    topologies = Counter[tuple[tuple[bool, ...], ...]]()
    for key, weight in weights.items():
        topologies[tuple(tuple(n >= 0 for n in row) for row in key)] += weight  # type: ignore[assignment]
    rng, seen = random.Random(0), Counter[tuple[tuple[bool, ...], ...]]()
    draws = 300
    for matched in itertools.islice(samples_within(TINY, rng, cost, target, tolerance=0.1), draws):
        key = code(matched.genotype)
        assert key in weights
        seen[tuple(tuple(n >= 0 for n in row) for row in key)] += 1
    expected = np.array(list(topologies.values())) / sum(topologies.values()) * draws
    assert chisquare([seen[key] for key in topologies], expected).pvalue > 0.001


def test_a_cost_that_no_network_has_is_refused(work: CostTable) -> None:
    with pytest.raises(ValueError, match="found none in"):
        sample_within(TINY, random.Random(0), edge_count(TINY), 100.0)
    with pytest.raises(ValueError, match="more than 0"):
        sample_within(SPACE, random.Random(0), work, 0.0)


def test_the_same_seed_draws_the_same_network(work: CostTable) -> None:
    target = work.of(sample_genotype(SPACE, random.Random(9)))
    first, again = (sample_within(SPACE, random.Random(1), work, target).genotype for _ in range(2))
    assert first.digest() == again.digest()
