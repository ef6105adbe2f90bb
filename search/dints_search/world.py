"""The processes that train one network together, started by `torchrun`; one process alone is a world of one.

Every process holds all weights and a share of the batch. Gradients are averaged after the backward pass, and sums that
a loss divides by each other are added up over the processes first, with their gradient: a Dice over the whole batch is
not the mean of the processes' Dices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from dints_deploy.runtime.pipeline import interrupts_held
from dints_search.fits import check_device


class _AddUp(torch.autograd.Function):
    """Sum over the processes; the gradient of a sum that all use is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


@dataclass(frozen=True)
class World:
    """This process among those that work together.

    Attributes:
        rank: its number, 0 writes files.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Return whether this process writes the run folder."""
        return self.rank == 0

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of x over the processes, differentiable."""
        return x if self.size == 1 else _AddUp.apply(x)  # type: ignore[no-untyped-call]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        distributed.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            distributed.barrier()

    def interrupts(self) -> AbstractContextManager[Callable[[], None]]:
        """Hold Ctrl-C back until the function is called that this yields, so that a step ends before it comes.

        Of several processes each would stop at a step of its own: they are ended as ever.
        """
        alone = interrupts_held("ending after this step; Ctrl-C again ends at once")
        return alone if self.size == 1 else nullcontext(lambda: None)


def started() -> int:
    """Return how many processes `torchrun` has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Return whether this process is the one that speaks, of those that `torchrun` has started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: str) -> Iterator[tuple[World, str]]:
    """Yield this process's world and device: those that `torchrun` tells in the environment, or itself alone.

    Args:
        device: `cpu` or `cuda`; with `cuda` every process takes the GPU of its local rank.

    Raises:
        UsageError: this machine has no such device.
    """
    size, on_gpu = started(), device.startswith("cuda")
    if size > 1 and on_gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(device)
    if size == 1:
        yield World(), device
        return
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield World(distributed.get_rank(), size), device
    finally:
        distributed.destroy_process_group()
