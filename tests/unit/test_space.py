"""The relaxed search space gives the probabilities that enumeration gives, and draws topologies uniformly."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import chisquare
from torch import Tensor

from dints_search.genotype import edges, from_published
from dints_search.space import (
    ArchitectureParameters,
    SearchSpace,
    Side,
    all_patterns,
    build_genotype,
    count_topologies,
    sample_genotype,
    sample_topology,
)
from tests.monai_oracle import parameters_at

TINY = SearchSpace(num_blocks=3, num_depths=2)
SMALL = SearchSpace(num_blocks=4, num_depths=3)


def patterns(space: SearchSpace) -> list[tuple[int, ...]]:
    return [p for p in itertools.product((0, 1), repeat=space.num_edges) if any(p)]


def node_set(space: SearchSpace, pattern: tuple[int, ...], side: str) -> frozenset[int]:
    used = [edge for edge, on in zip(edges(space.num_depths), pattern, strict=True) if on]
    return frozenset(edge.in_level if side == "in" else edge.out_level for edge in used)


def probabilities(parameters: ArchitectureParameters) -> Tensor:
    """Return the probability of every pattern, (L, M), by the definition."""
    p = torch.sigmoid(parameters.alpha_a)[:, None]
    eta = torch.tensor(patterns(parameters.space), dtype=torch.float64)
    products = (eta * p + (1 - eta) * (1 - p)).prod(-1)
    return products / products.sum(-1, keepdim=True)


@pytest.mark.parametrize("depths", [2, 3, 4, 5])
def test_the_patterns_are_all_subsets_of_the_edges_with_the_levels_they_touch(depths: int) -> None:
    space = SearchSpace(2, depths)
    table, expected = all_patterns(space), patterns(space)
    assert [tuple(row) for row in table.active.tolist()] == expected
    assert len(expected) == space.num_patterns
    for side, rows in (("in", table.in_set), ("out", table.out_set)):
        named = [frozenset(np.flatnonzero(space.node_sets[row]).tolist()) for row in rows]
        assert named == [node_set(space, p, side) for p in expected]


def test_the_parameters_start_as_dints_starts_them() -> None:
    parameters = ArchitectureParameters(SearchSpace(), generator=torch.Generator().manual_seed(0))
    assert parameters.alpha_c.shape == (12, 10, 5)
    assert parameters.alpha_a.shape == (12, 10)
    for alpha, mean in ((parameters.alpha_c, 1), (parameters.alpha_a, 0)):
        assert abs(alpha.mean().item() - mean) < 0.003
        assert alpha.std().item() == pytest.approx(0.01, rel=0.2)
    again = ArchitectureParameters(SearchSpace(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.alpha_c, parameters.alpha_c)
    assert set(parameters.state_dict()) == {"alpha_c", "alpha_a"}


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("space", [TINY, SMALL])
def test_marginals_and_node_sets_are_sums_over_patterns(space: SearchSpace, scale: float) -> None:
    parameters = parameters_at(space, scale)
    by_pattern = probabilities(parameters)
    eta = torch.tensor(patterns(space), dtype=torch.float64)
    torch.testing.assert_close(parameters.edge_marginals(), by_pattern @ eta, rtol=1e-10, atol=0)
    for side in get_args(Side):
        found = parameters.log_node_sets(side).exp()
        sets = [frozenset(np.flatnonzero(row).tolist()) for row in space.node_sets]
        expected = torch.zeros_like(found)
        for column, pattern in enumerate(patterns(space)):
            expected[:, sets.index(node_set(space, pattern, side))] += by_pattern[:, column]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-300)
    groups = torch.tensor([[e % 2, e % 3 == 0] for e in range(space.num_edges)], dtype=torch.float64)
    reached = by_pattern @ ((eta @ groups) > 0).double()
    torch.testing.assert_close(parameters.reach(groups), reached, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [-50.0, 50.0])
def test_probabilities_stay_right_at_the_ends(value: float, dtype: torch.dtype) -> None:
    parameters = ArchitectureParameters(SearchSpace()).to(dtype)
    with torch.no_grad():
        parameters.alpha_a.fill_(value)
    marginals = parameters.edge_marginals()
    expected = 1.0 if value > 0 else 1 / 10  # no edge is likely, so exactly one of the ten is on
    torch.testing.assert_close(marginals, torch.full_like(marginals, expected), rtol=1e-5, atol=0)
    for side in get_args(Side):
        log = parameters.log_node_sets(side)
        assert torch.isfinite(log).all()
        torch.testing.assert_close(log.exp().sum(-1), torch.ones(12, dtype=dtype), rtol=1e-5, atol=0)
    (marginals.square().sum() + parameters.log_node_sets("in").sum()).backward()  # type: ignore[no-untyped-call]
    assert parameters.alpha_a.grad is not None
    assert torch.isfinite(parameters.alpha_a.grad).all()


def feasible(space: SearchSpace) -> list[tuple[tuple[int, ...], ...]]:
    """Return every feasible topology, by trying all."""
    return [
        rows
        for rows in itertools.product(patterns(space), repeat=space.num_blocks)
        if all(node_set(space, a, "out") == node_set(space, b, "in") for a, b in itertools.pairwise(rows))
    ]


def test_topologies_are_counted_as_enumeration_counts_them() -> None:
    for blocks in (1, 2, 3):
        assert count_topologies(SearchSpace(blocks, 2)) == len(feasible(SearchSpace(blocks, 2)))
    assert count_topologies(SearchSpace(2, 3)) == len(feasible(SearchSpace(2, 3)))
    assert count_topologies(SearchSpace(12, 4)) == pytest.approx(1.608e30, rel=1e-3)


def test_every_feasible_topology_is_drawn_equally_often() -> None:
    space = SearchSpace(2, 2)
    everything, rng = feasible(space), random.Random(0)
    draws = 100 * len(everything)
    counts = Counter(tuple(tuple(int(n) for n in row) for row in sample_topology(space, rng)) for _ in range(draws))
    assert set(counts) == set(everything)
    assert chisquare(list(counts.values())).pvalue > 0.01


def test_drawn_genotypes_are_feasible_repeatable_and_of_every_operation() -> None:
    space = SearchSpace(12, 4)
    drawn = [sample_genotype(space, random.Random(seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {n for row in drawn[0].edge_operation for n in row} == set(range(5))


def test_edges_that_do_not_fit_together_make_no_genotype() -> None:
    rows = np.array([[1, 0, 0, 0], [0, 0, 0, 1]])
    with pytest.raises(ValidationError, match="expected no active edge of block 0 to enter inactive node"):
        build_genotype(rows, np.zeros_like(rows))
    kept = np.array([[1, 0, 1, 0], [1, 0, 0, 1]])
    genotype = build_genotype(kept, np.full_like(kept, 2))
    assert genotype.node_active == ((1, 0), (1, 1), (1, 1))
    assert from_published(genotype.model_dump(exclude={"schema_version", "up"})) == genotype


@pytest.mark.parametrize(("blocks", "depths"), [(0, 4), (12, 1), (12, 6), (65, 4)])
def test_a_space_out_of_range_is_refused(blocks: int, depths: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 64 blocks and 2 to 5 levels"):
        SearchSpace(blocks, depths)
