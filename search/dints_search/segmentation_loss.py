"""Dice plus cross-entropy over a batch that several processes may share, and what to do when it is no number."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from dints_deploy.errors import DatasetError
from dints_search.world import World

SMOOTHING: Final = 1e-5
"""Added to both sides of the Dice quotient, as MONAI does by default."""


def segmentation_loss(
    logits: Tensor,
    label: Tensor,
    world: World = World(),  # noqa: B008 (frozen)
    *,
    opinion: Tensor | None = None,
    share: float = 0.0,
) -> Tensor:
    """Return Dice loss over the whole batch, background left out, plus cross-entropy over all classes.

    Equal to MONAI's `DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)` on the batches
    of all processes together; its gradient is meant to be averaged over them.

    Args:
        logits: (N, classes, I, J, K), float32.
        label: (N, 1, I, J, K), whole numbers.
        world: the processes that share the batch, each with the same number of scans.
        opinion: (N, classes, I, J, K), class probabilities that teachers give; they are `share` of the target, the
            label is the rest. Dice then counts the smaller of what is found and wanted as common, which is their
            product where the target is 0 or 1, and is least where the two agree (Wang et al. 2023, arXiv:2303.16296).
    """
    log = functional.log_softmax(logits, dim=1)
    found = log.exp()[:, 1:]
    classes = functional.one_hot(label[:, 0].long(), logits.shape[1]).movedim(-1, 1)
    if opinion is None:
        likelihood = functional.nll_loss(log, label[:, 0].long())
        wanted = classes[:, 1:].to(log)
        shared = found * wanted
    else:
        target = torch.lerp(classes.to(log), opinion, share)
        likelihood = -(target * log).sum(dim=1).mean()
        wanted = target[:, 1:]
        shared = torch.minimum(found, wanted)
    sums = torch.stack([each.sum((0, 2, 3, 4)) for each in (shared, found, wanted)])  # (3, classes - 1)
    common, ours, theirs = world.total(sums)
    dice = 1 - (2 * common + SMOOTHING) / (ours + theirs + SMOOTHING)
    loss: Tensor = dice.mean() + likelihood
    return loss


def check_finite(what: str, *values: Tensor) -> None:
    """Refuse to go on with a loss or a gradient's norm that is not finite: one such step makes every weight NaN.

    Args:
        what: is about to take the step.
        values: scalars.

    Raises:
        DatasetError: `training-diverged`.
    """
    found = torch.stack([value.detach().double() for value in values])
    if not found.isfinite().all():
        raise DatasetError(
            "training-diverged",
            f"expected a finite loss and gradient for a step of {what}, found {found.tolist()}: the last checkpoint is "
            "sound; lower the learning rate, or use precision fp32",
        )
