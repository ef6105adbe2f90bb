"""Retrain a discrete network on one fold's training part: AdamW, Dice + cross-entropy, a schedule that ends at zero.

No choice is made on the fold's validation part: there is no early stopping and no best checkpoint; the averaged (EMA)
weights after the last step are the ones published. A run resumes bit-exactly on a CPU at an equal number of threads,
and runs in several processes under `torchrun`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from dints_deploy.catalog.dataset import Case, Dataset
from dints_deploy.files import sha256_file, write_bytes
from dints_search.augment import Augmenter
from dints_search.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from dints_search.dataset import Patches, check_accepted, check_classes, check_dataset, load_cases
from dints_search.fits import check_fits
from dints_search.genotype import Genotype
from dints_search.metrics import Figures, Metrics, read_metrics
from dints_search.network import DiNTSNetwork
from dints_search.precision import autocast
from dints_search.recipe import Recipe, Retraining
from dints_search.run import (
    WEIGHTS,
    RunConfig,
    build_network,
    check_run,
    configure,
    finished_weights,
    image_digests,
    open_run,
    read_config,
)
from dints_search.segmentation_loss import check_finite, segmentation_loss
from dints_search.teach import Teachers, continue_from, open_teachers
from dints_search.world import World, joined

LOG_EVERY = 25
"""Steps between two lines of metrics.jsonl."""

Report = Callable[[int, float, float], None]
"""Called after every step with (step, loss, learning rate), in the process that writes."""


@dataclass
class State:
    """What training changes: the step, the weights, their average and the optimiser's moments."""

    network: nn.Module
    average: nn.Module
    optimiser: torch.optim.Optimizer
    step: int = 0
    losses: list[float] = field(default_factory=list)

    def save(self, path: Path, configuration: str) -> None:
        """Write the state durably."""
        save_checkpoint(
            path,
            {
                "configuration": configuration,
                "step": self.step,
                "network": self.network.state_dict(),
                "average": self.average.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "losses": self.losses,
            },
        )

    def load(self, path: Path, configuration: str) -> None:
        """Continue from a checkpoint of the same configuration."""
        saved = load_checkpoint(path, configuration)
        self.network.load_state_dict(saved["network"])
        self.average.load_state_dict(saved["average"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.step, self.losses = saved["step"], saved["losses"]


def retrain(
    recipe: Recipe,
    genotype: Genotype,
    dataset: Dataset,
    folder: Path,
    *,
    fold: int,
    seed: int = 0,
    resume: bool = False,
    device: str = "cpu",
    cache: Path | None = None,
    without: Collection[str] = (),
    origin: Path | None = None,
    teachers: Sequence[Path] = (),
    report: Report = lambda step, loss, rate: None,
) -> Path:
    """Train the genotype's network on the training part of `fold` and return the path of its averaged weights.

    Args:
        without: ids of cases that are left out, to measure on them inside the training part.
        origin: a finished run whose weights are the first ones.
        teachers: finished runs whose opinion is learned besides the labels.

    Raises:
        DatasetError: a bad case, a window that does not fit, another configuration in `folder`, a damaged checkpoint,
            a run that cannot teach this one, or `training-diverged`. UsageError: no such device.
    """
    check_fits(recipe, genotype.num_depths)
    check_dataset(dataset, recipe)
    training = tuple(case for case in dataset.fold(fold)[0] if case.id not in without)
    if not (folder / "config.toml").exists():  # a run that was begun goes on as it was
        check_accepted(training, recipe)
    with joined(device) as (world, place):
        config = configure(recipe, genotype, training, fold=fold, seed=seed, processes=world.size)
        config = config.model_copy(update=_schooling(origin, teachers, config.cases))
        config = check_run(folder, config, resume=resume)
        if (folder / WEIGHTS).exists():
            if (folder / CHECKPOINT).exists():
                load_checkpoint(folder / CHECKPOINT, config.digest())  # refuses another configuration's
            return folder / WEIGHTS
        network, school = _beginning(config, genotype, dataset, origin, teachers, place)
        patches = _patches(recipe, training, world, seed=seed, cache=cache)
        world.wait()  # every process has looked at the folder
        if world.writes:
            open_run(folder, config, genotype)
        state = start(network, recipe.retraining)
        if (folder / CHECKPOINT).exists():
            state.load(folder / CHECKPOINT, config.digest())
        source = batches(patches, recipe.retraining.batch, first=state.step, device=place, world=world)
        _train(state, config, folder, source, world, school, report)
        if world.writes:
            _finish(folder, state.average)
        world.wait()
    return folder / WEIGHTS


def _beginning(
    config: RunConfig, genotype: Genotype, dataset: Dataset, origin: Path | None, teachers: Sequence[Path], place: str
) -> tuple[DiNTSNetwork, Teachers]:
    """Return the network with its first weights, and its teachers, on the device of the training."""
    others = [case for case in dataset.cases if case.id not in config.cases]
    unseen = image_digests(others if origin or teachers else [])
    school = open_teachers(teachers, config.recipe, unseen, place)
    torch.manual_seed(config.seed)
    network = build_network(config, genotype)
    if origin is not None:
        continue_from(origin, network, config.recipe, unseen)
    return network.to(place), school


def _schooling(origin: Path | None, teachers: Sequence[Path], cases: Mapping[str, str]) -> dict[str, Any]:
    """Return what a configuration with these cases (id -> digest) says of other runs that it builds on."""
    runs = [*([] if origin is None else [origin]), *teachers]
    digests = [sha256_file(finished_weights(run)) for run in runs]
    known: dict[str, str] = {}
    for case, digest in (item for run in runs for item in read_config(run).all_cases.items()):
        if cases.get(case, known.get(case, digest)) != digest:
            case = f"{case}@{digest[:8]}"  # another dataset's case of the same name
        if case not in cases:
            known[case] = digest
    first = None if origin is None else digests.pop(0)
    return {"origin": first, "teachers": tuple(digests), "known": known}


def _patches(recipe: Recipe, training: Sequence[Case], world: World, *, seed: int, cache: Path | None) -> Patches:
    """Read the training cases; return the patches that all processes take of them."""
    settings = recipe.retraining
    cases = load_cases(training, recipe.preparation, recipe.label_names, cache=cache)
    check_classes(cases, recipe.label_names)
    return Patches(
        cases,
        window=recipe.window,
        foreground=settings.foreground,
        augmenter=Augmenter(settings.augmentation, recipe.channels),
        seed=seed,
        length=settings.steps * world.size * settings.batch,
    )


def _train(
    state: State,
    config: RunConfig,
    folder: Path,
    source: Iterator[tuple[Tensor, Tensor]],
    world: World,
    teachers: Teachers,
    report: Report,
) -> None:
    settings = config.recipe.retraining
    with Metrics(folder, step=state.step, writes=world.writes) as metrics, world.interrupts() as let_through:
        for image, label in source:
            loss, rate = train_step(state, image, label, settings, world, teachers)
            if world.writes:
                report(state.step, loss, rate)
            if state.step % LOG_EVERY == 0:
                metrics.add(_line(state, rate))
            if state.step % settings.checkpoint_every == 0 or state.step == settings.steps:
                if world.writes:
                    state.save(folder / CHECKPOINT, config.digest())
                world.wait()
            try:
                let_through()
            except KeyboardInterrupt:
                state.save(folder / CHECKPOINT, config.digest())
                raise


def start(network: nn.Module, settings: Retraining) -> State:
    """Return the state before the first step."""
    weights = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() <= 1]  # norms and biases: decay would only bias them
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    average = deepcopy(network).eval().requires_grad_(False)
    return State(network, average, optimiser)


class _Share(Sampler[list[int]]):
    """A process's share of the indices of every batch from step `first` on: a resumed run continues where it stopped.

    Processes with batches of n share what one process with a batch of n times their number would take.
    """

    def __init__(self, length: int, batch: int, first: int, world: World) -> None:
        step = batch * world.size
        self.starts, self.batch = range(first * step + world.rank * batch, length, step), batch

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(start, start + self.batch)) for start in self.starts)

    def __len__(self) -> int:
        return len(self.starts)


def batches(
    patches: Patches,
    batch: int,
    *,
    first: int,
    workers: int = 1,
    device: str = "cpu",
    world: World = World(),  # noqa: B008 (frozen)
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the augmented batches from step `first` on, on `device`: image (N, C, I, J, K), label (N, 1, I, J, K).

    Args:
        patches: whose number is a multiple of what all processes take in a step.
        batch: patches of a step in this process.
        first: step to begin with.
        workers: processes that cut out patches.
        device: where the batches are augmented and end.
        world: the processes that share every step.
    """
    sampler = _Share(len(patches), batch, first, world)
    # forked, a worker has everything loaded and ends with its parent; started otherwise (Python 3.14) it has neither
    start: dict[str, Any] = {"prefetch_factor": 8, "multiprocessing_context": "fork"} if workers else {}
    for image, label, seeds in DataLoader(patches, batch_sampler=sampler, num_workers=workers, **start):
        yield patches.augmenter(image.to(device), label.to(device), seeds=seeds.tolist())


def train_step(
    state: State,
    image: Tensor,
    label: Tensor,
    settings: Retraining,
    world: World = World(),  # noqa: B008 (frozen)
    teachers: Teachers = Teachers(),  # noqa: B008 (frozen)
) -> tuple[float, float]:
    """Do one optimiser step and update the average; return the loss and the learning rate.

    No deep supervision: DiNTS has none, and its multi-resolution blocks carry gradients to every level anyway.

    Raises:
        DatasetError: `training-diverged`; the weights are those of before.
    """
    rate, weights = learning_rate(state.step, settings), list(state.network.parameters())
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    state.network.train()
    opinion = teachers.opinion(image)  # first: their activations are gone before the network's are kept
    with autocast(image.device.type, settings.precision):
        logits = state.network(image)  # (N, classes, I, J, K)
    loss = segmentation_loss(logits.float(), label, world, opinion=opinion, share=teachers.share)
    state.optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    value = loss.detach()
    world.average([value, *(p.grad for p in weights if p.grad is not None)])
    norm = nn.utils.clip_grad_norm_(weights, settings.clip_norm)
    check_finite("the network", value, norm)
    state.optimiser.step()
    state.step += 1
    state.losses = [*state.losses[1 - LOG_EVERY :], value.item()]
    _average(state, settings.ema)
    return state.losses[-1], rate


def learning_rate(step: int, settings: Retraining) -> float:
    """Return the rate of a step: linear warm-up, then a half cosine that reaches zero after the last step.

    A short run warms up for half of its steps at most, so that its rate falls to zero as well.
    """
    warmup = min(settings.warmup_steps, settings.steps // 2)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / (settings.steps - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def _average(state: State, decay: float) -> None:
    decay = min(decay, state.step / (state.step + 10))  # a short memory first, so that the start is forgotten
    ours = [p.detach() for p in state.average.parameters()]
    theirs = [p.detach() for p in state.network.parameters()]
    torch._foreach_lerp_(ours, theirs, 1 - decay)


def _line(state: State, rate: float) -> Figures:
    """Return the figures of the last steps."""
    mean = sum(state.losses) / len(state.losses)
    return {"step": state.step, "loss": round(mean, 6), "learning_rate": rate, "time": round(time.time(), 1)}


def _finish(folder: Path, average: nn.Module) -> None:
    """Draw the course and write the weights to publish."""
    from dints_search.curves import draw_retraining_curves  # matplotlib is slow to import, and only wanted here

    draw_retraining_curves(read_metrics(folder), folder / "curves.png")
    tensors = {name: tensor.contiguous().cpu() for name, tensor in average.state_dict().items()}
    write_bytes(folder / WEIGHTS, save(tensors))
