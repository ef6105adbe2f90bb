"""From architecture parameters to a genotype: the most likely feasible network, and three rivals to compare it with.

A topology is feasible when every block leaves exactly the levels that the block before it entered. So the most likely
one is a best path over sets of active levels, found exactly by Viterbi's algorithm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dints_search.genotype import Genotype
from dints_search.losses import SMOOTHING
from dints_search.space import ArchitectureParameters, SearchSpace, all_patterns, build_genotype

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

STRONGEST_KEPT: Final = 2
"""Edges into a node that DARTS's rule keeps."""


@dataclass(frozen=True)
class Infeasible:
    """A choice of edges that makes no network, or a budget that no network keeps.

    Attributes:
        reason: what is wrong, for a person.
        blocks: those that do not leave exactly the levels that the block before them enters.
    """

    reason: str
    blocks: tuple[int, ...] = ()


def decode(parameters: ArchitectureParameters, *, reference: bool = False) -> Genotype:
    """Return the most likely feasible network; each edge has its most likely operation.

    Args:
        parameters: alpha_c and alpha_a.
        reference: add 1e-5 to every pattern's probability, as the reference implementation does.
    """
    scores = pattern_scores(parameters)
    if reference:
        scores = np.log(np.exp(scores) + SMOOTHING)
    chosen = best_path(parameters.space, scores)
    active = all_patterns(parameters.space).active[chosen]
    return build_genotype(active, likeliest_operations(parameters), source="decoded: most likely feasible network")


def decode_by_block(parameters: ArchitectureParameters) -> Genotype | Infeasible:
    """Return the network of every block's most likely pattern, which is seldom feasible."""
    table = all_patterns(parameters.space)
    chosen = pattern_scores(parameters).argmax(axis=1)
    broken = np.flatnonzero(table.in_set[chosen[1:]] != table.out_set[chosen[:-1]]) + 1
    if len(broken):
        names = ", ".join(str(block) for block in broken)
        reason = f"expected every block to leave the levels that the one before it enters, blocks {names} do not"
        return Infeasible(reason, tuple(int(block) for block in broken))
    active = table.active[chosen]
    return build_genotype(active, likeliest_operations(parameters), source="decoded: most likely pattern of each block")


def decode_by_edge(parameters: ArchitectureParameters) -> Genotype:
    """Return the network of DARTS's rule: every node keeps its two strongest incoming edges.

    An edge is as strong as its probability times the weight of its likeliest operation. Nodes that no kept edge leaves
    are dead ends: they go, with the edges that enter them, from the last block to the first.
    """
    space = parameters.space
    strength = _edge_probabilities(parameters) * _operation_weights(parameters).max(-1)  # (L, E)
    entering, leaving = space.incidence("out"), space.incidence("in")
    active = np.zeros(strength.shape, dtype=np.uint8)
    wanted = np.ones(space.num_depths, dtype=bool)
    for block in reversed(range(space.num_blocks)):
        for level in np.flatnonzero(wanted):
            edges = np.flatnonzero(entering[:, level])
            active[block, edges[np.argsort(-strength[block, edges], kind="stable")][:STRONGEST_KEPT]] = 1
        wanted = active[block] @ leaving > 0
    return build_genotype(active, likeliest_operations(parameters), source="decoded: DARTS, two strongest edges a node")


def decode_single_path(parameters: ArchitectureParameters) -> Genotype:
    """Return the network of Auto-DeepLab's rule: the likeliest path of one edge per block.

    A step's probability is its edge's share of the probabilities of all edges that leave the same node.
    """
    space = parameters.space
    probability = _edge_probabilities(parameters)
    leaving = space.incidence("in").astype(np.float64)
    share = np.log(probability) - np.log(probability @ leaving @ leaving.T)  # (L, E)
    table = all_patterns(space)
    scores = np.where(table.active.sum(axis=1) == 1, share @ table.active.T, -np.inf)
    active = table.active[best_path(space, scores)]
    return build_genotype(active, likeliest_operations(parameters), source="decoded: Auto-DeepLab, single path")


Decoder = Callable[[ArchitectureParameters], Genotype | Infeasible]

DECODERS: Final[dict[str, Decoder]] = {
    "dints": decode,
    "block": decode_by_block,
    "darts": decode_by_edge,
    "single-path": decode_single_path,
}
"""The decoders without a budget, by the name that a person types."""


def best_path(
    space: SearchSpace, scores: Floats, *, first: Floats | None = None, last: Floats | None = None
) -> list[int]:
    """Return a pattern for each block, together feasible and of the greatest sum of scores.

    Args:
        space: L and D.
        scores: (L, M).
        first: (2^D - 1,), the score of the levels that the first block leaves; 0 without.
        last: (2^D - 1,), the score of the levels that the last block enters; 0 without.
    """
    table, count = all_patterns(space), len(space.node_sets)
    best = np.zeros(count) if first is None else first
    steps: list[Ints] = []
    for row in scores:
        reached = best[table.in_set] + row  # (M,)
        order = np.argsort(reached, kind="stable")
        step = np.zeros(count, dtype=np.int64)
        step[table.out_set[order]] = order  # every set is entered by some pattern; the last one written is the best
        best = reached[step]
        steps.append(step)
    nodes = int((best if last is None else best + last).argmax())
    chosen = []
    for step in reversed(steps):
        chosen.append(int(step[nodes]))
        nodes = int(table.in_set[step[nodes]])
    return chosen[::-1]


def pattern_scores(parameters: ArchitectureParameters) -> Floats:
    """Return (L, M): log P of every pattern."""
    alpha = _values(parameters.alpha_a)
    on, off = -np.logaddexp(0, -alpha), -np.logaddexp(0, alpha)
    active = all_patterns(parameters.space).active.astype(np.float64)
    some = np.log(-np.expm1(off.sum(axis=1, keepdims=True)))
    scores: Floats = on @ active.T + off @ (1 - active.T) - some
    return scores


def log_probability(parameters: ArchitectureParameters, genotype: Genotype) -> float:
    """Return log P of a genotype's edges."""
    place = 1 << np.arange(parameters.space.num_edges)[::-1]
    rows = np.array(genotype.edge_active) @ place - 1  # patterns are in counting order
    return float(pattern_scores(parameters)[np.arange(len(rows)), rows].sum())


def likeliest_operations(parameters: ArchitectureParameters) -> Ints:
    """Return (L, E): the operation of the greatest weight."""
    operations: Ints = _values(parameters.alpha_c).argmax(axis=-1)
    return operations


def operation_losses(parameters: ArchitectureParameters) -> Floats:
    """Return (L, E, N): what choosing another operation than the likeliest one takes from log P; 0 or less."""
    alpha = _values(parameters.alpha_c)
    losses: Floats = alpha - alpha.max(axis=-1, keepdims=True)
    return losses


def _operation_weights(parameters: ArchitectureParameters) -> Floats:
    weights = np.exp(operation_losses(parameters))
    normalised: Floats = weights / weights.sum(axis=-1, keepdims=True)
    return normalised


def _edge_probabilities(parameters: ArchitectureParameters) -> Floats:
    probabilities: Floats = np.exp(-np.logaddexp(0, -_values(parameters.alpha_a)))
    return probabilities


def _values(parameter: Tensor) -> Floats:
    values: Floats = parameter.detach().cpu().double().numpy()
    return values
