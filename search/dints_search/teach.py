"""Finished runs that a training goes on from, or whose opinion it learns besides the labels.

An ensemble segments better than each of its networks and costs as much as all of them. One network that learns the
ensemble's mean opinion comes close to it (Hinton et al. 2015, arXiv:1503.02531), also where teachers and pupil are of
one size (Furlanello et al. 2018, arXiv:1805.04770): a reader's slips in the labels are smoothed on the way. Teachers
see the very patch that the network sees, augmentation included (Beyer et al. 2022, arXiv:2106.05237).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dints_deploy.errors import DatasetError
from dints_search.network import DiNTSNetwork
from dints_search.precision import autocast
from dints_search.recipe import Recipe
from dints_search.run import seen_cases, trained_network


@dataclass(frozen=True)
class Teachers:
    """Networks that have an opinion on a patch; none by default.

    Attributes:
        networks: ready to infer, on the device where the training runs.
        share: of the target that is their opinion; the labels are the rest.
        precision: they run in, as the training does.
    """

    networks: tuple[nn.Module, ...] = ()
    share: float = 0.0
    precision: str = "fp32"

    @torch.no_grad()
    def opinion(self, image: Tensor) -> Tensor | None:
        """Return the mean of their class probabilities, (N, classes, I, J, K) float32; None where there are none."""
        if not self.networks:
            return None
        with autocast(image.device.type, self.precision):
            total = torch.zeros((), device=image.device)
            for network in self.networks:
                total = total + network(image).float().softmax(dim=1)
        return total / len(self.networks)


def open_teachers(runs: Sequence[Path], recipe: Recipe, unseen: Mapping[str, str], device: str) -> Teachers:
    """Return the networks of finished runs as teachers of a training with this recipe.

    Args:
        runs: folders of finished runs on the same preparation and labels.
        recipe: of the training.
        unseen: cases that the training leaves out, and that no teacher may have seen: id -> SHA-256 of the image.
        device: where the training runs.

    Raises:
        DatasetError: as for `continue_from`; `recipe-invalid` where teachers would have no share of the target.
    """
    if runs and not recipe.retraining.teaching:
        raise DatasetError("recipe-invalid", "expected retraining.teaching above 0 with --teacher, found 0: drop one")
    networks = tuple(_finished(run, recipe, unseen).to(device) for run in runs)
    return Teachers(networks, recipe.retraining.teaching, recipe.retraining.precision)


def continue_from(run: Path, network: DiNTSNetwork, recipe: Recipe, unseen: Mapping[str, str]) -> None:
    """Give a network the weights of a finished run of the same shape.

    Raises:
        DatasetError: `run-mismatch` when the run's network, preparation or labels are others, `cases-seen` when it was
            trained on an unseen case, `checkpoint-invalid` when it is not finished.
    """
    trained = _finished(run, recipe, unseen)
    theirs, ours = ({name: t.shape for name, t in each.state_dict().items()} for each in (trained, network))
    if trained.genotype.digest() != network.genotype.digest() or theirs != ours:
        raise DatasetError(
            "run-mismatch", f"expected {run} to hold this network's weights, found another genotype, width or channels"
        )
    network.load_state_dict(trained.state_dict())


def _finished(run: Path, recipe: Recipe, unseen: Mapping[str, str]) -> DiNTSNetwork:
    """Return a finished run that speaks of the same thing and gives no unseen case away."""
    config, network = trained_network(run)
    if _meaning(config.recipe) != _meaning(recipe):
        raise DatasetError(
            "run-mismatch", f"expected {run} to prepare scans and name labels as {recipe.task} does, found another way"
        )
    if seen := seen_cases(config, unseen):
        raise DatasetError(
            "cases-seen",
            f"expected {run} to know no case that this training leaves out, found {seen[0]} by its id or its content: "
            "choose a run of the same fold, or rename other scans of the same ids",
        )
    return network


def _meaning(recipe: Recipe) -> tuple[Any, ...]:
    """Return what a network's input and output mean; the window may differ, the network is convolutional."""
    channels = [(channel.name, channel.intensity, channel.fill) for channel in recipe.channels]
    return recipe.spacing, channels, recipe.label_names
