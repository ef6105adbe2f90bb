"""The network of a Genotype: a static module with the active nodes and edges only.

Its function is that of DiNTS with a stem that halves the image: level d works at 1 / 2^(d + 1) of the resolution.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dints_search.genotype import Genotype, edges
from dints_search.operations import Cell, DirectSkip, Head, InputStem, OutputStem, Triple

BASE_CHANNELS: Final = 32
"""Channels at full resolution and channel multiplier 1; every level below has twice the channels."""


def channel_counts(num_depths: int, channel_multiplier: float) -> tuple[int, ...]:
    """Return the channels at 1 / 2^i of the resolution, i = 0 .. D; level d of the search space has entry d + 1."""
    return tuple(int(BASE_CHANNELS * 2**i * channel_multiplier) for i in range(num_depths + 1))


class DiNTSNetwork(nn.Module):
    """Map a scan to logits as the genotype says.

    Args:
        genotype: the active nodes and edges, and the edges' operations.
        in_channels: channels of the scan.
        num_classes: channels of the logits, background included.
        channel_multiplier: scales the channels of every level.
        compatible: own and compute the inactive stems too, as the reference does, and drop what they give. The logits
            are the same; parameters and work are those that were published.
        checkpointing: in training, keep the nodes' features only and recompute the edges' in the backward pass.
    """

    def __init__(
        self,
        genotype: Genotype,
        *,
        in_channels: int,
        num_classes: int,
        channel_multiplier: float = 1.0,
        compatible: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        channels = channel_counts(genotype.num_depths, channel_multiplier)
        if channels[0] < 1:
            raise ValueError(f"expected a channel multiplier of at least 1/{BASE_CHANNELS}, found {channel_multiplier}")
        self.genotype = genotype
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.compatible = compatible
        self.checkpointing = checkpointing
        self.stems_in = nn.ModuleDict()
        self.cells = nn.ModuleDict()
        self.stems_out = nn.ModuleDict()
        self._build_stems(channels)
        self._build_cells(channels)
        self.direct = DirectSkip(in_channels, channels[0]) if genotype.direct_skip else None
        self.head = Head(channels[0], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a scan.

        Args:
            x: (N, C, I, J, K); I, J and K are multiples of 2^D.

        Returns:
            (N, classes, I, J, K).

        Raises:
            ValueError: the shape of `x` does not fit the network.
        """
        self._check_input(x)
        nodes = self._enter(x)
        for block in range(self.genotype.num_blocks):
            nodes = self._advance(nodes, block)
        features = self._leave(nodes)
        return self.head(features if self.direct is None else features + self.direct(x))  # type: ignore[no-any-return]

    def _build_stems(self, channels: tuple[int, ...]) -> None:
        first, last = self.genotype.node_active[0], self.genotype.node_active[-1]
        deepest = max(level for level, on in enumerate(last) if on)
        for level in range(self.genotype.num_depths):
            mid, inner = channels[level], channels[level + 1]
            if first[level] or self.compatible:
                self.stems_in[f"level{level}"] = InputStem(self.in_channels, mid, inner, level=level)
            if level <= deepest or self.compatible:
                self.stems_out[f"level{level}"] = OutputStem(inner, mid)

    def _build_cells(self, channels: tuple[int, ...]) -> None:
        genotype = self.genotype
        for block in range(genotype.num_blocks):
            for e, edge in enumerate(edges(genotype.num_depths)):
                if genotype.edge_active[block][e]:
                    self.cells[_cell_name(block, e)] = Cell(
                        channels[edge.in_level + 1],
                        channels[edge.out_level + 1],
                        kind=edge.kind,
                        operation=genotype.operations[genotype.edge_operation[block][e]],
                        up=genotype.up,
                    )

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 5 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected a scan of shape (N, {self.in_channels}, I, J, K), found {tuple(x.shape)}")
        step = 2**self.genotype.num_depths
        sizes = tuple(x.shape[2:])
        if any(n < step or n % step for n in sizes) or max(sizes) == step:
            raise ValueError(
                f"expected axes that are multiples of {step}, at least one of them {2 * step} or more, found {sizes}: "
                "pad the scan"
            )

    def _enter(self, x: Tensor) -> list[Tensor | None]:
        """Return the features of the first row of nodes, None for an inactive one."""
        nodes: list[Tensor | None] = [None] * self.genotype.num_depths
        for level, on in enumerate(self.genotype.node_active[0]):
            if on:
                nodes[level] = self.stems_in[f"level{level}"](x)
            elif self.compatible:
                self.stems_in[f"level{level}"](x)
        return nodes

    def _advance(self, nodes: list[Tensor | None], block: int) -> list[Tensor | None]:
        """Return the next row of nodes: each is the sum of what the edges that enter it bring."""
        sums: list[Tensor | None] = [None] * len(nodes)
        for e, edge in enumerate(edges(len(nodes))):
            x = nodes[edge.in_level]
            if x is None or not self.genotype.edge_active[block][e]:
                continue
            brought = self._run_cell(self.cells[_cell_name(block, e)], x)
            before = sums[edge.out_level]
            sums[edge.out_level] = brought if before is None else before + brought
        return sums

    def _run_cell(self, cell: nn.Module, x: Tensor) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(cell, x, use_reentrant=False)  # type: ignore[no-any-return]
        return cell(x)  # type: ignore[no-any-return]

    def _leave(self, nodes: list[Tensor | None]) -> Tensor:
        """Return full-resolution features: climb from the deepest active node, adding the others on the way."""
        x: Tensor | None = None
        for level in reversed(range(len(nodes))):
            node = nodes[level]
            if node is not None:
                x = node if x is None else x + node
            if x is not None:
                x = self.stems_out[f"level{level}"](x)
        if x is None:
            raise AssertionError("a genotype has an active node in its last row")
        return x


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable values."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_gmac(model: DiNTSNetwork, size: Triple) -> float:
    """Return the multiply-adds of the convolutions for one scan of `size` voxels, in units of 10^9.

    The network runs on the meta device: nothing is computed, no weight is copied.
    """
    weights = {name: torch.empty_like(p, device="meta") for name, p in model.named_parameters()}
    x = torch.empty((1, model.in_channels, *size), device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, weights, (x,))
    operations = int(counter.get_total_flops())
    return operations / 2 / 1e9  # the counter takes a multiply-add for two operations


def _cell_name(block: int, edge: int) -> str:
    return f"block{block}_edge{edge}"
