"""The supernet computes what MONAI's search network computes, with less, and hands its weights on."""

from __future__ import annotations

import contextlib
import io
import random
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from monai.networks.nets import DiNTS
from torch import Tensor, nn

from dints_search.convolve import convolve
from dints_search.cost import count_saved
from dints_search.genotype import OPERATIONS, edges
from dints_search.network import DiNTSNetwork
from dints_search.space import SearchSpace, sample_genotype
from dints_search.supernet import Supernet, UpOrder
from tests.monai_oracle import monai_space

SPACE = SearchSpace(num_blocks=3, num_depths=3)
WIDTH = 1 / 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Draw every weight, the norms' and the architecture's too, so that a swapped or missing one changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            values = torch.randn(p.shape, generator=generator)
            p.copy_(values / p[0].numel() ** 0.5 if p.dim() == 5 else 0.5 + values.abs() if p.dim() == 1 else values)


def supernet(space: SearchSpace = SPACE, *, checkpointing: bool = False) -> Supernet:
    network = Supernet(space, in_channels=2, num_classes=3, channel_multiplier=WIDTH, checkpointing=checkpointing)
    randomise(network)
    return network


def monai_network(space: SearchSpace = SPACE) -> nn.Module:
    with contextlib.redirect_stdout(io.StringIO()):
        network: nn.Module = DiNTS(monai_space(space, channel_multiplier=WIDTH), 2, 3, use_downsample=True)
    randomise(network)
    return network


def scan(batch: int = 1, size: tuple[int, int, int] = (16, 32, 16)) -> Tensor:
    return torch.randn((batch, 2, *size), generator=torch.Generator().manual_seed(1))


STEMS = {
    "stem_down": {"1": "conv_first", "2": "norm_first", "4": "conv_second", "5": "norm_second"},
    "stem_up": {"1": "unit.conv", "2": "unit.norm"},
    "stem_finals": {"0.conv": "unit.conv", "0.norm": "unit.norm", "1": "classify"},
}


def our_name(name: str, space: SearchSpace) -> str:
    """Return our name of a parameter of MONAI's search network."""
    if found := re.fullmatch(r"(stem_down|stem_up)\.(\d)\.mod\.(\d)\.(\w+)", name):
        stem, level, part, kind = found.groups()
        return f"{'stems_in' if stem == 'stem_down' else 'stems_out'}.level{level}.{STEMS[stem][part]}.{kind}"
    if found := re.fullmatch(r"stem_finals\.(.+)\.(\w+)", name):
        return f"head.{STEMS['stem_finals'][found[1]]}.{found[2]}"
    if found := re.fullmatch(r"dints_space\.log_(alpha_[ac])", name):
        return f"architecture.{found[1]}"
    found = re.fullmatch(r"dints_space\.cell_tree\.\((\d+), (\d+)\)\.(preprocess|op\.ops\.(\d))\.(\w+)\.(\w+)", name)
    assert found is not None, name
    block, edge, _, operation, part, kind = found.groups()
    cell = f"cells.block{block}_edge{edge}"
    if operation is None:
        part = {"conv_1": "conv_even", "conv_2": "conv_odd"}.get(part, part)
        up = edges(space.num_depths)[int(edge)].kind == "up"
        return f"{cell}.resample.{'unit.' if up else ''}{part}.{kind}"
    chosen = OPERATIONS[int(operation)]
    if chosen.startswith("p3d"):
        part = {"conv": "conv_plane", "conv_1": "conv_line"}.get(part, part)
    return f"{cell}.operations.{chosen}.{part}.{kind}"


@pytest.mark.parametrize(
    ("space", "batch", "size", "dtype", "tolerance"),
    [
        pytest.param(SPACE, 1, (16, 32, 16), torch.float64, 1e-8, id="one scan, double"),
        pytest.param(SPACE, 2, (16, 32, 16), torch.float64, 1e-8, id="two scans, double"),
        pytest.param(SPACE, 2, (16, 16, 24), torch.float32, 1e-4, id="two scans, single"),
        pytest.param(SearchSpace(2, 4), 1, (32, 32, 16), torch.float64, 1e-8, id="four levels, double"),
        pytest.param(SearchSpace(1, 2), 1, (8, 8, 8), torch.float64, 1e-8, id="one block of two levels, double"),
    ],
)
def test_logits_and_gradients_are_those_of_monai(
    space: SearchSpace, batch: int, size: tuple[int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    theirs = monai_network(space).to(dtype)
    ours = supernet(space).to(dtype)
    ours.load_state_dict({our_name(name, space): value for name, value in theirs.state_dict().items()})
    x = scan(batch, size).to(dtype)
    target = torch.randn((batch, 3, *size), generator=torch.Generator().manual_seed(2)).to(dtype)
    logits = []
    for network in (theirs, ours):
        logits.append(network(x))
        (logits[-1] - target).square().mean().backward()
    assert logits[0].std() > 0.1
    torch.testing.assert_close(logits[1], logits[0], rtol=tolerance, atol=tolerance)
    found = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        expected, gradient = p.grad, found.pop(our_name(name, space)).grad
        assert expected is not None, name
        assert gradient is not None, name
        assert torch.linalg.vector_norm(gradient - expected) <= tolerance * torch.linalg.vector_norm(expected), name
    assert found == {}


def test_weights_and_architecture_share_no_parameter_and_leave_none_out() -> None:
    network = supernet()
    weights, architecture = network.weights(), list(network.architecture.parameters())
    assert len(weights) + len(architecture) == len(list(network.parameters()))
    assert {id(p) for p in weights}.isdisjoint(id(p) for p in architecture)
    assert sum(p.numel() for p in architecture) == 3 * 7 * 6


def test_checkpointing_gives_the_same_gradients_and_keeps_less() -> None:
    gradients, kept = [], []
    for checkpointing in (False, True):
        network = supernet(checkpointing=checkpointing).train()
        network(scan()).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
        kept.append(count_saved(network, (1, 2, 16, 32, 16)))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert kept[1] < 0.5 * kept[0]


def test_a_search_step_keeps_two_thirds_of_what_it_keeps_for_monai() -> None:
    kept: dict[str, list[float]] = {"ours": [], "theirs": []}
    networks = {"ours": supernet().train(), "theirs": monai_network().train()}
    for learned in ("weights", "alpha"):
        for who, network in networks.items():
            for name, p in network.named_parameters():
                p.requires_grad_(("alpha" in name) == (learned == "alpha"))
            kept[who].append(count_saved(network, (1, 2, 32, 32, 32)))
    assert kept["ours"][0] < 0.85 * kept["theirs"][0]
    assert max(kept["ours"]) < 0.67 * max(kept["theirs"])


def test_small_single_scans_are_convolved_without_the_slow_path_with_the_same_result() -> None:
    network, x = supernet(), scan()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        found = network(x)
    slow = [event.input_shapes[:2] for event in profile.events() if event.name == "aten::slow_conv3d_forward"]
    cells = [(features, kernel) for features, kernel in slow if kernel[0] == kernel[1]]
    assert all(np.prod(kernel) > 2 * np.prod(features) for features, kernel in cells)
    torch.testing.assert_close(found, network.double()(x.double()).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kernel", [(3, 3, 3), (3, 3, 1), (3, 1, 3), (1, 3, 3), (3, 1, 1), (1, 3, 1), (1, 1, 3), (1, 1, 1)]
)
@pytest.mark.parametrize("shape", [(1, 4, 6, 4, 8), (2, 4, 6, 4, 8), (1, 3, 3, 4, 5), (1, 1, 8, 8, 8)])
def test_every_form_of_a_convolution_is_the_convolution(kernel: tuple[int, ...], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(5, shape[1], *kernel)
    expected = nn.functional.conv3d(x.double(), weight.double(), padding=[n // 2 for n in kernel])
    torch.testing.assert_close(convolve(weight, x).double(), expected, rtol=1e-4, atol=1e-4)


def test_mixed_precision_stays_close_to_single_precision() -> None:
    network, x = supernet(SearchSpace(2, 3)), scan(size=(32, 16, 16))
    logits, gradients = [], []
    for enabled in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits.append(network(x).float())
        logits[-1].square().mean().backward()
        assert network.architecture.alpha_a.grad is not None
        gradients.append(network.architecture.alpha_a.grad.clone())
    assert not torch.equal(logits[0], logits[1])
    assert torch.linalg.vector_norm(logits[1] - logits[0]) < 0.1 * torch.linalg.vector_norm(logits[0])
    assert torch.linalg.vector_norm(gradients[1] - gradients[0]) < 0.3 * torch.linalg.vector_norm(gradients[0])


@pytest.mark.parametrize("up", ["reference", "conv_first"])
@pytest.mark.parametrize("seed", range(2))
def test_a_supernet_that_is_sure_computes_the_network_that_inherits_its_weights(seed: int, up: UpOrder) -> None:
    space, rng = SearchSpace(2, 3), random.Random(seed)
    genotype = next(g for g in iter(lambda: sample_genotype(space, rng), None) if g.node_active[-1][-1])
    genotype = genotype.model_copy(update={"up": up})
    network = Supernet(space, in_channels=2, num_classes=3, channel_multiplier=WIDTH, up=up)
    randomise(network)
    inherited = network.inherit(genotype).eval()
    assert isinstance(inherited, DiNTSNetwork)
    with torch.no_grad():
        active = torch.tensor(genotype.edge_active)
        network.architecture.alpha_a.copy_(torch.where(active > 0, 50.0, -50.0))
        operations = nn.functional.one_hot(torch.tensor(genotype.edge_operation), len(OPERATIONS))
        network.architecture.alpha_c.copy_(50.0 * operations)
        expected = inherited(scan())
        torch.testing.assert_close(network(scan()), expected, rtol=1e-3, atol=1e-3)
        for p in network.weights():
            p.add_(1.0)
        assert torch.equal(inherited(scan()), expected)


@pytest.mark.parametrize("shape", [(1, 2, 16, 16), (1, 1, 16, 16, 16), (1, 2, 16, 12, 16), (1, 2, 0, 16, 16)])
def test_a_scan_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a scan \(N, 2, I, J, K\) of multiples of 8, found"):
        supernet()(torch.zeros(shape))
