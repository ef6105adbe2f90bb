"""Search a network on one fold's training part: weights and architecture in turn, then the most likely network.

The fold's validation part is never read. The training part is split once: one half trains the weights, the other the
architecture, and a few cases are held out of both to say what the search found. A search resumes bit-exactly on a CPU
at an equal number of threads, and runs in several processes under `torchrun`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dints_deploy.catalog.dataset import Case, Dataset
from dints_search.augment import Augmenter
from dints_search.bilevel import architecture_step, parameters_of, unrolled_step, weights_step
from dints_search.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from dints_search.cost import CostTable, Setting, memory_table, reference_memory
from dints_search.dataset import Patches, check_accepted, check_classes, check_dataset, load_cases
from dints_search.fits import check_precision, check_search_fits, search_window
from dints_search.losses import ArchitectureLoss, architecture_loss
from dints_search.metrics import Figures, Metrics
from dints_search.precision import autocast
from dints_search.recipe import Recipe
from dints_search.retrain import batches
from dints_search.search_run import (
    Parts,
    SearchConfig,
    check_search,
    configure_search,
    open_search,
    split_training,
    write_architecture,
)
from dints_search.searching import Searching
from dints_search.segmentation_loss import segmentation_loss
from dints_search.space import SearchSpace
from dints_search.supernet import Supernet
from dints_search.world import World, joined

Report = Callable[[int, Figures], None]
"""Called after every iteration with the number of those done and their figures, in the process that writes."""

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass
class State:
    """What a search changes: the iteration, the network with its architecture, and both optimisers."""

    network: Supernet
    weights: torch.optim.SGD
    architecture: torch.optim.Adam
    scalers: tuple[torch.amp.GradScaler, torch.amp.GradScaler]
    step: int = 0

    def save(self, path: Path, configuration: str) -> None:
        """Write the state durably."""
        saved = {"configuration": configuration, "step": self.step, "network": self.network.state_dict()}
        saved |= {"weights": self.weights.state_dict(), "architecture": self.architecture.state_dict()}
        save_checkpoint(path, saved | {"scalers": [scaler.state_dict() for scaler in self.scalers]})

    def load(self, path: Path, configuration: str) -> None:
        """Continue from a checkpoint of the same configuration."""
        saved = load_checkpoint(path, configuration)
        self.network.load_state_dict(saved["network"])
        self.weights.load_state_dict(saved["weights"])
        self.architecture.load_state_dict(saved["architecture"])
        for scaler, scale in zip(self.scalers, saved["scalers"], strict=True):
            scaler.load_state_dict(scale)
        self.step = saved["step"]


@dataclass(frozen=True)
class Found:
    """A finished search.

    Attributes:
        network: the search network with its architecture.
        parts: which cases trained what, and which neither.
        writes: whether this process is the one that writes files.
        device: of the network.
    """

    network: Supernet
    parts: Parts
    writes: bool
    device: str


def search(
    recipe: Recipe,
    dataset: Dataset,
    folder: Path,
    *,
    fold: int,
    seed: int = 0,
    resume: bool = False,
    device: str = "cpu",
    cache: Path | None = None,
    report: Report = lambda done, figures: None,
) -> Found:
    """Search on the training part of `fold`; return the search network and leave its architecture in `folder`.

    Raises:
        DatasetError: a bad case, settings that do not fit, another configuration in `folder`, a damaged checkpoint.
    """
    check_search_fits(recipe)
    check_dataset(dataset, recipe)
    training, _ = dataset.fold(fold)
    if not (folder / "config.toml").exists():  # a search that was begun goes on as it was
        check_accepted(training, recipe)
    parts = split_training(training, seed=seed, held_out=recipe.search.held_out)
    with joined(device) as (world, place):
        check_precision(recipe.search.precision, place)
        config = configure_search(recipe, parts, fold=fold, seed=seed, processes=world.size)
        config = check_search(folder, config, resume=resume)
        patches = [
            _patches(recipe, part, world, seed=seed + n, cache=cache)
            for n, part in enumerate((parts.weights, parts.architecture))
        ]
        world.wait()  # every process has looked at the folder
        if world.writes:
            open_search(folder, config)
        torch.manual_seed(seed)
        state = start(recipe, place)
        if (folder / CHECKPOINT).exists():
            state.load(folder / CHECKPOINT, config.digest())
        sources = [
            batches(part, recipe.search.batch, first=max(first, state.step), device=place, world=world)
            for part, first in zip(patches, (0, recipe.search.warmup_steps), strict=True)
        ]
        _iterate(state, config, folder, sources, world, report)
        if world.writes:
            write_architecture(folder, state.network.architecture)
    return Found(state.network, parts, world.writes, place)


def start(recipe: Recipe, device: str) -> State:
    """Return the state before the first iteration."""
    settings = recipe.search
    network = Supernet(
        SearchSpace(settings.num_blocks, settings.num_depths),
        in_channels=len(recipe.channels),
        num_classes=len(recipe.labels) + 1,
        channel_multiplier=settings.channel_multiplier,
        up=settings.up,
        checkpointing=settings.checkpointing,
    ).to(device)
    if settings.compiled:
        network.compile()
    weights = torch.optim.SGD(
        network.weights(), settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    parameters = list(network.architecture.parameters())
    architecture = torch.optim.Adam(parameters, lr=settings.architecture_rate, betas=settings.architecture_betas)
    half = settings.precision == "fp16"
    kind = torch.device(device).type
    scalers = (torch.amp.GradScaler(kind, enabled=half), torch.amp.GradScaler(kind, enabled=half))
    return State(network, weights, architecture, scalers)


def cost_table(recipe: Recipe) -> CostTable:
    """Return the costs that the memory loss of a search weighs."""
    setting = search_setting(recipe)
    return reference_memory(setting) if recipe.search.memory == "reference" else memory_table(setting)


def search_setting(recipe: Recipe) -> Setting:
    """Return what the cost of the search network's pieces depends on, for one scan."""
    return Setting(
        SearchSpace(recipe.search.num_blocks, recipe.search.num_depths),
        search_window(recipe),
        in_channels=len(recipe.channels),
        num_classes=len(recipe.labels) + 1,
        channel_multiplier=recipe.search.channel_multiplier,
        up=recipe.search.up,
    )


def _patches(recipe: Recipe, part: Sequence[Case], world: World, *, seed: int, cache: Path | None) -> Patches:
    """Read the cases of one part; return the patches that all processes take of them."""
    window = search_window(recipe)
    preparation = recipe.preparation.model_copy(update={"window": window})
    cases = load_cases(part, preparation, recipe.label_names, cache=cache)
    check_classes(cases, recipe.label_names)
    return Patches(
        cases,
        window=window,
        foreground=recipe.retraining.foreground,
        augmenter=Augmenter(recipe.retraining.augmentation, recipe.channels),
        seed=seed,
        length=recipe.search.steps * world.size * recipe.search.batch,
    )


def _iterate(
    state: State, config: SearchConfig, folder: Path, sources: Sequence[Batches], world: World, report: Report
) -> None:
    settings, cost = config.recipe.search, cost_table(config.recipe)
    state.network.train()
    with Metrics(folder, step=state.step, writes=world.writes) as metrics, world.interrupts() as let_through:
        while state.step < settings.steps:
            begun = time.perf_counter()
            figures = iterate(state, settings, sources, cost, world)
            metrics.add(figures | {"seconds": round(time.perf_counter() - begun, 3)})
            if world.writes:
                report(state.step, figures)
            if state.step % settings.checkpoint_every == 0 or state.step == settings.steps:
                if world.writes:
                    state.save(folder / CHECKPOINT, config.digest())
                world.wait()
            try:
                let_through()
            except KeyboardInterrupt:
                state.save(folder / CHECKPOINT, config.digest())
                raise


def iterate(state: State, settings: Searching, sources: Sequence[Batches], cost: CostTable, world: World) -> Figures:
    """Do one iteration: a step of the weights and, after the warm-up, one of the architecture; return its figures."""
    rate, progress = settings.rate(state.step), settings.progress(state.step)
    state.weights.param_groups[0]["lr"] = rate
    batch, others = next(sources[0]), next(sources[1]) if progress else None
    network, alphas = state.network, list(state.network.architecture.parameters())

    def segment(image: Tensor, label: Tensor) -> Tensor:
        with autocast(image.device.type, settings.precision):
            logits = network(image)
        return segmentation_loss(logits.float(), label, world)

    parts: list[ArchitectureLoss] = []

    def validation() -> Tensor:
        assert others is not None  # noqa: S101 (for the type checker)
        loss = segment(*others)
        parts.append(_regularised(network, loss, settings, progress, cost))
        return parts[-1].total

    def training() -> Tensor:
        return segment(*batch)

    if others is not None and settings.unrolled:
        unrolled_step(
            training,
            validation,
            state.architecture,
            state.weights,
            average=world.average,
            clip_norm=settings.clip_norm,
        )
    common = {"average": world.average}
    loss = weights_step(
        training, state.weights, alphas, scaler=state.scalers[0], clip_norm=settings.clip_norm, **common
    )
    if others is not None and not settings.unrolled:
        architecture_step(
            validation, state.architecture, parameters_of(state.weights), scaler=state.scalers[1], **common
        )
    state.step += 1
    figures: Figures = {"step": state.step, "phase": "search" if parts else "warmup"}
    losses = {"loss": loss.double()} | (_named(parts[-1]) if parts else {})
    world.average(list(losses.values()))
    figures |= {name: value.item() for name, value in losses.items()}
    return figures | {"learning_rate": rate, "progress": progress}


def _regularised(
    network: Supernet, loss: Tensor, settings: Searching, progress: float, cost: CostTable
) -> ArchitectureLoss:
    return architecture_loss(
        network.architecture,
        loss,
        progress=progress,
        sigma=settings.sigma,
        cost=cost,
        form=settings.memory,
        reference=settings.smoothing,
    )


def _named(found: ArchitectureLoss) -> dict[str, Tensor]:
    """Return the parts of an architecture step's loss under the paper's names."""
    parts = {
        "L_seg": found.segmentation,
        "L_alpha": found.operations,
        "L_eta": found.patterns,
        "L_tp": found.topology,
        "L_m": found.memory,
        "usage": found.usage,
    }
    return {name: value.detach().double() for name, value in parts.items()}
