"""How a search runs: the paper's settings, each of them a figure in the recipe that a person may change."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dints_deploy.catalog.preparation import Sizes
from dints_deploy.catalog.strict import Strict

Share = Annotated[float, Field(ge=0, lt=1)]

Width = Annotated[float, Field(ge=1 / 32)]
"""Multiplier of the channels, of which the first level has 32."""


class Searching(Strict):
    """The settings of a search; those of the paper where nothing else is said.

    Attributes:
        steps: iterations, warm-up included.
        warmup: share of the iterations that train the weights only.
        batch: patches of an iteration in every process.
        num_blocks: L. num_depths: D. channel_multiplier: scales the channels of every level.
        up: of the search network and of the genotype. direct_skip: of the genotype; the search network has none.
        window: voxels of a patch, multiples of 2^D; the recipe's window where it is left out.
        sigma: share of the memory of the whole space to aim at.
        memory: form of the memory loss, see `dints_search.losses.memory_usage`.
        smoothing: add the 1e-5 inside the logarithms of L_eta and L_tp that the reference implementation has.
        rate_warmup_steps: iterations in which the weights' learning rate rises from zero.
        halve_at: shares of the iterations after the warm-up after which that rate is halved.
        architecture_rate: learning rate of alpha_c and alpha_a. With 8 processes the published value is 0.008; a search
            of a few hundred iterations needs a greater one, as Adam moves a parameter by about the rate in each.
        unrolled: take DARTS's second-order step for the architecture, at three times the cost of the first-order one.
            Only in fp32: it is a difference of two gradients that lower precisions round away.
        checkpointing: recompute every block in the backward pass instead of keeping its features.
        compiled: let `torch.compile` translate the search network, which takes minutes at the start.
        held_out: share of the training part that neither step sees, to measure the discretisation gap on.
    """

    steps: PositiveInt = 20000
    warmup: Share = 0.5
    batch: PositiveInt = 1
    num_blocks: Annotated[int, Field(ge=1, le=64)] = 12
    num_depths: Annotated[int, Field(ge=2, le=5)] = 4
    channel_multiplier: Width = 0.5
    up: Literal["reference", "conv_first"] = "reference"
    direct_skip: bool = False
    window: Sizes | None = None
    sigma: Annotated[float, Field(gt=0, le=1)] = 0.5
    memory: Literal["measured", "reference"] = "measured"
    smoothing: bool = Field(default=False, exclude_if=lambda on: not on)  # so that older runs keep their digests
    learning_rate: PositiveFloat = 0.025
    rate_warmup_steps: NonNegativeInt = 50
    momentum: Share = 0.9
    weight_decay: NonNegativeFloat = 4e-5
    halve_at: tuple[float, ...] = (0.4, 0.8)
    architecture_rate: PositiveFloat = 0.008
    architecture_betas: tuple[Share, Share] = (0.5, 0.999)
    clip_norm: PositiveFloat = 5.0
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    unrolled: bool = False
    checkpointing: bool = False
    compiled: bool = False
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    checkpoint_every: PositiveInt = 50

    @model_validator(mode="after")
    def _precise(self) -> Searching:
        if self.unrolled and self.precision != "fp32":
            raise ValueError(
                f"expected precision fp32 for an unrolled search, found {self.precision}: give --precision fp32"
            )
        return self

    @property
    def warmup_steps(self) -> int:
        """Return the iterations before the first architecture step."""
        return round(self.steps * self.warmup)

    def progress(self, step: int) -> float:
        """Return t / t_all of an iteration: 0 in the warm-up, then rising to 1 at the last."""
        return max(0, step + 1 - self.warmup_steps) / max(1, self.steps - self.warmup_steps)

    def rate(self, step: int) -> float:
        """Return the weights' learning rate at an iteration."""
        rising = min(1.0, (step + 1) / max(1, self.rate_warmup_steps))
        halvings = sum(self.progress(step) > share for share in self.halve_at)
        return self.learning_rate * rising * 0.5**halvings
