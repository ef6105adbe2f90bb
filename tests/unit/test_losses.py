"""The architecture losses are MONAI's in their reference form, and what enumeration gives in their exact form."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from dints_search.cost import CostTable, Setting, reference_memory
from dints_search.genotype import edges
from dints_search.losses import (
    ArchitectureLoss,
    MemoryForm,
    architecture_loss,
    memory_usage,
    operation_entropy,
    pattern_entropy,
    topology_loss,
)
from dints_search.space import ArchitectureParameters, SearchSpace
from tests.monai_oracle import Losses, copy_alphas, monai_losses, monai_space, parameters_at

PAPER = SearchSpace(12, 4)
SMALL = SearchSpace(4, 3)
SIZE = (96, 64, 32)
WIDTH = 1 / 8


def reference_cost(space: SearchSpace) -> CostTable:
    return reference_memory(Setting(space, SIZE, in_channels=1, num_classes=2, channel_multiplier=WIDTH))


def made_up_cost(space: SearchSpace) -> CostTable:
    rng = np.random.default_rng(0)
    e, d = space.num_edges, space.num_depths
    return CostTable(rng.uniform(1, 9, (e, 5)), rng.uniform(1, 9, d), rng.uniform(1, 9, d), 3.0)


def gradients(loss: Tensor, *alphas: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, alphas, retain_graph=True, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0, 5.0])
@pytest.mark.parametrize("space", [PAPER, SMALL], ids=["paper", "small"])
def test_the_reference_losses_and_gradients_are_those_of_monai(space: SearchSpace, scale: float) -> None:
    parameters = parameters_at(space, scale, seed=3)
    oracle = monai_space(space, channel_multiplier=WIDTH)
    copy_alphas(parameters, oracle)
    expected = monai_losses(oracle, SIZE)
    found = Losses(
        operation_entropy(parameters),
        pattern_entropy(parameters, reference=True),
        topology_loss(parameters, reference=True),
        memory_usage(parameters, reference_cost(space), form="reference"),
    )
    for name in (field.name for field in fields(Losses)):
        ours, theirs = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
        slopes = gradients(ours, parameters.alpha_c, parameters.alpha_a)
        references = gradients(theirs, oracle.log_alpha_c, oracle.log_alpha_a)
        for slope, reference in zip(slopes, references, strict=True):
            torch.testing.assert_close(slope, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()) + 1e-300)


def brute_force(parameters: ArchitectureParameters) -> tuple[list[tuple[int, ...]], Tensor]:
    """Return the patterns and their probabilities (L, M)."""
    patterns = [p for p in itertools.product((0, 1), repeat=parameters.space.num_edges) if any(p)]
    eta = torch.tensor(patterns, dtype=torch.float64)
    p = torch.sigmoid(parameters.alpha_a)[:, None]
    products = (eta * p + (1 - eta) * (1 - p)).prod(-1)
    return patterns, products / products.sum(-1, keepdim=True)


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_the_exact_losses_are_sums_over_patterns(scale: float) -> None:
    parameters = parameters_at(SMALL, scale)
    patterns, probability = brute_force(parameters)
    entropy = -(probability * probability.log()).mean()
    torch.testing.assert_close(pattern_entropy(parameters), entropy, rtol=1e-10, atol=0)
    table = edges(SMALL.num_depths)
    expected = torch.zeros((), dtype=torch.float64)
    for block in range(SMALL.num_blocks - 1):
        for count in range(1, 2**SMALL.num_depths):
            nodes = {d for d in range(SMALL.num_depths) if count >> d & 1}
            used = [[edge for edge, on in zip(table, p, strict=True) if on] for p in patterns]
            ends = [[{edge[side] for edge in pattern} for pattern in used] for side in (0, 1)]
            left, entered = (torch.tensor([float(levels == nodes) for levels in side]).double() for side in ends)
            p, q = probability[block] @ entered, probability[block + 1] @ left
            expected = expected - p * q.log() - (1 - p) * torch.log1p(-q)
    torch.testing.assert_close(topology_loss(parameters), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("form", ["reference", "measured"])
def test_the_memory_usage_is_the_mean_cost_of_networks_over_that_of_the_whole_space(form: MemoryForm) -> None:
    space = SearchSpace(3, 2)
    parameters, cost = parameters_at(space, 2.0), made_up_cost(space)
    patterns, probability = brute_force(parameters)
    weights = parameters.operation_weights()
    cells = (weights * torch.tensor(cost.cells)).sum(-1)
    on = probability @ torch.tensor(patterns, dtype=torch.float64)
    expected, whole = (on * cells).sum(), cells.sum()
    if form == "measured":
        whole = torch.tensor(3 * cost.cells.mean(1).sum() + cost.stems_in.sum() + cost.stems_out.sum() + cost.head)
        expected = expected + cost.head
        for p, first, last in zip(patterns, probability[0], probability[-1], strict=True):
            entered = max(edge.out_level for edge, used in zip(space.edges, p, strict=True) if used)
            left = {edge.in_level for edge, used in zip(space.edges, p, strict=True) if used}
            expected = expected + last * cost.stems_out[: entered + 1].sum() + first * cost.stems_in[list(left)].sum()
    torch.testing.assert_close(memory_usage(parameters, cost, form=form), expected / whole, rtol=1e-10, atol=0)


def test_only_the_reference_form_has_a_normaliser_that_moves_with_the_operations() -> None:
    parameters, cost = parameters_at(SMALL, 0.0), made_up_cost(SMALL)
    bare = CostTable(cost.cells, 0 * cost.stems_in, 0 * cost.stems_out, 0.0)
    before = [memory_usage(parameters, bare, form=form).item() for form in ("reference", "measured")]
    assert before[0] == pytest.approx(before[1])
    with torch.no_grad():
        cheapest = torch.tensor(bare.cells.argmin(1))  # (E,)
        parameters.alpha_c.copy_(9.0 * torch.nn.functional.one_hot(cheapest, 5))
    after = [memory_usage(parameters, bare, form=form).item() for form in ("reference", "measured")]
    share = bare.cells.min(1).sum() / bare.cells.mean(1).sum()
    assert after[0] == pytest.approx(before[0], rel=1e-3)
    assert after[1] == pytest.approx(before[1] * share, rel=1e-2)


LOSSES: list[Callable[[ArchitectureParameters], Tensor]] = [
    operation_entropy,
    pattern_entropy,
    topology_loss,
    lambda parameters: memory_usage(parameters, made_up_cost(parameters.space), form="measured"),
    lambda parameters: memory_usage(parameters, made_up_cost(parameters.space), form="reference"),
]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradients_are_the_finite_differences(loss: Callable[[ArchitectureParameters], Tensor]) -> None:
    parameters = parameters_at(SearchSpace(3, 2), 1.0)
    slopes = gradients(loss(parameters), parameters.alpha_c, parameters.alpha_a)
    step = 1e-5
    for alpha, slope in zip((parameters.alpha_c, parameters.alpha_a), slopes, strict=True):
        differences = torch.zeros_like(slope)
        with torch.no_grad():
            for index in itertools.product(*(range(n) for n in alpha.shape)):
                values = []
                for sign in (1, -1):
                    alpha[index] += sign * step
                    values.append(loss(parameters))
                    alpha[index] -= sign * step
                differences[index] = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(slope, differences, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["low", "high", "mixed"])
def test_everything_is_finite_at_fifty(case: str, dtype: torch.dtype) -> None:
    parameters = parameters_at(PAPER, 1.0).to(dtype)
    with torch.no_grad():
        for alpha in (parameters.alpha_c, parameters.alpha_a):
            alpha.copy_({"low": torch.tensor(-50.0), "high": torch.tensor(50.0), "mixed": 50 * alpha.sign()}[case])
    for form in ("reference", "measured"):
        loss = total(parameters, form=form)
        assert all(torch.isfinite(getattr(loss, field.name)) for field in fields(loss))
        assert all(torch.isfinite(g).all() for g in gradients(loss.total, parameters.alpha_c, parameters.alpha_a))
    if case == "low":  # one edge of ten is on, each as likely
        torch.testing.assert_close(loss.patterns * 1023, torch.tensor(10, dtype=dtype).log(), rtol=1e-4, atol=0)


def total(
    parameters: ArchitectureParameters, *, progress: float = 1.0, sigma: float = 0.5, form: MemoryForm = "measured"
) -> ArchitectureLoss:
    segmentation = torch.tensor(0.7, dtype=parameters.alpha_a.dtype)
    cost = made_up_cost(parameters.space)
    return architecture_loss(parameters, segmentation, progress=progress, sigma=sigma, cost=cost, form=form)


def test_the_total_ramps_up_everything_but_the_segmentation_loss() -> None:
    parameters = parameters_at(SMALL, 1.0)
    start, middle, end = (total(parameters, progress=t) for t in (0.0, 0.25, 1.0))
    rest = end.operations + end.patterns + 0.001 * end.topology + (end.usage - 0.5).abs()
    assert start.total.item() == pytest.approx(0.7)
    assert middle.total.item() == pytest.approx(0.7 + 0.25 * rest.item())
    assert end.total.item() == pytest.approx(0.7 + rest.item())


@pytest.mark.parametrize(("progress", "sigma"), [(-0.1, 0.5), (1.1, 0.5), (0.5, 0.0), (0.5, 1.5)])
def test_a_ramp_or_a_share_out_of_range_is_refused(progress: float, sigma: float) -> None:
    with pytest.raises(ValueError, match=r"expected progress in \[0, 1\] and sigma in \(0, 1\]"):
        total(parameters_at(SMALL, 1.0), progress=progress, sigma=sigma)


def test_the_losses_at_the_start_are_the_published_ones() -> None:
    parameters = parameters_at(PAPER, 0.0)
    assert pattern_entropy(parameters, reference=True).item() == pytest.approx(0.00676, rel=2e-3)
    assert operation_entropy(parameters).item() == pytest.approx(0.3219, rel=1e-3)
    assert topology_loss(parameters, reference=True).item() == pytest.approx(30.07, rel=1e-3)
    assert memory_usage(parameters, reference_cost(PAPER), form="reference").item() == pytest.approx(0.5, abs=1e-3)
