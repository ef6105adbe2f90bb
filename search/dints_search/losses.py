"""The architecture losses of the DiNTS search: entropies, topology, memory, and their ramped sum.

Closed forms: no table of a block's 2^E - 1 patterns, no loop over edges. They are exact and finite; `reference=True`
adds the 1e-5 inside the logarithms that the reference implementation has, for comparison with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from dints_search.cost import CostTable
from dints_search.space import ArchitectureParameters, all_patterns

SMOOTHING: Final = 1e-5
"""What the reference implementation adds inside its logarithms."""

TOPOLOGY_WEIGHT: Final = 0.001
"""The paper's lambda, the weight of the topology loss."""

MemoryForm = Literal["reference", "measured"]


@dataclass(frozen=True)
class ArchitectureLoss:
    """The loss of an architecture step and what it is made of, each a scalar.

    Attributes:
        total: L_seg + t / t_all (L_alpha + L_eta + lambda L_tp + L_m).
        segmentation: L_seg. operations: L_alpha. patterns: L_eta. topology: L_tp, before lambda. memory: L_m.
        usage: Me / Ma.
    """

    total: Tensor
    segmentation: Tensor
    operations: Tensor
    patterns: Tensor
    topology: Tensor
    memory: Tensor
    usage: Tensor


def architecture_loss(
    parameters: ArchitectureParameters,
    segmentation: Tensor,
    *,
    progress: float,
    sigma: float,
    cost: CostTable,
    form: MemoryForm = "measured",
    reference: bool = False,
) -> ArchitectureLoss:
    """Return the loss that the architecture parameters follow.

    Args:
        parameters: alpha_c and alpha_a.
        segmentation: L_seg, a scalar.
        progress: t / t_all, from 0 at the end of the warm-up to 1 at the last iteration.
        sigma: the share of the memory of the whole space to aim at, in (0, 1].
        cost: of the operations, as `form` asks for.
        form: of the memory loss, see `memory_usage`.
        reference: smooth the logarithms as the reference implementation does.

    Raises:
        ValueError: `progress` or `sigma` is out of its range.
    """
    if not 0 <= progress <= 1 or not 0 < sigma <= 1:
        raise ValueError(f"expected progress in [0, 1] and sigma in (0, 1], found {progress} and {sigma}")
    operations = operation_entropy(parameters)
    patterns = pattern_entropy(parameters, reference=reference)
    topology = topology_loss(parameters, reference=reference)
    usage = memory_usage(parameters, cost, form=form)
    memory = (usage - sigma).abs()
    total = segmentation + progress * (operations + patterns + TOPOLOGY_WEIGHT * topology + memory)
    return ArchitectureLoss(total, segmentation, operations, patterns, topology, memory, usage)


def operation_entropy(parameters: ArchitectureParameters) -> Tensor:
    """Return L_alpha = -1 / (L E N) sum w log w, w the operations' weights."""
    log = functional.log_softmax(parameters.alpha_c, dim=-1)
    return -(log.exp() * log).mean()


def pattern_entropy(parameters: ArchitectureParameters, *, reference: bool = False) -> Tensor:
    """Return L_eta = -1 / (L M) sum P log P, P the probability of a pattern.

    A pattern's log P is a sum over edges, so its mean needs the edges' marginals only.
    """
    if reference:
        return _pattern_entropy_smoothed(parameters)
    log = parameters.log_edges()
    on = torch.exp(log.on - log.some[:, None])
    entropy = log.some - (on * log.on + (1 - on) * log.off).sum(-1)  # (L,)
    return entropy.mean() / parameters.space.num_patterns


def _pattern_entropy_smoothed(parameters: ArchitectureParameters) -> Tensor:
    """Return -1 / (L M) sum P log (P + 1e-5), which has no closed form: the one place with a row for every pattern."""
    log = parameters.log_edges()
    active = torch.tensor(all_patterns(parameters.space).active, device=log.on.device).to(log.on)  # (M, E)
    probability = torch.exp(log.on @ active.T + log.off @ (1 - active).T - log.some[:, None])  # (L, M)
    return -(probability * torch.log(probability + SMOOTHING)).mean()


def topology_loss(parameters: ArchitectureParameters, *, reference: bool = False) -> Tensor:
    """Return L_tp: binary cross-entropies between the levels that block b enters and those that block b + 1 leaves.

    Summed over the node sets and the L - 1 pairs of neighbours; 0 for one block.
    """
    entered = parameters.log_node_sets("out")[:-1]  # (L - 1, S)
    left = parameters.log_node_sets("in")[1:]
    if reference:
        p, q = entered.exp(), left.exp()
        return -(p * torch.log(q + SMOOTHING) + (1 - p) * torch.log(1 - q + SMOOTHING)).sum()
    others = _log_of_the_others(left)
    return -(entered.exp() * left + _log_of_the_others(entered).exp() * others).sum()


def _log_of_the_others(log: Tensor) -> Tensor:
    """Return log (1 - P) for probabilities (..., S) that sum to one, finite even where P rounds to one."""
    count = log.shape[-1]
    itself = torch.eye(count, dtype=torch.bool, device=log.device)
    return torch.logsumexp(log[..., None, :].masked_fill(itself, -torch.inf), dim=-1)


def memory_usage(parameters: ArchitectureParameters, cost: CostTable, *, form: MemoryForm) -> Tensor:
    """Return Me / Ma: the expected cost over that of the whole space.

    Args:
        parameters: alpha_c and alpha_a.
        cost: `reference_memory` for the reference form, one that was measured for the measured form.
        form: `reference`: Ma has every edge on and the current operation weights, so it moves with alpha_c.
            `measured`: Ma is a constant, every edge on and every operation equally weighted, and what the stems cost
            depends on how likely they are in use.
    """
    weights = parameters.operation_weights()
    cells = torch.as_tensor(cost.cells).to(weights)  # (E, N)
    edges = (weights * cells).sum(-1)  # (L, E)
    expected = (parameters.edge_marginals() * edges).sum()
    if form == "reference":
        return expected / edges.sum()
    return (expected + _stems(parameters, cost)) / cost.whole(parameters.space.num_blocks)


def _stems(parameters: ArchitectureParameters, cost: CostTable) -> Tensor:
    """Return what stems and head are expected to cost: a level's output stem runs if it or a deeper one is entered."""
    space = parameters.space
    levels = torch.arange(space.num_depths)
    out_levels = torch.tensor([edge.out_level for edge in space.edges])
    leaving = torch.tensor(space.incidence("in"))
    deeper = (out_levels[:, None] >= levels).to(leaving)  # (E, D)
    alpha = parameters.alpha_a
    used_in = parameters.reach(leaving.to(alpha.device))[0]  # (D,)
    used_out = parameters.reach(deeper.to(alpha.device))[-1]
    stems_in, stems_out = (torch.as_tensor(stems).to(alpha) for stems in (cost.stems_in, cost.stems_out))
    return (used_in * stems_in).sum() + (used_out * stems_out).sum() + cost.head
