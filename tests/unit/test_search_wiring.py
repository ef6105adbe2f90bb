"""What a search is wired to: which cases teach what, what its two steps follow, and that they heed its settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_pre_hook

from dints_deploy.catalog.dataset import Case, Dataset, read_dataset
from dints_deploy.imaging.nifti import write_nifti
from dints_deploy.imaging.volume import Volume
from dints_search.bilevel import next_sgd_step, unrolled_gradient
from dints_search.cost import CostTable
from dints_search.losses import ArchitectureLoss, MemoryForm, architecture_loss
from dints_search.metrics import Figures
from dints_search.recipe import Augmentation, Recipe
from dints_search.search import State, cost_table, iterate, search, start
from dints_search.search_run import read_search_config
from dints_search.segmentation_loss import segmentation_loss
from dints_search.supernet import Supernet
from dints_search.world import World
from tests.tiny_task import SIZE, WINDOW, tiny_search_recipe, write_task

UNCHANGED: Final = Augmentation(
    **dict.fromkeys(("rotation", "scaling", "noise", "blur", "brightness", "contrast"), 0.0),
    **dict.fromkeys(("low_resolution", "gamma_of_negative", "gamma"), 0.0),
    mirror=(),
)

Pass = tuple[str, set[str]]
"""What learns from a forward pass, `w`eights, `a`rchitecture or both, and the ids of the cases that it sees."""


def numbered_task(folder: Path) -> Dataset:
    """Write a task whose n-th case, from 1, holds the values n and n + 1/2 only, so that a patch tells its case."""
    dataset = read_dataset(write_task(folder))
    board = np.indices(SIZE).sum(axis=0) % 2 / 2
    for number, case in enumerate(dataset.cases, 1):
        write_nifti(case.image, Volume((number + board[np.newaxis]).astype(np.float32), np.eye(4)))
    return dataset


def plain_recipe(folder: Path, **settings: Any) -> Recipe:
    """Return the tiny recipe with voxels left as they are."""
    recipe = tiny_search_recipe(folder, **settings)
    fields = recipe.model_dump()
    fields["channels"][0]["intensity"] = {"scheme": "identity"}
    fields["retraining"]["augmentation"] = UNCHANGED.model_dump()
    return Recipe.model_validate(fields)


@contextmanager
def watched(dataset: Dataset) -> Iterator[list[Pass]]:
    """Yield a list that gets every forward pass of a search network on the numbered task."""
    passes: list[Pass] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, Supernet):
            learned = {"w": module.weights(), "a": list(module.architecture.parameters())}
            learns = "".join(name for name, some in learned.items() if any(p.requires_grad for p in some))
            numbers = torch.cat([inputs[0].amin((1, 2, 3, 4)), inputs[0].amax((1, 2, 3, 4))])
            passes.append((learns, {dataset.cases[int(n) - 1].id for n in numbers}))

    handle = register_module_forward_pre_hook(note)
    try:
        yield passes
    finally:
        handle.remove()


def ids(cases: Sequence[Case]) -> set[str]:
    return {case.id for case in cases}


@pytest.mark.parametrize(
    "passes_of_an_iteration",
    [
        [("w", "weights"), ("a", "architecture")],
        [("wa", "weights"), ("wa", "architecture"), ("wa", "weights"), ("wa", "weights"), ("w", "weights")],
    ],
    ids=["first order", "unrolled"],
)
def test_each_half_of_the_training_part_teaches_its_own_and_no_other_case_is_searched_on(
    tmp_path: Path, passes_of_an_iteration: list[tuple[str, str]]
) -> None:
    """Every forward pass of a whole search is watched: four iterations of warm-up, then four with both steps."""
    dataset = numbered_task(tmp_path / "task")
    recipe = plain_recipe(tmp_path, unrolled=len(passes_of_an_iteration) > 2)
    with watched(dataset) as passes:
        parts = search(recipe, dataset, tmp_path / "run", fold=0, seed=3).parts
    expected = 4 * [("w", "weights")] + 4 * passes_of_an_iteration
    assert [learns for learns, _ in passes] == [learns for learns, _ in expected]
    taught: dict[str, set[str]] = {"weights": set(), "architecture": set()}
    for (_, part), (_, seen) in zip(expected, passes, strict=True):
        taught[part] |= seen
    training, validation = dataset.fold(0)
    assert taught == {"weights": ids(parts.weights), "architecture": ids(parts.architecture)}
    assert not taught["weights"] & taught["architecture"]
    assert not (taught["weights"] | taught["architecture"]) & ids(validation)
    assert taught["weights"] | taught["architecture"] == ids(training) - ids(parts.held_out)
    config = read_search_config(tmp_path / "run")
    assert taught == {"weights": set(config.weights), "architecture": set(config.architecture)}


def batch_of(seed: int) -> tuple[Tensor, Tensor]:
    """Draw two scans and their labels."""
    generator = torch.Generator().manual_seed(seed)
    size = (2, 1, *WINDOW)
    return torch.randn(size, generator=generator), torch.randint(0, 3, size, generator=generator)


BATCH, OTHERS = batch_of(0), batch_of(1)
"""What the weights and what the architecture learn from."""


def begin(recipe: Recipe, step: int = 0) -> State:
    """Return the state of a search before its iteration `step`."""
    torch.manual_seed(0)
    state = start(recipe, "cpu")
    state.step = step
    return state


def one_iteration(state: State, recipe: Recipe) -> Figures:
    """Do one iteration on the two batches."""
    return iterate(state, recipe.search, [repeat(BATCH), repeat(OTHERS)], cost_table(recipe), World())


def loss_of_the_architecture(
    network: Supernet, cost: CostTable, progress: float, sigma: float, memory: MemoryForm
) -> ArchitectureLoss:
    """Return the paper's loss on the architecture's batch, in fp32."""
    segmentation = segmentation_loss(network(OTHERS[0]), OTHERS[1])
    return architecture_loss(network.architecture, segmentation, progress=progress, sigma=sigma, cost=cost, form=memory)


@pytest.mark.parametrize(("step", "progress"), [(0, 0.25), (3, 1.0)])
@pytest.mark.parametrize(("sigma", "memory"), [(0.1, "measured"), (0.95, "reference")])
def test_the_architecture_follows_its_own_batch_with_the_sigma_and_the_ramp_of_the_iteration(
    tmp_path: Path, step: int, progress: float, sigma: float, memory: MemoryForm
) -> None:
    """Its gradient is that of the paper's loss on the other batch, at the weights after their step."""
    recipe = tiny_search_recipe(tmp_path, steps=4, warmup=0.0, sigma=sigma, memory=memory)
    state = begin(recipe, step)
    network, alphas = state.network, list(state.network.architecture.parameters())
    before = [alpha.detach().clone() for alpha in alphas]
    figures = one_iteration(state, recipe)
    found = [alpha.grad for alpha in alphas]
    for alpha, old in zip(alphas, before, strict=True):
        assert not torch.equal(alpha, old)
        alpha.data.copy_(old)
    loss = loss_of_the_architecture(network, cost_table(recipe), progress, sigma, memory)
    torch.testing.assert_close(found, list(torch.autograd.grad(loss.total, alphas)), rtol=1e-4, atol=1e-7)
    assert figures["L_seg"] == pytest.approx(loss.segmentation.item(), rel=1e-5)
    assert figures["L_m"] == pytest.approx(abs(loss.usage.item() - sigma), rel=1e-5)
    assert figures["progress"] == progress


@pytest.mark.parametrize("clip_norm", [0.01, 1e9])
def test_an_unrolled_iteration_looks_ahead_by_the_rate_and_the_clipping_of_the_weights_own_step(
    tmp_path: Path, clip_norm: float
) -> None:
    own = {"learning_rate": 10.0, "rate_warmup_steps": 2, "clip_norm": clip_norm}
    recipe = tiny_search_recipe(tmp_path, steps=4, warmup=0.0, unrolled=True, sigma=0.1, **own)
    state, cost = begin(recipe), cost_table(recipe)
    alphas, weights = list(state.network.architecture.parameters()), state.network.weights()

    def training() -> Tensor:
        return segmentation_loss(state.network(BATCH[0]), BATCH[1])

    def validation() -> Tensor:
        return loss_of_the_architecture(state.network, cost, 0.25, 0.1, "reference").total

    ahead, through = next_sgd_step(training, state.weights, average=World().average, clip_norm=clip_norm)
    wanted = unrolled_gradient(training, validation, alphas, weights, ahead, rate=5.0, through=through)
    one_iteration(state, recipe)
    torch.testing.assert_close([alpha.grad for alpha in alphas], wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("clip_norm", [0.01, 1e9])
def test_the_weights_follow_their_own_batch_by_torchs_clipped_gradient_and_sgd_by_hand(
    tmp_path: Path, clip_norm: float
) -> None:
    """Twice, while the rate rises, so that momentum counts."""
    momentum, decay = 0.9, 0.01
    own = {"learning_rate": 0.1, "rate_warmup_steps": 2, "momentum": momentum, "weight_decay": decay}
    recipe = tiny_search_recipe(tmp_path, clip_norm=clip_norm, **own)
    state = begin(recipe)
    weights = state.network.weights()
    velocities = [torch.zeros_like(weight) for weight in weights]
    for rate in (0.05, 0.1):
        loss = segmentation_loss(state.network(BATCH[0]), BATCH[1])
        twins = [weight.detach().clone() for weight in weights]
        for twin, gradient in zip(twins, torch.autograd.grad(loss, weights), strict=True):
            twin.grad = gradient
        norm = nn.utils.clip_grad_norm_(twins, clip_norm)
        assert (norm > clip_norm) == (clip_norm < 1)
        before = [twin.clone() for twin in twins]
        for twin, velocity in zip(twins, velocities, strict=True):
            assert twin.grad is not None
            velocity.mul_(momentum).add_(twin.grad + decay * twin)
            twin.sub_(rate * velocity)
        figures = one_iteration(state, recipe)
        assert figures["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert figures["learning_rate"] == rate
        moves = [[a.detach() - b for a, b in zip(after, before, strict=True)] for after in (weights, twins)]
        torch.testing.assert_close(*moves, rtol=1e-3, atol=1e-6)


def test_an_iteration_in_bf16_computes_in_bf16_in_both_steps_and_stays_close_to_one_in_fp32(tmp_path: Path) -> None:
    figures: dict[str, Figures] = {}
    kinds: dict[str, list[torch.dtype]] = {"fp32": [], "bf16": []}
    for precision, found in kinds.items():
        recipe = tiny_search_recipe(tmp_path, warmup=0.0, precision=precision)
        state = begin(recipe)
        state.network.register_forward_hook(lambda module, inputs, logits, found=found: found.append(logits.dtype))
        figures[precision] = one_iteration(state, recipe)
    assert kinds == {"fp32": 2 * [torch.float32], "bf16": 2 * [torch.bfloat16]}
    for name in ("loss", "L_seg"):
        assert figures["bf16"][name] != figures["fp32"][name]
        assert figures["bf16"][name] == pytest.approx(figures["fp32"][name], rel=0.05)


def test_an_iteration_with_checkpointing_keeps_less_for_the_same_figures(tmp_path: Path) -> None:
    figures, kept = [], []
    for checkpointing in (False, True):
        recipe = tiny_search_recipe(tmp_path, warmup=0.0, checkpointing=checkpointing)
        state, sizes = begin(recipe), [0]

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            figures.append(one_iteration(state, recipe))
        kept.append(sum(sizes))
    assert [figure.pop("phase") for figure in figures] == ["search", "search"]
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)
    assert kept[1] < 0.5 * kept[0]


# torch 2.13 does it itself while it translates
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_a_translated_network_takes_the_same_two_iterations(tmp_path: Path) -> None:
    """By torch.compile's front and its gradients, which is all but the generated code: that takes minutes on a CPU."""
    recipe = tiny_search_recipe(tmp_path, warmup=0.0)
    figures = []
    for compiled in (False, True):
        state = begin(recipe)
        if compiled:
            state.network.compile(backend="aot_eager")
        figures.append([one_iteration(state, recipe) for _ in range(2)])
    for eager, translated in zip(*figures, strict=True):
        assert eager.pop("phase") == translated.pop("phase") == "search"
        assert translated == pytest.approx(eager, rel=1e-5)
