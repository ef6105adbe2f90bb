"""The relaxed network of the search: every edge on, every operation computed, their sums weighted.

Its function is that of the reference's search network: an edge gives sum_n w_n op_n(resample(x)), a node the sum of its
edges times their probabilities. It is computed with less:

- the ReLU of a node's features is computed once for all edges that leave it, that of an edge's once for all operations;
- the weights of operations and edges scale the norms' affine parameters instead of feature maps, so no operation's
  output has to be kept for the backward pass;
- features lie channels last, where convolutions of few channels and interpolation are fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dints_search.convolve import convolve
from dints_search.genotype import OPERATIONS, Edge, Genotype
from dints_search.network import DiNTSNetwork, channel_counts
from dints_search.operations import (
    ActConvNorm,
    FactorizedIncrease,
    FactorizedReduce,
    Head,
    InputStem,
    OutputStem,
    PseudoConv3d,
    cell_operation,
    resampling,
)
from dints_search.space import ArchitectureParameters, SearchSpace

LAST: Final = torch.channels_last_3d

UpOrder = Literal["reference", "conv_first"]


class MixedCell(nn.Module):
    """The weights of one edge: its resampling and all of its operations. The supernet computes with them.

    Modules are named as in `dints_search.operations.Cell`, but for `operations`, which holds every operation by name.
    """

    def __init__(self, in_channels: int, out_channels: int, *, edge: Edge, up: UpOrder) -> None:
        super().__init__()
        self.resample = resampling(in_channels, out_channels, kind=edge.kind, up=up)
        self.operations = nn.ModuleDict({name: cell_operation(name, out_channels) for name in OPERATIONS})


class Features(NamedTuple):
    """A feature map (N, C, I, J, K) and its ReLU."""

    raw: Tensor
    active: Tensor


class Term(NamedTuple):
    """One operation's share of a node: the convolution's output and the affine parameters of its scaled norm."""

    convolved: Tensor
    weight: Tensor
    bias: Tensor


class Skip(NamedTuple):
    """The share of the operation that does nothing: its input and scale."""

    x: Tensor
    scale: Tensor


class Supernet(nn.Module):
    """Map a scan to logits with every network of the space at once.

    Args:
        space: L and D.
        in_channels: channels of the scan.
        num_classes: channels of the logits, background included.
        channel_multiplier: scales the channels of every level.
        up: as in a genotype.
        checkpointing: in training, keep the nodes' features only and recompute each block in the backward pass.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        in_channels: int,
        num_classes: int,
        channel_multiplier: float = 0.5,
        up: UpOrder = "reference",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        channels = channel_counts(space.num_depths, channel_multiplier)
        self.space = space
        self.in_channels, self.num_classes, self.channel_multiplier = in_channels, num_classes, channel_multiplier
        self.up: UpOrder = up
        self.checkpointing = checkpointing
        self.architecture = ArchitectureParameters(space)
        self.stems_in, self.stems_out, self.cells = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for d in range(space.num_depths):
            self.stems_in[f"level{d}"] = InputStem(in_channels, channels[d], channels[d + 1], level=d)
            self.stems_out[f"level{d}"] = OutputStem(channels[d + 1], channels[d])
        for block in range(space.num_blocks):
            for e, edge in enumerate(space.edges):
                ends = (channels[edge.in_level + 1], channels[edge.out_level + 1])
                self.cells[f"block{block}_edge{e}"] = MixedCell(*ends, edge=edge, up=up)
        self.head = Head(channels[0], num_classes)
        self.to(memory_format=LAST)  # type: ignore[call-overload]

    def weights(self) -> list[nn.Parameter]:
        """Return the parameters of the operations, not those of the architecture."""
        own = {id(p) for p in self.architecture.parameters()}
        return [p for p in self.parameters() if id(p) not in own]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes, I, J, K) of a scan (N, C, I, J, K); I, J and K are multiples of 2^D."""
        step = 2**self.space.num_depths
        sizes = tuple(x.shape[2:])
        if x.dim() != 5 or x.shape[1] != self.in_channels or any(n < step or n % step for n in sizes):
            raise ValueError(
                f"expected a scan (N, {self.in_channels}, I, J, K) of multiples of {step}, found {tuple(x.shape)}"
            )
        marginals, operations = self.architecture.edge_marginals(), self.architecture.operation_weights()
        scales = marginals[..., None] * operations  # (L, E, N)
        nodes = [_enter(stem, x) for stem in self.stems_in.values()]  # type: ignore[arg-type]
        for block in range(self.space.num_blocks):
            if self.checkpointing and self.training and torch.is_grad_enabled():
                nodes = checkpoint(self._advance, nodes, block, scales[block], use_reentrant=False)
            else:
                nodes = self._advance(nodes, block, scales[block])
        return self._leave(nodes)

    def _advance(self, nodes: list[Tensor], block: int, scales: Tensor) -> list[Tensor]:
        """Return the next row of nodes; scales is (E, N)."""
        features = [Features(x, functional.relu(x)) for x in nodes]
        terms: list[list[Term]] = [[] for _ in nodes]
        skips: list[list[Skip]] = [[] for _ in nodes]
        for e, edge in enumerate(self.space.edges):
            cell = self.cells[f"block{block}_edge{e}"]
            scale = scales[e].unbind()
            resampled = _resample(cell.resample, features[edge.in_level])  # type: ignore[arg-type]
            skips[edge.out_level].append(Skip(resampled.raw, scale[0]))
            for name, factor in zip(OPERATIONS[1:], scale[1:], strict=True):
                operation: ActConvNorm | PseudoConv3d = cell.operations[name]  # type: ignore[index, assignment]
                weight, bias = operation.norm.weight * factor, operation.norm.bias * factor
                terms[edge.out_level].append(Term(_apply(operation, resampled.active), weight, bias))
        return [_sum(*entering) for entering in zip(terms, skips, strict=True)]

    def _leave(self, nodes: list[Tensor]) -> Tensor:
        """Return the logits: climb from the deepest level, adding the others on the way."""
        x = nodes[-1]
        for level in reversed(range(len(nodes))):
            unit: ActConvNorm = self.stems_out[f"level{level}"].unit  # type: ignore[assignment]
            x = _grow(_normalise(convolve(unit.conv.weight, functional.relu(x)), unit.norm))
            if level:
                x = nodes[level - 1] + x
        unit = self.head.unit
        logits: Tensor = self.head.classify(_normalise(convolve(unit.conv.weight, functional.relu(x)), unit.norm))
        return logits.contiguous()

    @torch.no_grad()
    def inherit(self, genotype: Genotype) -> DiNTSNetwork:
        """Return the genotype's network with copies of the weights that it shares with this one.

        It goes up as this network does and has no direct skip, whatever the genotype says: those weights were trained.
        """
        genotype = genotype.model_copy(update={"up": self.up, "direct_skip": False})
        network = DiNTSNetwork(
            genotype,
            in_channels=self.in_channels,
            num_classes=self.num_classes,
            channel_multiplier=self.channel_multiplier,
        )
        ours = self.state_dict()
        network.load_state_dict({name: ours[self._our_name(genotype, name)] for name in network.state_dict()})
        return network.to(next(self.parameters()).device)

    @staticmethod
    def _our_name(genotype: Genotype, name: str) -> str:
        """Return where a weight of a discrete network lies here."""
        if not name.startswith("cells."):
            return name
        _, cell, stage, rest = name.split(".", 3)
        if stage != "operation":
            return name
        block, edge = (int(part) for part in cell.removeprefix("block").split("_edge"))
        return f"cells.{cell}.operations.{OPERATIONS[genotype.edge_operation[block][edge]]}.{rest}"


def _enter(stem: InputStem, x: Tensor) -> Tensor:
    if stem.level:
        x = _resize(x, 0.5**stem.level)
    x = functional.relu(_normalise(convolve(stem.conv_first.weight, x.contiguous(memory_format=LAST)), stem.norm_first))
    return _normalise(stem.conv_second(x), stem.norm_second)


def _resample(resample: nn.Module, x: Features) -> Features:
    """Bring a node's features to the level that an edge enters."""
    if isinstance(resample, FactorizedReduce):
        even, odd = _EverySecond.apply(x.active)  # type: ignore[no-untyped-call]
        halves = [convolve(resample.conv_even.weight, even), convolve(resample.conv_odd.weight, odd)]
        y = _normalise(torch.cat(halves, dim=1), resample.norm)
    elif isinstance(resample, FactorizedIncrease):
        unit = resample.unit
        if resample.upsample_first:
            y = _normalise(
                _recomputed(lambda raw: convolve(unit.conv.weight, functional.relu(_grow(raw))), x.raw), unit.norm
            )
        else:
            y = _grow(_normalise(convolve(unit.conv.weight, x.active), unit.norm))
    else:
        return x
    return Features(y, functional.relu(y))


class _EverySecond(torch.autograd.Function):
    """Take the voxels with even and those with odd indices; the gradient keeps the layout, unlike that of a slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.size = x.shape
        halves = x[:, :, ::2, ::2, ::2], x[:, :, 1::2, 1::2, 1::2]
        return halves[0].contiguous(memory_format=LAST), halves[1].contiguous(memory_format=LAST)

    @staticmethod
    def backward(ctx: Any, even: Tensor, odd: Tensor) -> Tensor:
        gradient = torch.empty(ctx.size, dtype=even.dtype, device=even.device, memory_format=LAST).zero_()
        gradient[:, :, ::2, ::2, ::2] = even
        gradient[:, :, 1::2, 1::2, 1::2] = odd
        return gradient


def _apply(operation: ActConvNorm | PseudoConv3d, active: Tensor) -> Tensor:
    """Return an operation's output before its norm, given the ReLU of its input."""
    if isinstance(operation, PseudoConv3d):
        return convolve(operation.conv_line.weight, convolve(operation.conv_plane.weight, active))
    return convolve(operation.conv.weight, active)


def _recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a cheap function to x and keep only x, which is smaller than what autograd would keep."""
    if not torch.is_grad_enabled():
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


def _grow(x: Tensor) -> Tensor:
    return _resize(x, 2)


def _resize(x: Tensor, factor: float) -> Tensor:
    """Interpolate as `dints_search.operations.resize`, but leave the result channels last."""
    x = x.contiguous(memory_format=LAST)
    return functional.interpolate(x, scale_factor=factor, mode="trilinear", align_corners=True)


def _sum(terms: list[Term], skips: list[Skip]) -> Tensor:
    """Return the sum of the scaled norms of all convolutions and of the scaled skips, scan by scan."""
    count = terms[0].convolved.shape[0]
    convolved = [_scans(term.convolved) for term in terms]
    skipped = [_scans(skip.x * skip.scale.to(skip.x.dtype)) for skip in skips]
    scans = []
    for i in range(count):
        total = _normalise_one(convolved[0][i], terms[0].weight, terms[0].bias)
        for y, term in zip(convolved[1:], terms[1:], strict=True):
            total += _normalise_one(y[i], term.weight, term.bias)
        for x in skipped:
            total += x[i]
        scans.append(total)
    return scans[0] if count == 1 else torch.cat(scans)


def _scans(x: Tensor) -> tuple[Tensor, ...]:
    """Return the scans of a batch; a batch of one as it is, as the gradient of a view would lose the layout."""
    return (x,) if x.shape[0] == 1 else torch.split(x, 1)


def _normalise(x: Tensor, norm: nn.InstanceNorm3d) -> Tensor:
    scans = [_normalise_one(scan, norm.weight, norm.bias) for scan in _scans(x)]
    return scans[0] if len(scans) == 1 else torch.cat(scans)


def _normalise_one(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the instance norm of one scan (1, C, I, J, K).

    For one scan that is the batch norm, which unlike torch's instance norm keeps the layout and copies nothing.
    """
    return functional.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5)
