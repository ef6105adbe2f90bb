"""Decoding is exact: MONAI's network in the reference form, brute force in small spaces, with and without a budget."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch

from dints_search.budget import decode_within
from dints_search.cost import CostTable
from dints_search.decode import (
    DECODERS,
    Infeasible,
    best_path,
    decode,
    decode_by_block,
    decode_by_edge,
    decode_single_path,
    likeliest_operations,
    log_probability,
    operation_losses,
    pattern_scores,
)
from dints_search.genotype import Genotype
from dints_search.space import ArchitectureParameters, SearchSpace, all_patterns
from tests.monai_oracle import copy_alphas, monai_space, parameters_at

TINY = SearchSpace(num_blocks=3, num_depths=2)
SCALES = [0.01, 1.0, 3.0, 5.0]


def assert_decoded_as_monai_does(space: SearchSpace, seeds: range) -> None:
    oracle = monai_space(space)
    for seed in seeds:
        parameters = parameters_at(space, SCALES[seed % len(SCALES)], seed=seed)
        copy_alphas(parameters, oracle)
        nodes, edges, operations, _ = oracle.decode()
        found = decode(parameters, reference=True)
        assert found.edge_active == tuple(tuple(int(n) for n in row) for row in edges), seed
        assert found.node_active == tuple(tuple(int(n) for n in row) for row in nodes), seed
        assert found.edge_operation == tuple(tuple(int(n) for n in row) for row in operations), seed


def test_two_hundred_small_networks_are_those_of_monai() -> None:
    assert_decoded_as_monai_does(SearchSpace(5, 3), range(200))


def test_four_networks_of_the_papers_space_are_those_of_monai() -> None:
    assert_decoded_as_monai_does(SearchSpace(12, 4), range(4))


class Way(NamedTuple):
    """One way through every block, as brute force lists them: rows of `all_patterns` and what it scores and costs."""

    rows: tuple[int, ...]
    score: float
    cost: float


def feasible_ways(parameters: ArchitectureParameters, cost: CostTable) -> list[Way]:
    """Return every feasible topology with the likeliest operations."""
    space = parameters.space
    table, scores, operations = all_patterns(space), pattern_scores(parameters), likeliest_operations(parameters)
    cells = [cost.cells[np.arange(space.num_edges), row] for row in operations]
    ways = []
    for rows in itertools.product(range(space.num_patterns), repeat=space.num_blocks):
        if all(table.out_set[a] == table.in_set[b] for a, b in itertools.pairwise(rows)):
            first = tuple(int(n) for n in space.node_sets[table.in_set[rows[0]]])
            last = tuple(int(n) for n in space.node_sets[table.out_set[rows[-1]]])
            price = cost.entering(first) + cost.leaving(last)
            price += sum(float(c @ table.active[row]) for c, row in zip(cells, rows, strict=True))
            ways.append(Way(rows, sum(float(s[row]) for s, row in zip(scores, rows, strict=True)), price))
    return ways


def costs(space: SearchSpace, *, whole: bool, seed: int = 0) -> CostTable:
    rng = np.random.default_rng(seed)
    shapes = ((space.num_edges, 5), space.num_depths, space.num_depths)
    cells, first, last = (rng.uniform(1, 20, shape) for shape in shapes)
    if whole:
        cells, first, last = cells.round(), first.round(), last.round()
    return CostTable(cells, first, last, 2.0)


def edges_of(space: SearchSpace, rows: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(n) for n in all_patterns(space).active[row]) for row in rows)


@pytest.mark.parametrize("seed", range(5))
def test_the_decoded_network_is_the_most_likely_of_all(seed: int) -> None:
    parameters = parameters_at(TINY, 3.0, seed=seed)
    best = max(feasible_ways(parameters, costs(TINY, whole=True)), key=lambda way: way.score)
    found = decode(parameters)
    assert found.edge_active == edges_of(TINY, best.rows)
    assert log_probability(parameters, found) == pytest.approx(best.score)


def test_scores_at_the_ends_of_a_path_count() -> None:
    parameters = parameters_at(TINY, 1.0)
    scores, first, last = pattern_scores(parameters), np.array([0.0, -9.0, -9.0]), np.array([-9.0, 0.0, -9.0])
    chosen = best_path(TINY, scores, first=first, last=last)
    table = all_patterns(TINY)
    assert (table.in_set[chosen[0]], table.out_set[chosen[-1]]) == (0, 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", [40, 60, 80, 100, 130, 400])
def test_the_network_under_a_budget_is_the_most_likely_that_keeps_it(limit: int, seed: int) -> None:
    parameters, cost = parameters_at(TINY, 2.0, seed=seed), costs(TINY, whole=True, seed=seed)
    within = [way for way in feasible_ways(parameters, cost) if way.cost <= limit]
    found = decode_within(parameters, cost, limit, resolution=limit)  # steps of 1: nothing is rounded
    if not within:
        assert isinstance(found, Infeasible)
        return
    assert isinstance(found, Genotype)
    best = max(within, key=lambda way: way.score)
    assert found.edge_active == edges_of(TINY, best.rows)
    assert np.array(found.edge_operation).tolist() == likeliest_operations(parameters).tolist()
    assert cost.of(found) == best.cost


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("resolution", [20, 40, 300])
def test_a_coarse_grid_keeps_the_budget_and_loses_no_more_than_it_says(resolution: int, seed: int) -> None:
    parameters, cost = parameters_at(TINY, 2.0, seed=seed), costs(TINY, whole=False, seed=seed)
    ways = feasible_ways(parameters, cost)
    for share in (0.9, 0.8, 0.7):
        limit = share * cost.of(decode(parameters))
        guaranteed = limit * (1 - (TINY.num_blocks + 2) / resolution)
        floor = max((way.score for way in ways if way.cost <= guaranteed), default=-np.inf)
        found = decode_within(parameters, cost, limit, resolution=resolution)
        if isinstance(found, Infeasible):
            assert floor == -np.inf
            continue
        assert cost.of(found) <= limit
        score = log_probability(parameters, found)
        assert floor - 1e-9 <= score <= max(way.score for way in ways if way.cost <= limit) + 1e-9


def joint_optimum(parameters: ArchitectureParameters, cost: CostTable, limit: float) -> float:
    """Return the best score of edges and operations over every network of two blocks that costs at most `limit`."""
    space, table = parameters.space, all_patterns(parameters.space)
    blocks = []
    for scores, losses in zip(pattern_scores(parameters), operation_losses(parameters), strict=True):
        rows = []
        for number, pattern in enumerate(table.active):
            used = np.flatnonzero(pattern)
            for choice in itertools.product(range(5), repeat=len(used)):
                gain, price = losses[used, choice].sum(), cost.cells[used, choice].sum()
                rows.append((table.in_set[number], table.out_set[number], scores[number] + gain, price))
        blocks.append(np.array(rows))
    sets = [tuple(int(n) for n in row) for row in space.node_sets]
    first, last = blocks
    price_in = first[:, 3] + np.array([cost.entering(sets[int(s)]) for s in first[:, 0]])
    price_out = last[:, 3] + np.array([cost.leaving(sets[int(s)]) for s in last[:, 1]])
    fits = (first[:, 1][:, None] == last[:, 0]) & (price_in[:, None] + price_out <= limit)
    return float(np.where(fits, first[:, 2][:, None] + last[:, 2], -np.inf).max())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limit", [40, 60, 90, 130])
def test_edges_and_operations_are_chosen_together_where_asked(limit: int, seed: int) -> None:
    space = SearchSpace(2, 2)
    parameters, cost = parameters_at(space, 1.5, seed=seed), costs(space, whole=True, seed=seed)
    best = joint_optimum(parameters, cost, limit)
    found = decode_within(parameters, cost, limit, joint=True, resolution=limit)
    if best == -np.inf:
        assert isinstance(found, Infeasible)
        return
    assert isinstance(found, Genotype)
    assert cost.of(found) <= limit
    chosen = np.take_along_axis(operation_losses(parameters), np.array(found.edge_operation)[..., None], axis=2)[..., 0]
    score = log_probability(parameters, found) + float((chosen * np.array(found.edge_active)).sum())
    assert score == pytest.approx(best)


@pytest.mark.parametrize("joint", [False, True])
def test_a_budget_that_is_not_in_force_changes_nothing(joint: bool) -> None:
    space = SearchSpace(12, 4)
    parameters, cost = parameters_at(space, 1.0), costs(space, whole=False)
    expected = decode(parameters)
    found = decode_within(parameters, cost, 1.05 * cost.of(expected), joint=joint)
    assert isinstance(found, Genotype)
    assert found.digest() == expected.digest()


def test_choosing_operations_too_never_costs_likelihood() -> None:
    space = SearchSpace(12, 4)
    parameters, cost = parameters_at(space, 1.0), costs(space, whole=False)
    limit = 0.6 * cost.of(decode(parameters))
    found = [decode_within(parameters, cost, limit, joint=joint) for joint in (False, True)]
    scores = []
    for genotype in found:
        assert isinstance(genotype, Genotype)
        assert 0.99 * limit < cost.of(genotype) <= limit
        rows = np.array(genotype.edge_operation)[..., None]
        losses = np.take_along_axis(operation_losses(parameters), rows, axis=2)[..., 0]
        scores.append(log_probability(parameters, genotype) + float((losses * np.array(genotype.edge_active)).sum()))
    assert scores[1] > scores[0] + 0.1


def test_a_budget_below_the_cheapest_network_names_what_that_costs() -> None:
    parameters, cost = parameters_at(TINY, 2.0), costs(TINY, whole=True)
    least = min(way.cost for way in feasible_ways(parameters, cost))
    found = decode_within(parameters, cost, least - 1)
    assert found == Infeasible(
        f"expected a budget of at least {least:.6g}, the cheapest feasible network, found {least - 1:.6g}"
    )
    exact = decode_within(parameters, cost, least, resolution=int(least))
    assert isinstance(exact, Genotype)
    with pytest.raises(ValueError, match="expected a budget of more than 0, found -1"):
        decode_within(parameters, cost, -1)


def with_edges(space: SearchSpace, rows: list[list[float]]) -> ArchitectureParameters:
    parameters = ArchitectureParameters(space)
    with torch.no_grad():
        parameters.alpha_a.copy_(torch.tensor(rows))
    return parameters


def test_the_argmax_of_each_block_reports_where_it_is_no_network() -> None:
    # Edges of two levels: 0 keeps level 0, 1 goes up to it, 2 goes down from it, 3 keeps level 1.
    broken = with_edges(TINY, [[3, -3, -3, -3], [-3, -3, -3, 3], [-3, 3, -3, -3]])
    found = decode_by_block(broken)
    assert isinstance(found, Infeasible)
    assert found.blocks == (1,)
    assert "blocks 1 do not" in found.reason
    fits = decode_by_block(with_edges(TINY, [[3, -3, -3, -3], [-3, -3, 3, -3], [-3, 3, -3, -3]]))
    assert isinstance(fits, Genotype)
    assert fits.edge_active == ((1, 0, 0, 0), (0, 0, 1, 0), (0, 1, 0, 0))


def test_darts_keeps_the_two_strongest_edges_of_every_node_and_no_dead_end() -> None:
    space = SearchSpace(2, 3)
    # Level 0 is entered by edges 0 and 1, level 1 by 2, 3 and 4, level 2 by 5 and 6.
    parameters = with_edges(space, [[0, 0, 1, 2, 3, 0, 0], [3, 2, 2, 3, 1, 2, 1]])
    found = decode_by_edge(parameters)
    assert found.edge_active[1] == (1, 1, 1, 1, 0, 1, 1)
    assert found.edge_active[0] == (1, 1, 0, 1, 1, 1, 1)
    strong = with_edges(space, [[0, 0, 1, 2, 3, 0, 0], [3, 2, 2, 3, 1, 2, 1]])
    with torch.no_grad():
        strong.alpha_c[0, 2, 1] = 9.0  # a sure operation makes edge 2 stronger than edge 3
    assert decode_by_edge(strong).edge_active[0] == (1, 1, 1, 0, 1, 1, 1)
    dead = decode_by_edge(with_edges(SearchSpace(2, 4), [[0.0] * 10, [0, 0, 0, 0, -9, 0, 0, -9, -9, 0]]))
    assert all(any(row) for row in dead.edge_active)


def test_auto_deeplab_takes_the_likeliest_path() -> None:
    for seed in range(5):
        parameters = parameters_at(TINY, 2.0, seed=seed)
        p = torch.sigmoid(parameters.alpha_a).detach().numpy()
        edges = TINY.edges
        paths = []
        for path in itertools.product(range(4), repeat=3):
            if all(edges[a].out_level == edges[b].in_level for a, b in itertools.pairwise(path)):
                shares = [
                    p[block, e] / sum(p[block, f] for f in range(4) if edges[f].in_level == edges[e].in_level)
                    for block, e in enumerate(path)
                ]
                paths.append((float(np.prod(shares)), path))
        best = max(paths)[1]
        assert decode_single_path(parameters).edge_active == tuple(
            tuple(int(e == chosen) for e in range(4)) for chosen in best
        )


def test_every_decoder_gives_a_network_or_says_why_not() -> None:
    parameters = parameters_at(SearchSpace(12, 4), 1.0)
    found = {name: decoder(parameters) for name, decoder in DECODERS.items()}
    assert {name for name, result in found.items() if isinstance(result, Genotype)} >= {"dints", "darts", "single-path"}
    assert isinstance(found["block"], Infeasible)
