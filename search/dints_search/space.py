"""The DiNTS search space, its continuous relaxation, and topologies drawn uniformly from it.

A block has E = 3D - 2 edges; a pattern is a non-empty subset of them. A set of levels has a number: row s of
`SearchSpace.node_sets` holds the levels d that are bits of s + 1.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dints_search.genotype import OPERATIONS, Edge, Genotype, edges

NUM_OPERATIONS: Final = len(OPERATIONS)
"""Cell operations that every edge chooses from (N)."""

INITIAL_SPREAD: Final = 0.01
"""Standard deviation of the architecture parameters before the search."""

Side = Literal["in", "out"]


@dataclass(frozen=True)
class SearchSpace:
    """All networks of L blocks and D levels.

    Attributes:
        num_blocks: L.
        num_depths: D, from 2 to 5.
    """

    num_blocks: int = 12
    num_depths: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.num_blocks <= 64 or not 2 <= self.num_depths <= 5:
            raise ValueError(
                f"expected 1 to 64 blocks and 2 to 5 levels, found {self.num_blocks} and {self.num_depths}"
            )

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Return the E edges that every block has."""
        return edges(self.num_depths)

    @property
    def num_edges(self) -> int:
        """Return E = 3D - 2."""
        return 3 * self.num_depths - 2

    @property
    def num_patterns(self) -> int:
        """Return M = 2^E - 1, the non-empty subsets of a block's edges."""
        return int(2**self.num_edges - 1)

    @cached_property
    def node_sets(self) -> NDArray[np.uint8]:
        """Return the non-empty sets of levels: (2^D - 1, D), row s is the binary form of s + 1."""
        return _bits(self.num_depths)

    def incidence(self, side: Side) -> NDArray[np.uint8]:
        """Return (E, D): 1 where an edge leaves (`in`) or enters (`out`) a level."""
        levels = [edge.in_level if side == "in" else edge.out_level for edge in self.edges]
        return np.eye(self.num_depths, dtype=np.uint8)[levels]


@dataclass(frozen=True)
class LogEdges:
    """The edges' probabilities as logarithms, so that nothing overflows or becomes 0 / 0.

    Attributes:
        on: (L, E), log p.
        off: (L, E), log (1 - p).
        some: (L,), log z, z = 1 - prod (1 - p): that a block has an edge at all.
    """

    on: Tensor
    off: Tensor
    some: Tensor


class ArchitectureParameters(nn.Module):
    """What the search learns: `alpha_c` (L, E, N) chooses operations, `alpha_a` (L, E) edges.

    Every edge is on by itself with probability sigmoid(alpha_a); a block without any edge is excluded.
    """

    def __init__(self, space: SearchSpace, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.space = space
        shape = (space.num_blocks, space.num_edges)
        self.alpha_c = nn.Parameter(1 + INITIAL_SPREAD * torch.randn((*shape, NUM_OPERATIONS), generator=generator))
        self.alpha_a = nn.Parameter(INITIAL_SPREAD * torch.randn(shape, generator=generator))
        self.register_buffer("_leaving", torch.tensor(space.incidence("in")), persistent=False)
        self.register_buffer("_entering", torch.tensor(space.incidence("out")), persistent=False)
        self.register_buffer("_sets", torch.tensor(space.node_sets), persistent=False)

    def operation_weights(self) -> Tensor:
        """Return (L, E, N), summing to 1 over the operations."""
        return functional.softmax(self.alpha_c, dim=-1)

    def log_edges(self) -> LogEdges:
        """Return the logarithms of the edges' probabilities."""
        off = functional.logsigmoid(-self.alpha_a)
        return LogEdges(functional.logsigmoid(self.alpha_a), off, _log1mexp(off.sum(-1)))

    def edge_marginals(self) -> Tensor:
        """Return (L, E): p / z, how likely an edge is on in a block that is not empty."""
        log = self.log_edges()
        return torch.exp(log.on - log.some[:, None])

    def log_node_sets(self, side: Side) -> Tensor:
        """Return (L, 2^D - 1): how likely a block leaves (`in`) or enters (`out`) exactly these levels, as logarithms.

        Edges of different levels are independent, so the probability is a product over levels.
        """
        log = self.log_edges()
        sets = self.get_buffer("_sets").to(log.off)
        idle = log.off @ self.get_buffer("_leaving" if side == "in" else "_entering").to(log.off)  # (L, D)
        return _log1mexp(idle) @ sets.T + idle @ (1 - sets).T - log.some[:, None]

    def reach(self, groups: Tensor) -> Tensor:
        """Return (L, G): how likely a block has an edge of each group.

        Args:
            groups: (E, G), 1 where an edge belongs to a group.
        """
        log = self.log_edges()
        return torch.exp(_log1mexp(log.off @ groups.to(log.off)) - log.some[:, None])


def _log1mexp(x: Tensor) -> Tensor:
    """Return log (1 - exp(x)) for negative x; an x that was rounded to zero counts as the nearest number below it."""
    return torch.log(-torch.expm1(x.clamp(max=-torch.finfo(x.dtype).tiny)))


@dataclass(frozen=True, eq=False)
class Patterns:
    """Every pattern of a block, for decoding and drawing.

    Attributes:
        active: (M, E), in counting order, edge 0 the most significant bit.
        in_set: (M,), the row of `node_sets` with the levels that the pattern leaves.
        out_set: (M,), the row with the levels that it enters.
    """

    active: NDArray[np.uint8]
    in_set: NDArray[np.int64]
    out_set: NDArray[np.int64]


@lru_cache(maxsize=8)
def all_patterns(space: SearchSpace) -> Patterns:
    """Return the 2^E - 1 patterns of a block."""
    active = np.ascontiguousarray(_bits(space.num_edges)[:, ::-1])
    weights = 1 << np.arange(space.num_depths)
    sets = [(active @ space.incidence(side) > 0) @ weights - 1 for side in ("in", "out")]
    for table in (active, *sets):
        table.setflags(write=False)
    return Patterns(active, sets[0], sets[1])


@lru_cache(maxsize=8)
def _completions(space: SearchSpace) -> tuple[tuple[int, ...], ...]:
    """Return for every row of nodes and every node set the number of ways to go on to the end, exactly."""
    table = all_patterns(space)
    count = len(space.node_sets)
    ways = np.zeros((count, count), dtype=np.int64)
    np.add.at(ways, (table.in_set, table.out_set), 1)
    rows = [(1,) * count]
    for _ in range(space.num_blocks):
        rows.append(tuple(sum(int(n) * after for n, after in zip(row, rows[-1], strict=True)) for row in ways))
    return tuple(reversed(rows))


def count_topologies(space: SearchSpace) -> int:
    """Return the number of feasible topologies, operations left aside."""
    return sum(_completions(space)[0])


def sample_topology(space: SearchSpace, rng: random.Random) -> NDArray[np.uint8]:
    """Draw the active edges (L, E) of a feasible topology, each topology being equally likely."""
    table, completions = all_patterns(space), _completions(space)
    nodes = _draw(completions[0], rng)
    rows = []
    for after in completions[1:]:
        leaving = np.flatnonzero(table.in_set == nodes)
        pattern = leaving[_draw([after[s] for s in table.out_set[leaving]], rng)]
        nodes = int(table.out_set[pattern])
        rows.append(table.active[pattern])
    return np.stack(rows)


def sample_genotype(space: SearchSpace, rng: random.Random) -> Genotype:
    """Draw a feasible network: topologies uniformly, operations uniformly."""
    active = sample_topology(space, rng)
    operations = np.array([[rng.randrange(NUM_OPERATIONS) for _ in row] for row in active])
    return build_genotype(active, operations, source="drawn uniformly from the feasible topologies")


def build_genotype(
    edge_active: NDArray[np.integer], edge_operation: NDArray[np.integer], *, about: str = "", source: str = ""
) -> Genotype:
    """Return the genotype of these edges and operations, both (L, E).

    A node before the last row is active when an edge leaves it, one of the last row when an edge enters it.

    Raises:
        pydantic.ValidationError: the edges do not fit together.
    """
    blocks, width = edge_active.shape
    space = SearchSpace(blocks, (width + 2) // 3)
    leaving = edge_active @ space.incidence("in") > 0
    last = edge_active[-1:] @ space.incidence("out") > 0
    return Genotype(
        schema_version=1,
        about=about,
        source=source,
        num_blocks=blocks,
        num_depths=space.num_depths,
        operations=OPERATIONS,
        edge_in_level=tuple(edge.in_level for edge in space.edges),
        edge_out_level=tuple(edge.out_level for edge in space.edges),
        node_active=_rows(np.concatenate([leaving, last])),
        edge_active=_rows(edge_active),
        edge_operation=_rows(edge_operation),
    )


def _rows(table: NDArray[np.generic]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(n) for n in row) for row in table.tolist())


def _bits(width: int) -> NDArray[np.uint8]:
    """Return (2^width - 1, width): the numbers from 1 on in binary, the least significant bit first."""
    numbers = np.arange(1, 2**width)
    return (numbers[:, None] >> np.arange(width) & 1).astype(np.uint8)


def _draw(weights: Sequence[int], rng: random.Random) -> int:
    """Draw an index in proportion to whole weights of any size, without rounding."""
    target = rng.randrange(sum(weights))
    for index, weight in enumerate(weights):
        target -= weight
        if target < 0:
            return index
    raise AssertionError("the weights sum to more than the target")
