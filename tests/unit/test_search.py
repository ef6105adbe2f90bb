"""The steps of a search against their definitions, its split, its schedule, and the wishes that choose a network."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import DiceCELoss
from numpy.typing import NDArray
from torch import Tensor

from dints_deploy.catalog.dataset import Case
from dints_deploy.errors import DatasetError, DintsError
from dints_search.bilevel import next_sgd_step, unrolled_gradient, weights_step
from dints_search.budget import least_cost
from dints_search.checkpoint import load_checkpoint
from dints_search.choice import Choice, check_choice, choose, deployed_setting
from dints_search.cost import memory_table, work_table
from dints_search.fits import check_search_fits
from dints_search.genotype import Genotype
from dints_search.losses import memory_usage, pattern_entropy, topology_loss
from dints_search.metrics import read_metrics, rewind
from dints_search.search import search_setting
from dints_search.search_run import read_architecture, read_search_config, split_training, with_search
from dints_search.searching import Searching
from dints_search.segmentation_loss import segmentation_loss
from dints_search.space import ArchitectureParameters, SearchSpace, build_genotype
from dints_search.supernet import Supernet
from tests.tiny_task import die_at, search_tiny, tiny_search_recipe, train_apart, write_task


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_the_loss_and_its_gradient_are_monais(seed: int, batch: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((batch, classes, 3, 4, 5), generator=generator, dtype=torch.float64)
    label = torch.randint(0, classes, (batch, 1, 3, 4, 5), generator=generator)
    oracle = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    found, wanted = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours, theirs = segmentation_loss(found, label), oracle(wanted, label)
    gradients = torch.autograd.grad(ours, found)[0], torch.autograd.grad(theirs, wanted)[0]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*gradients)


class Toy:
    """A search network of two blocks in float64 with two batches, to differentiate by hand."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = Supernet(SearchSpace(1, 2), in_channels=1, num_classes=2, channel_multiplier=0.0625).double()
        self.weights = self.network.weights()
        self.alphas = list(self.network.architecture.parameters())
        generator = torch.Generator().manual_seed(1)
        self.batches = [self._batch(generator) for _ in range(2)]

    @staticmethod
    def _batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        image = torch.randn((1, 1, 8, 8, 8), generator=generator, dtype=torch.float64)
        return image, torch.randint(0, 2, (1, 1, 8, 8, 8), generator=generator)

    def training(self) -> Tensor:
        return segmentation_loss(self.network(self.batches[0][0]), self.batches[0][1])

    def validation(self) -> Tensor:
        return segmentation_loss(self.network(self.batches[1][0]), self.batches[1][1])


@pytest.mark.parametrize("clip_norm", [1e9, 0.01])
def test_the_unrolled_gradient_is_that_of_the_loss_after_a_step_of_the_weights(clip_norm: float) -> None:
    """Differences of L_val(w - rate * step(w, alpha), alpha) over alpha, momentum, weight decay, clipping included."""
    toy, rate, step = Toy(), 0.05 if clip_norm > 1 else 5.0, 1e-5  # a clipped step must be long to matter
    optimiser = torch.optim.SGD(toy.weights, lr=rate, momentum=0.9, weight_decay=0.01)
    toy.training().backward()  # type: ignore[no-untyped-call]
    optimiser.step()  # fills the momentum

    def ahead() -> float:
        kept = [w.detach().clone() for w in toy.weights]
        directions, _ = next_sgd_step(toy.training, optimiser, average=lambda tensors: None, clip_norm=clip_norm)
        with torch.no_grad():
            for weight, direction in zip(toy.weights, directions, strict=True):
                weight.sub_(rate * direction)
            value = toy.validation().item()
            for weight, old in zip(toy.weights, kept, strict=True):
                weight.copy_(old)
        return value

    directions, through = next_sgd_step(toy.training, optimiser, average=lambda tensors: None, clip_norm=clip_norm)
    arguments: dict[str, Any] = {"rate": rate, "perturbation": 1e-4, "through": through}
    found = unrolled_gradient(toy.training, toy.validation, toy.alphas, toy.weights, directions, **arguments)
    first_order = torch.autograd.grad(toy.validation(), toy.alphas)
    for alpha, gradient, simple in zip(toy.alphas, found, first_order, strict=True):
        flat = alpha.data.view(-1)
        for n in range(0, flat.numel(), 3):
            values = []
            for sign in (1, -1):
                flat[n] += sign * step
                values.append(ahead())
                flat[n] -= sign * step
            wanted = (values[0] - values[1]) / (2 * step)
            assert gradient.view(-1)[n].item() == pytest.approx(wanted, rel=1e-3, abs=1e-7)
        assert not torch.allclose(gradient, simple, rtol=0.01)


def test_the_unrolled_gradient_is_the_partial_one_where_the_weights_do_not_matter() -> None:
    toy = Toy()
    directions = [torch.ones_like(weight) for weight in toy.weights]

    def validation() -> Tensor:
        return torch.stack([alpha.square().sum() for alpha in toy.alphas]).sum()

    def of_three_ranks(tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(3)

    arguments: dict[str, Any] = {"rate": 0.1, "average": of_three_ranks}
    found = unrolled_gradient(toy.training, validation, toy.alphas, toy.weights, directions, **arguments)
    for alpha, gradient in zip(toy.alphas, found, strict=True):
        torch.testing.assert_close(gradient, 3 * 2 * alpha.detach())


@pytest.mark.parametrize("clip_norm", [1e9, 0.01])
def test_an_sgd_step_is_foreseen(clip_norm: float) -> None:
    toy = Toy()
    optimiser = torch.optim.SGD(toy.weights, lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        directions, _ = next_sgd_step(toy.training, optimiser, average=lambda tensors: None, clip_norm=clip_norm)
        wanted = [w.detach() - 0.1 * d for w, d in zip(toy.weights, directions, strict=True)]
        optimiser.zero_grad()
        toy.training().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(toy.weights, clip_norm)
        optimiser.step()
        torch.testing.assert_close([w.detach() for w in toy.weights], wanted)


@given(st.integers(1, 400), st.floats(0, 0.9))
def test_progress_is_zero_in_the_warm_up_then_rises_to_one(steps: int, warmup: float) -> None:
    settings = Searching(steps=steps, warmup=warmup)
    progress = [settings.progress(step) for step in range(steps)]
    assert progress == sorted(progress)
    assert sum(p == 0 for p in progress) == settings.warmup_steps
    assert progress[-1] == 1 or settings.warmup_steps == steps


def test_the_rate_rises_then_is_halved_twice() -> None:
    settings = Searching(steps=1000, rate_warmup_steps=10, learning_rate=0.4)
    rates = [settings.rate(step) for step in range(1000)]
    assert (rates[0], rates[9], rates[500], rates[750], rates[999]) == pytest.approx((0.04, 0.4, 0.4, 0.2, 0.1))


@given(st.integers(3, 60), st.integers(0, 9), st.floats(0.01, 0.9))
def test_the_parts_share_the_training_cases(count: int, seed: int, held_out: float) -> None:
    cases = tuple(Case(f"{n:02}", Path(), Path()) for n in range(count))
    parts = split_training(cases, seed=seed, held_out=held_out)
    ids = [case.id for part in (parts.weights, parts.architecture, parts.held_out) for case in part]
    assert sorted(ids) == [case.id for case in cases]
    assert min(len(parts.weights), len(parts.architecture), len(parts.held_out)) >= 1
    assert 0 <= len(parts.weights) - len(parts.architecture) <= 1
    assert split_training(cases, seed=seed, held_out=held_out) == parts


def test_a_killed_search_that_resumes_leaves_the_same_metrics_and_architecture(tmp_path: Path) -> None:
    """Bit for bit, with the kill between two checkpoints of the second phase."""
    for name in ("whole", "killed"):
        write_task(tmp_path / name / "task")
    die_at(7, search_tiny, tmp_path / "killed")
    killed = train_apart(tmp_path / "killed", search_tiny, resume=True)
    whole = train_apart(tmp_path / "whole", search_tiny)
    figures = [[{**f, "seconds": 0} for f in read_metrics(run)] for run in (killed, whole)]
    assert figures[0] == figures[1]
    assert [f["step"] for f in figures[0]] == list(range(1, 9))
    for one, other in zip(read_architecture(killed).parameters(), read_architecture(whole).parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_search_moves_the_architecture_only_after_the_warm_up(tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    run = search_tiny(tmp_path, warmup=0.99, unrolled=True, memory="measured")
    torch.manual_seed(3)
    untouched = Supernet(SearchSpace(2, 2), in_channels=1, num_classes=3, channel_multiplier=0.125).architecture
    assert torch.equal(read_architecture(run).alpha_c, untouched.alpha_c)
    again = tmp_path / "again"
    write_task(again / "task")
    moved = read_architecture(search_tiny(again, warmup=0.5, unrolled=True))
    assert not torch.equal(moved.alpha_c, untouched.alpha_c)
    assert {f["phase"] for f in read_metrics(again / "run")} == {"warmup", "search"}


def test_a_torn_line_of_metrics_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert [f["step"] for f in read_metrics(tmp_path)] == [1, 2, 3]
    rewind(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    search_tiny(tmp_path, steps=2)
    with pytest.raises(DatasetError, match=r"expected .* to hold this configuration") as caught:
        search_tiny(tmp_path, steps=2, sigma=0.2, resume=True)
    assert caught.value.code == "run-mismatch"
    with pytest.raises(DatasetError, match="give --resume"):
        search_tiny(tmp_path, steps=2)
    one, other = sorted((tmp_path / "task" / "labelsTr").iterdir())[1:3]
    one.write_bytes(other.read_bytes())
    with pytest.raises(DatasetError, match=r"another \(labels\)") as caught:
        search_tiny(tmp_path, steps=2, resume=True)
    assert caught.value.code == "run-mismatch"


@pytest.mark.parametrize(
    "changes",
    [
        {"window": (12, 12, 10)},
        {"window": (4, 4, 4)},
        {"window": (8, 12, 12), "precision": "bf16"},
        {"window": (16, 16, 16), "num_depths": 3},  # the recipe's own window of 12 voxels does not fit
    ],
)
def test_a_window_that_does_not_fit_is_refused_before_anything_is_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(DatasetError) as caught:
        check_search_fits(tiny_search_recipe(tmp_path, **changes))
    assert caught.value.code == "recipe-invalid"
    with pytest.raises(DatasetError):
        search_tiny(tmp_path, **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"sigma": 1.5}, "sigma"),
        ({"num_blocks": 65}, "num_blocks"),
        ({"channel_multiplier": 0.01}, "channel_multiplier"),
        ({"unrolled": True, "precision": "bf16"}, "fp32"),
    ],
)
def test_settings_that_cannot_be_searched_with_are_named(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(DatasetError, match=word) as caught:
        with_search(tiny_search_recipe(tmp_path), **changes)
    assert caught.value.code == "recipe-invalid"


def test_a_search_that_diverges_ends_with_one_error_and_a_sound_checkpoint(tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    with pytest.raises(DatasetError) as caught:
        search_tiny(tmp_path, learning_rate=1e30, rate_warmup_steps=0, checkpoint_every=1, warmup=0.9)
    assert caught.value.code == "training-diverged"
    digest = read_search_config(tmp_path / "run").digest()
    network = load_checkpoint(tmp_path / "run" / "checkpoint.pt", digest)["network"]
    assert all(tensor.isfinite().all() for tensor in network.values())


def test_an_overflow_in_one_process_is_seen_by_all() -> None:
    """Two processes with a gradient each, of which one overflows in fp16: both must skip the step."""
    finite, infinite = torch.ones(2), torch.full((2,), torch.inf)
    for own, other in ((finite, infinite), (infinite, finite)):
        weight = torch.zeros(2, requires_grad=True)
        optimiser = torch.optim.SGD([weight], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)

        def average(gradients: Sequence[Tensor], other: Tensor = other) -> None:
            for gradient in gradients:
                gradient.add_(other).div_(2)

        gradient = own.clone()
        weights_step(
            lambda w=weight, g=gradient: _WithGradient.apply(w, g),  # type: ignore[misc,no-untyped-call]
            optimiser,
            [],
            scaler=scaler,
            average=average,
            clip_norm=1e9,
        )
        assert torch.equal(weight.detach(), torch.zeros(2))
        assert scaler.get_scale() == 0.5


class _WithGradient(torch.autograd.Function):
    """A loss of zero with a gradient that is told."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient * scale, None


@pytest.mark.parametrize("smoothing", [False, True])
def test_the_default_losses_move_an_architecture(tmp_path: Path, smoothing: bool) -> None:
    """Measured memory and exact entropies: the first figures are those of the untouched architecture, in both forms."""
    write_task(tmp_path / "task")
    recipe = tiny_search_recipe(tmp_path, memory="measured", smoothing=smoothing, warmup=0.0)
    moved = read_architecture(search_tiny(tmp_path, memory="measured", smoothing=smoothing, warmup=0.0))
    torch.manual_seed(3)
    space = SearchSpace(2, 2)
    before = Supernet(space, in_channels=1, num_classes=3, channel_multiplier=0.125).architecture
    first = read_metrics(tmp_path / "run")[0]
    assert first["L_eta"] == pytest.approx(pattern_entropy(before, reference=smoothing).item(), rel=1e-5)
    assert first["L_tp"] == pytest.approx(topology_loss(before, reference=smoothing).item(), rel=1e-5)
    assert first["usage"] == pytest.approx(
        memory_usage(before, memory_table(search_setting(recipe)), form="measured").item(), rel=1e-5
    )
    assert pattern_entropy(before).item() != pytest.approx(pattern_entropy(before, reference=True).item(), rel=1e-5)
    assert not torch.equal(moved.alpha_c, before.alpha_c)
    assert not torch.equal(moved.alpha_a, before.alpha_a)


def drawn(seed: int = 0) -> ArchitectureParameters:
    parameters = ArchitectureParameters(SearchSpace(3, 2), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for alpha in parameters.parameters():
            alpha.add_(torch.randn(alpha.shape, generator=torch.Generator().manual_seed(seed)))
    return parameters


@pytest.mark.parametrize("joint", [False, True])
def test_a_budget_is_kept_and_told(tmp_path: Path, joint: bool) -> None:
    recipe, parameters = tiny_search_recipe(tmp_path), drawn()
    table = work_table(deployed_setting(recipe, parameters.space))
    free = table.of(choose(parameters, Choice(), recipe).genotype)
    chosen = choose(parameters, Choice(max_gmac=0.9 * free, joint=joint), recipe)
    assert chosen.predicted == pytest.approx(table.of(chosen.genotype))
    assert 0 < chosen.predicted <= chosen.limit == 0.9 * free
    with pytest.raises(DatasetError) as caught:
        choose(parameters, Choice(max_gmac=1e-9 * free), recipe)
    assert caught.value.code == "genotype-invalid"


@pytest.mark.parametrize("joint", [False, True])
def test_a_budget_that_is_too_small_names_one_that_suffices_in_the_users_unit(tmp_path: Path, joint: bool) -> None:
    recipe, parameters = tiny_search_recipe(tmp_path), drawn()
    limit = 1e-6
    for _ in range(2):  # the least a network takes, then what is enough with the grid's rounding
        with pytest.raises(DatasetError, match="MiB: give a greater budget") as caught:
            choose(parameters, Choice(max_memory=limit, joint=joint), recipe)
        limit = float(re.findall(r"at least ([^,]+),", caught.value.message)[0]) * (1 + 1e-5)
    chosen = choose(parameters, Choice(max_memory=limit, joint=joint), recipe)
    assert chosen.predicted <= limit < 100


@pytest.mark.parametrize(
    "wish",
    [
        {"decoder": "best"},
        {"max_gmac": 1.0, "max_memory": 1.0},
        {"max_latency": 0.0},
        {"max_gmac": math.nan},
        {"max_memory": math.inf},
        {"max_gmac": 1.0, "decoder": "darts"},
        {"joint": True},
    ],
)
def test_a_contradictory_wish_is_refused(wish: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DintsError) as caught:
        check_choice(Choice(**wish), tiny_search_recipe(tmp_path))
    assert caught.value.code == "usage"


def test_a_budget_below_every_network_is_refused_before_the_search_and_one_that_fits_is_not(tmp_path: Path) -> None:
    recipe, space = tiny_search_recipe(tmp_path), SearchSpace(2, 2)
    assert (recipe.search.num_blocks, recipe.search.num_depths) == (2, 2)
    cost = work_table(deployed_setting(recipe, space))
    operations = cost.cells.argmin(axis=1)
    rows = itertools.product(*[[row for row in itertools.product((0, 1), repeat=4) if any(row)]] * 2)
    feasible = (g for active in rows if (g := one_with(np.array(active), operations)) is not None)
    least = min(cost.of(genotype) for genotype in feasible)
    assert least_cost(space, cost) == pytest.approx(least)
    with pytest.raises(DatasetError, match=f"at least {least:.6g}"):
        check_choice(Choice(max_gmac=0.99 * least), recipe)
    check_choice(Choice(max_gmac=1.01 * least, joint=True), recipe)


def one_with(active: NDArray[np.int64], operations: NDArray[np.int64]) -> Genotype | None:
    """Return the network of these edges (L, E), None where a node is left without an entry or an exit."""
    space = SearchSpace(2, 2)
    for before, after in itertools.pairwise(active):
        entered = {space.edges[e].out_level for e in np.flatnonzero(before)}
        left = {space.edges[e].in_level for e in np.flatnonzero(after)}
        if entered != left:
            return None
    return build_genotype(active, np.broadcast_to(operations, active.shape), source="by hand")
