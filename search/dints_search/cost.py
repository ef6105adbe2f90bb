"""What the pieces of a network cost: multiply-adds, activations kept for the backward pass, time.

The cost of a network is taken as the sum over its pieces: a cell for every active edge, the stems in use, the head.
Each piece is the real module at its real size; work and activations are counted on the meta device, time is measured.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dints_search.genotype import OPERATIONS, Edge, Genotype
from dints_search.network import channel_counts
from dints_search.operations import Cell, DirectSkip, Head, InputStem, OutputStem, Triple
from dints_search.space import SearchSpace

Shape = tuple[int, ...]
Measure = Callable[[nn.Module, Shape], float]
"""Return the cost of a module that lies on the meta device, for an input of this shape (N, C, I, J, K)."""

Piece = tuple[nn.Module, Shape]
"""A module on the meta device and the shape of its input."""

Clock = Callable[[], float]
"""Return seconds."""

Cache = dict[str, float]
"""Seconds by piece, for the caller to keep and to pass in again: measuring takes a while."""

GIGA: Final = 1e9


@dataclass(frozen=True, eq=False)
class CostTable:
    """The cost of every piece, all in one unit.

    Attributes:
        cells: (E, N), an edge's resampling and operation together; the same in every block.
        stems_in: (D,), of the input stem of a level. stems_out: (D,), of the output stem of a level.
        head: of the classifier, and of what leads to it directly from the scan.
    """

    cells: NDArray[np.float64]
    stems_in: NDArray[np.float64]
    stems_out: NDArray[np.float64]
    head: float

    def of(self, genotype: Genotype) -> float:
        """Return the cost of a genotype's network."""
        total = self.entering(genotype.node_active[0]) + self.leaving(genotype.node_active[-1])
        for active, operation in zip(genotype.edge_active, genotype.edge_operation, strict=True):
            total += float(self.cells[np.arange(len(active)), list(operation)] @ np.array(active))
        return total

    def entering(self, nodes: tuple[int, ...]) -> float:
        """Return the cost of the input stems for a first row of nodes."""
        return float(self.stems_in @ np.array(nodes))

    def leaving(self, nodes: tuple[int, ...]) -> float:
        """Return the cost of what follows a last row of nodes: the output stems from its deepest on up, the head."""
        deepest = max(level for level, on in enumerate(nodes) if on)
        return float(self.stems_out[: deepest + 1].sum()) + self.head

    def scaled(self, factor: float) -> CostTable:
        """Return the same costs in another unit."""
        return CostTable(self.cells * factor, self.stems_in * factor, self.stems_out * factor, self.head * factor)

    def whole(self, num_blocks: int) -> float:
        """Return the cost of everything: every edge on, every operation of an edge equally weighted, all stems."""
        cells = num_blocks * float(self.cells.mean(axis=1).sum())
        return cells + float(self.stems_in.sum() + self.stems_out.sum()) + self.head


@dataclass(frozen=True)
class Setting:
    """What the cost of a network depends on, beside its genotype.

    Attributes:
        size: voxels of a patch, multiples of 2^D.
        batch: scans at a time.
        up, direct_skip: as in a genotype.
    """

    space: SearchSpace
    size: Triple
    in_channels: int
    num_classes: int
    channel_multiplier: float = 1.0
    batch: int = 1
    up: Literal["reference", "conv_first"] = "reference"
    direct_skip: bool = False

    @property
    def channels(self) -> tuple[int, ...]:
        """Return the channels at 1 / 2^i of the resolution, i = 0 .. D."""
        return channel_counts(self.space.num_depths, self.channel_multiplier)

    def shape(self, i: int) -> Shape:
        """Return the shape of the features at 1 / 2^i of the resolution."""
        return (self.batch, self.channels[i], *(n // 2**i for n in self.size))

    def key(self, kind: str, *levels: int) -> str:
        """Return a name under which a piece's figure is kept."""
        place = "-".join(str(level) for level in levels)
        sizes = "x".join(str(n) for n in self.size)
        ends = f"{self.in_channels}..{self.num_classes} channels of {self.channels[0]}"
        return f"{kind} {place}: {self.batch}x{sizes}, {ends}, up {self.up}"


def work_table(setting: Setting) -> CostTable:
    """Return the multiply-adds of the convolutions for one batch, in units of 10^9."""
    return tabulate(setting, count_work)


def memory_table(setting: Setting, *, dtype: torch.dtype = torch.float32) -> CostTable:
    """Return the bytes that autograd keeps from the forward to the backward pass, the weights left aside."""
    return tabulate(setting, lambda module, shape: count_saved(module.to(dtype), shape, dtype=dtype))


def latency_table(
    setting: Setting,
    *,
    device: str = "cpu",
    repeats: int = 5,
    cache: Cache | None = None,
    clock: Clock = time.perf_counter,
) -> CostTable:
    """Return the seconds of a forward pass for one batch, measured on this machine with the present threads.

    All pieces are timed in turn, not each by itself many times: in a network, too, every piece finds its weights and
    its input out of the processor's caches. A cell's time holds the sum into the node that it enters.
    """
    figures: Cache = {} if cache is None else cache
    pieces: list[Piece] = []

    def number(module: nn.Module, shape: Shape) -> float:
        pieces.append((module, shape))
        return float(len(pieces) - 1)

    numbered, machine = dict(figures), f"{device}, {torch.get_num_threads()} threads: "
    tabulate(setting, number, cache=numbered, machine=machine)
    seconds = time_in_turn(pieces, device=device, repeats=repeats, clock=clock)
    figures |= {key: seconds[int(n)] for key, n in numbered.items() if key not in figures}
    return tabulate(setting, number, cache=figures, machine=machine)


def tabulate(setting: Setting, measure: Measure, *, cache: Cache | None = None, machine: str = "") -> CostTable:
    """Measure every piece that a network of this setting can have; what is in `cache` is not measured again."""
    figures: Cache = {} if cache is None else cache

    def figure(key: str, build: Callable[[], nn.Module], shape: Shape) -> float:
        if machine + key not in figures:
            with torch.device("meta"):
                module = build()
            figures[machine + key] = measure(module, shape)
        return figures[machine + key]

    channels, depths = setting.channels, range(setting.space.num_depths)
    raw = (setting.batch, setting.in_channels, *setting.size)
    cells = [[figure(*_cell(setting, edge, name)) for name in OPERATIONS] for edge in setting.space.edges]
    stems_in = [
        figure(
            setting.key("input stem", d),
            lambda d=d: InputStem(setting.in_channels, channels[d], channels[d + 1], level=d),  # type: ignore[misc]
            raw,
        )
        for d in depths
    ]
    stems_out = [
        figure(
            setting.key("output stem", d),
            lambda d=d: OutputStem(channels[d + 1], channels[d]),  # type: ignore[misc]
            setting.shape(d + 1),
        )
        for d in depths
    ]
    head = figure(setting.key("head"), lambda: Head(channels[0], setting.num_classes), setting.shape(0))
    if setting.direct_skip:
        head += figure(setting.key("direct skip"), lambda: DirectSkip(setting.in_channels, channels[0]), raw)
    return CostTable(np.array(cells), np.array(stems_in), np.array(stems_out), head)


def _cell(setting: Setting, edge: Edge, operation: str) -> tuple[str, Callable[[], nn.Module], Shape]:
    channels = setting.channels

    def build() -> nn.Module:
        ends = (channels[edge.in_level + 1], channels[edge.out_level + 1])
        return Cell(*ends, kind=edge.kind, operation=operation, up=setting.up)

    return setting.key(operation, edge.in_level, edge.out_level), build, setting.shape(edge.in_level + 1)


def count_work(module: nn.Module, shape: Shape) -> float:
    """Return the multiply-adds of a module on the meta device, in units of 10^9."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.empty(shape, device="meta"))
    return int(counter.get_total_flops()) / 2 / GIGA  # the counter takes a multiply-add for two operations


def count_saved(module: nn.Module, shape: Shape, *, dtype: torch.dtype = torch.float32) -> float:
    """Return the bytes of the storages that autograd keeps for a module's backward pass, its parameters left aside."""
    device = next((p.device for p in module.parameters()), torch.device("meta"))
    x = torch.empty(shape, device=device, dtype=dtype).normal_().requires_grad_()
    own = {_identity(p) for p in module.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors too, so that no storage is freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        if _identity(tensor) not in own:
            kept[_identity(tensor)] = tensor
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        result = module.train()(x)  # held until the count is done
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return float(total)


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # a meta tensor has no data_ptr to tell storages apart


def time_forward(
    module: nn.Module, shape: Shape, *, device: str = "cpu", repeats: int = 5, clock: Clock = time.perf_counter
) -> float:
    """Return the least seconds of a forward pass without gradients, after one that is not counted."""
    return time_in_turn([(module, shape)], device=device, repeats=repeats, clock=clock)[0]


def time_in_turn(
    pieces: Sequence[Piece], *, device: str = "cpu", repeats: int = 5, clock: Clock = time.perf_counter
) -> list[float]:
    """Return the least seconds of a forward pass of every module: all once, uncounted, then all again and again.

    The least, because whatever else runs on the machine only adds.
    """
    ready = [_on_device(module, device) for module, _ in pieces]
    inputs = {shape: torch.randn(shape, device=device) for _, shape in pieces}
    least = [math.inf] * len(ready)
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for n, (module, (_, shape)) in enumerate(zip(ready, pieces, strict=True)):
                _wait(device)
                start = clock()
                result = module(inputs[shape])
                if isinstance(module, Cell):
                    result = result + result
                _wait(device)
                if turn:
                    least[n] = min(least[n], clock() - start)
    return least


def _on_device(module: nn.Module, device: str) -> nn.Module:
    module = copy.deepcopy(module).to_empty(device=device).eval()
    for p in module.parameters():
        nn.init.normal_(p, std=0.02)
    return module


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


REDUCTION_COST: Final[dict[str, Callable[[float], float]]] = {
    "down": lambda ratio: 3 + 8 * ratio,
    "keep": lambda ratio: 0.0,
    "up": lambda ratio: 2 + 2 * ratio,
}
"""Tensors of a resampling over the size of its output, by the ratio of channels before to after."""

OPERATION_COST: Final = (0, 3, 4, 4, 4)
"""The same for the cell operations."""


def reference_memory(setting: Setting) -> CostTable:
    """Return the reference implementation's estimate of an edge's tensors: values, not bytes, and no stems.

    Its levels have the channels and voxels of twice their resolution; the factor cancels in Me / Ma.
    """
    channels, cells = setting.channels, []
    for edge in setting.space.edges:
        ratio = channels[edge.in_level + 1] / channels[edge.out_level + 1]
        size = float(np.prod(setting.shape(edge.out_level), dtype=np.float64))
        before = REDUCTION_COST[edge.kind](ratio)
        cells.append([size * (1 + before + after) for after in OPERATION_COST])
    idle: NDArray[Any] = np.zeros(setting.space.num_depths)
    return CostTable(np.array(cells), idle, idle, 0.0)
