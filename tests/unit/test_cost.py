"""The sum of the pieces' costs is what the whole network costs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dints_search.cost import (
    CostTable,
    Setting,
    count_saved,
    count_work,
    latency_table,
    memory_table,
    reference_memory,
    tabulate,
    time_forward,
    time_in_turn,
    work_table,
)
from dints_search.genotype import Genotype
from dints_search.network import DiNTSNetwork, count_gmac
from dints_search.operations import ActConvNorm, Cell
from dints_search.space import SearchSpace, sample_genotype

SPACE = SearchSpace(num_blocks=3, num_depths=3)
SETTING = Setting(SPACE, (16, 32, 16), in_channels=2, num_classes=3, channel_multiplier=1 / 8, batch=2)
GENOTYPES = [sample_genotype(SPACE, random.Random(seed)) for seed in range(6)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def memory() -> CostTable:
    return memory_table(SETTING)


@pytest.fixture(scope="module")
def work() -> CostTable:
    return work_table(SETTING)


def network(genotype: Genotype) -> DiNTSNetwork:
    return DiNTSNetwork(genotype, in_channels=2, num_classes=3, channel_multiplier=1 / 8)


@pytest.mark.parametrize("genotype", GENOTYPES)
def test_the_predicted_work_is_that_of_the_network(genotype: Genotype, work: CostTable) -> None:
    assert work.of(genotype) == pytest.approx(2 * count_gmac(network(genotype), SETTING.size), rel=1e-12)


def test_the_predicted_work_and_memory_hold_the_direct_skip() -> None:
    genotype, setting = GENOTYPES[0].model_copy(update={"direct_skip": True}), replace(SETTING, direct_skip=True)
    built = network(genotype)
    assert work_table(setting).of(genotype) == pytest.approx(2 * count_gmac(built, SETTING.size), rel=1e-12)
    scan = 2 * 2 * 16 * 32 * 16 * 4  # bytes; the finest input stem keeps it too, which the sum cannot know
    assert 0 <= memory_table(setting).of(genotype) - count_saved(built, (2, 2, 16, 32, 16)) <= scan


@pytest.mark.parametrize("genotype", GENOTYPES)
def test_the_predicted_memory_is_what_autograd_keeps_in_a_real_step(genotype: Genotype, memory: CostTable) -> None:
    shape = (2, 2, *SETTING.size)
    assert memory.of(genotype) == count_saved(network(genotype), shape)


def test_the_predicted_memory_in_bf16_is_that_of_a_step_under_autocast() -> None:
    genotype = GENOTYPES[0]
    model, predicted = network(genotype), memory_table(SETTING, dtype=torch.bfloat16).of(genotype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = count_saved(model, (2, 2, *SETTING.size))
    weights = sum(2 * p.numel() for p in model.parameters() if p.dim() == 5)  # autocast keeps copies of the weights
    assert predicted == pytest.approx(kept - weights, rel=0.1)


def test_any_count_that_adds_up_can_be_tabulated() -> None:
    table = tabulate(SETTING, lambda module, shape: float(sum(p.numel() for p in module.parameters())))
    for genotype in GENOTYPES:
        assert table.of(genotype) == sum(p.numel() for p in network(genotype).parameters())


def test_a_units_memory_is_the_relu_and_the_convolution_with_the_norms_statistics() -> None:
    values = 2 * 4 * 6 * 6 * 6
    found = count_saved(ActConvNorm(4, 4, 3), (2, 4, 6, 6, 6))
    statistics_and_scales = 4 * (2 * 4) * 4  # mean, deviation, weight and bias for every (scan, channel), 4 bytes each
    assert 4 * 2 * values <= found <= 4 * 2 * values + statistics_and_scales


def test_a_bare_skip_costs_nothing() -> None:
    skip = Cell(4, 4, kind="keep", operation="skip", up="reference")
    assert count_saved(skip, (1, 4, 4, 4, 4)) == 0
    assert count_work(skip.to("meta"), (1, 4, 4, 4, 4)) == 0


def test_the_whole_space_is_every_edge_at_its_mean_operation(work: CostTable) -> None:
    expected = work.head + work.stems_in.sum() + work.stems_out.sum() + 3 * work.cells.sum() / 5
    assert work.whole(3) == pytest.approx(expected)


def test_cached_figures_are_not_measured_again_but_those_of_another_setting_are() -> None:
    cache: dict[str, float] = {}
    measured: list[nn.Module] = []

    def measure(module: nn.Module, shape: tuple[int, ...]) -> float:
        measured.append(module)
        return float(len(measured) + len(shape))

    first = tabulate(SETTING, measure, cache=cache)
    pieces = 7 * 5 + 3 + 3 + 1
    assert len(measured) == len(cache) == pieces
    again = tabulate(SETTING, measure, cache=cache)
    assert (again.cells == first.cells).all()
    assert len(measured) == pieces
    tabulate(SETTING, measure, cache=cache, machine="another: ")
    larger = Setting(SPACE, (32, 32, 16), in_channels=2, num_classes=3, channel_multiplier=1 / 8, batch=2)
    tabulate(larger, measure, cache=cache)
    assert len(measured) == 3 * pieces


class Clocked(nn.Module):
    """A module whose pass takes the seconds it is told, on a clock of its own."""

    def __init__(self, clock: list[float], seconds: list[float]) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def __deepcopy__(self, memo: object) -> Clocked:
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.clock[0] += self.seconds.pop(0)
        return x


def test_the_time_is_the_least_without_the_first_pass() -> None:
    clock = [0.0]
    module = Clocked(clock, [1.0, 100.0, 50.0, 2.0])
    assert time_forward(module, (1, 1, 2, 2, 2), repeats=3, clock=lambda: clock[0]) == 2.0


def test_pieces_are_timed_in_turn_each_with_its_own_time() -> None:
    clock = [0.0]
    pieces = [Clocked(clock, [9.0, 3.0, 4.0]), Clocked(clock, [9.0, 7.0, 5.0])]
    shape = (1, 1, 2, 2, 2)
    found = time_in_turn([(piece, shape) for piece in pieces], repeats=2, clock=lambda: clock[0])
    assert found == [3.0, 5.0]


def test_every_piece_takes_time_on_this_machine() -> None:
    cache: dict[str, float] = {}
    table = latency_table(SETTING, repeats=1, cache=cache)
    assert (table.cells[:, 1:] > 0).all()
    assert table.of(GENOTYPES[0]) > 0
    assert latency_table(SETTING, cache=cache).of(GENOTYPES[0]) == table.of(GENOTYPES[0])


def test_the_reference_estimates_are_the_published_factors() -> None:
    table = reference_memory(Setting(SearchSpace(), (32, 32, 32), in_channels=1, num_classes=2))
    voxels = [32 * 32**3, 64 * 16**3, 128 * 8**3, 256 * 4**3]
    for e, edge in enumerate(SearchSpace().edges):
        factors = {"keep": (0, 3, 4, 4, 4), "up": (6, 9, 10, 10, 10), "down": (7, 10, 11, 11, 11)}[edge.kind]
        assert table.cells[e].tolist() == [voxels[edge.out_level] * (1 + factor) for factor in factors]
