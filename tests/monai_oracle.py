"""MONAI's DiNTS as the oracle: its search space, and the losses of its published search script in float64."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import torch
from monai.networks.nets import TopologySearch
from torch import Tensor
from torch.nn import functional

from dints_search.space import ArchitectureParameters, SearchSpace


def parameters_at(space: SearchSpace, scale: float, *, seed: int = 0) -> ArchitectureParameters:
    """Return double-precision architecture parameters spread by `scale` around their usual means."""
    parameters = ArchitectureParameters(space).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mean, alpha in ((1, parameters.alpha_c), (0, parameters.alpha_a)):
            alpha.copy_(mean + scale * torch.randn(alpha.shape, generator=generator, dtype=torch.float64))
    return parameters


def monai_space(space: SearchSpace, *, channel_multiplier: float = 1 / 32) -> TopologySearch:
    """Return MONAI's search space; its constructor prints, which is swallowed."""
    with contextlib.redirect_stdout(io.StringIO()):
        return TopologySearch(
            channel_mul=channel_multiplier,
            num_blocks=space.num_blocks,
            num_depths=space.num_depths,
            use_downsample=True,
        )


def copy_alphas(parameters: ArchitectureParameters, oracle: TopologySearch) -> None:
    """Give the oracle's architecture parameters our values, in double precision, and no gradient."""
    oracle.log_alpha_c.data = parameters.alpha_c.detach().double().clone()
    oracle.log_alpha_a.data = parameters.alpha_a.detach().double().clone()
    oracle.log_alpha_c.grad = oracle.log_alpha_a.grad = None


@dataclass(frozen=True)
class Losses:
    """What the reference's script computes in an architecture step."""

    operations: Tensor
    patterns: Tensor
    topology: Tensor
    usage: Tensor


def monai_losses(oracle: TopologySearch, size: tuple[int, int, int]) -> Losses:
    """Return the losses as the reference's search script writes them, for one scan of `size` voxels."""
    probabilities, _ = oracle.get_prob_a(child=True)
    weights = functional.softmax(oracle.log_alpha_c, dim=-1)
    shape = (1, 1, *size)
    return Losses(
        operations=-(weights * functional.log_softmax(oracle.log_alpha_c, dim=-1)).mean(),
        patterns=-(probabilities * torch.log(probabilities + 1e-5)).mean(),
        topology=oracle.get_topology_entropy(probabilities),
        usage=oracle.get_ram_cost_usage(shape) / oracle.get_ram_cost_usage(shape, full=True),
    )
