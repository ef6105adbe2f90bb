"""The two steps of a search iteration: one for the weights, one for the architecture.

First order, the architecture follows the gradient at the present weights. Unrolled (DARTS, section 2.3), it follows
the gradient at the weights after one more step of theirs; the Hessian-vector product in it is a difference of two
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

from dints_search.segmentation_loss import check_finite

Loss = Callable[[], Tensor]
"""Compute a scalar loss with the weights and the architecture as they are."""

Slopes = Callable[[Sequence[Tensor]], list[Tensor]]
"""Turn slopes with respect to clipped gradients into slopes with respect to the gradients."""

Average = Callable[[Sequence[Tensor]], None]
"""Replace tensors by their mean over the processes."""

PERTURBATION: Final = 0.01
"""DARTS's epsilon: how far the weights are moved for the difference, as a norm."""


@contextmanager
def learning(learned: Sequence[Tensor], frozen: Sequence[Tensor]) -> Iterator[None]:
    """Let gradients flow to some parameters only: what others would need for theirs is not kept."""
    for parameter in learned:
        parameter.requires_grad_(True)
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def weights_step(
    loss: Loss,
    optimiser: torch.optim.Optimizer,
    architecture: Sequence[Tensor],
    *,
    scaler: torch.amp.GradScaler,
    average: Average,
    clip_norm: float,
) -> Tensor:
    """Do one step of the weights and return the loss.

    Raises:
        DatasetError: `training-diverged`; nothing has moved.
    """
    weights = parameters_of(optimiser)
    with learning(weights, frozen=architecture):
        optimiser.zero_grad(set_to_none=True)
        value = loss()
        scaler.scale(value).backward()  # type: ignore[no-untyped-call]
    average([p.grad for p in weights if p.grad is not None])
    scaler.unscale_(optimiser)  # after the mean: an overflow in one process is seen by all, and all skip the step
    norm = nn.utils.clip_grad_norm_(weights, clip_norm)
    _check("the weights", value, norm, scaler)
    scaler.step(optimiser)
    scaler.update()
    return value.detach()


def architecture_step(
    loss: Loss,
    optimiser: torch.optim.Optimizer,
    weights: Sequence[Tensor],
    *,
    scaler: torch.amp.GradScaler,
    average: Average,
) -> Tensor:
    """Do one first-order step of the architecture and return the loss.

    Raises:
        DatasetError: `training-diverged`; nothing has moved.
    """
    architecture = parameters_of(optimiser)
    with learning(architecture, frozen=weights):
        optimiser.zero_grad(set_to_none=True)
        value = loss()
        scaler.scale(value).backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in architecture if p.grad is not None]
    average(gradients)
    scaler.unscale_(optimiser)
    _check("the architecture", value, nn.utils.get_total_norm(gradients), scaler)
    scaler.step(optimiser)
    scaler.update()
    return value.detach()


def unrolled_step(
    training: Loss,
    validation: Loss,
    optimiser: torch.optim.Optimizer,
    weights_optimiser: torch.optim.Optimizer,
    *,
    average: Average,
    clip_norm: float,
) -> None:
    """Do one second-order step of the architecture; the weights end as they were.

    Args:
        training: the weights' loss, on the batch of this iteration.
        validation: the architecture's loss, on a batch that the weights do not learn from.
        optimiser: of the architecture.
        weights_optimiser: SGD, whose next step is taken ahead.
        average: over the processes.
        clip_norm: of that step.

    Raises:
        DatasetError: `training-diverged`; nothing has moved.
    """
    architecture, weights = parameters_of(optimiser), parameters_of(weights_optimiser)
    directions, through = next_sgd_step(training, weights_optimiser, average=average, clip_norm=clip_norm)
    rate = weights_optimiser.param_groups[0]["lr"]
    gradients = unrolled_gradient(
        training, validation, architecture, weights, directions, rate=rate, through=through, average=average
    )
    check_finite("the architecture", nn.utils.get_total_norm(gradients))
    for parameter, gradient in zip(architecture, gradients, strict=True):
        parameter.grad = gradient
    optimiser.step()


def next_sgd_step(
    training: Loss, optimiser: torch.optim.Optimizer, *, average: Average, clip_norm: float
) -> tuple[list[Tensor], Slopes]:
    """Return the direction of the next SGD step of the weights, by parameter, and the slopes of its clipping.

    Clipping, momentum and weight decay are included.
    """
    group, weights = optimiser.param_groups[0], parameters_of(optimiser)
    gradients = list(torch.autograd.grad(training(), weights, materialize_grads=True))
    average(gradients)
    directions, through = clip(gradients, clip_norm)
    for n, weight in enumerate(weights):
        directions[n] = directions[n] + group["weight_decay"] * weight.detach()
        buffer = optimiser.state.get(weight, {}).get("momentum_buffer")
        if buffer is not None:
            directions[n] += group["momentum"] * buffer
    return directions, through


def clip(gradients: Sequence[Tensor], clip_norm: float) -> tuple[list[Tensor], Slopes]:
    """Return the gradients as `clip_grad_norm_` leaves them, and what turns slopes back: g -> g clip / |g|, linearised.

    With u = g / |g|, slopes v of the clipped gradients are clip / |g| (v - u (u . v)) of the gradients.
    """
    norm = nn.utils.get_total_norm(gradients)
    scale = clip_norm / (norm + 1e-6)
    if scale >= 1:
        return list(gradients), list
    units = [gradient / norm for gradient in gradients]

    def through(slopes: Sequence[Tensor]) -> list[Tensor]:
        along = torch.stack([(u * v).sum() for u, v in zip(units, slopes, strict=True)]).sum()
        return [scale * (v - along * u) for u, v in zip(units, slopes, strict=True)]

    return [scale * gradient for gradient in gradients], through


def unrolled_gradient(
    training: Loss,
    validation: Loss,
    architecture: Sequence[Tensor],
    weights: Sequence[Tensor],
    directions: Sequence[Tensor],
    *,
    rate: float,
    through: Slopes = list,
    average: Average = lambda tensors: None,
    perturbation: float = PERTURBATION,
) -> list[Tensor]:
    """Return the gradient of `validation` with respect to the architecture, at weights w' = w - rate * directions.

    d/dalpha L_val(w'(alpha), alpha) = the partial derivative - rate * d^2 L_train / dalpha dw * through(dL_val / dw').
    """
    kept = [w.detach().clone() for w in weights]
    _move(weights, directions, -rate)
    both = torch.autograd.grad(validation(), [*architecture, *weights], materialize_grads=True)
    partial, slopes = list(both[: len(architecture)]), list(both[len(architecture) :])
    _restore(weights, kept)
    average(slopes)
    slopes = through(slopes)
    size = torch.linalg.vector_norm(torch.stack([s.norm() for s in slopes])).item()
    if size == 0:  # on every rank: the loss does not change with the weights
        average(partial)
        return partial
    epsilon, sides = perturbation / size, []
    for sign in (1, -1):
        _move(weights, slopes, sign * epsilon)
        sides.append(torch.autograd.grad(training(), list(architecture), materialize_grads=True))
        _restore(weights, kept)
    found = [p - rate * (a - b) / (2 * epsilon) for p, a, b in zip(partial, *sides, strict=True)]
    average(found)
    return found


def _check(what: str, loss: Tensor, norm: Tensor, scaler: torch.amp.GradScaler) -> None:
    """Refuse what is not finite; with a scaler in use, an infinite gradient is its own affair: it skips the step."""
    check_finite(what, loss, *(() if scaler.is_enabled() else (norm,)))


def parameters_of(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters that an optimiser moves."""
    return [p for group in optimiser.param_groups for p in group["params"]]


@torch.no_grad()
def _move(weights: Sequence[Tensor], directions: Sequence[Tensor], by: float) -> None:
    for weight, direction in zip(weights, directions, strict=True):
        weight += by * direction


@torch.no_grad()
def _restore(weights: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    for weight, old in zip(weights, kept, strict=True):
        weight.copy_(old)
