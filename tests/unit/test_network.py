"""The network computes what MONAI's DiNTS computes, has the published size, and survives every way out of Python."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from monai.networks.nets import DiNTS, TopologyInstance
from torch import Tensor, nn
from torch.nn import functional

from dints_search.genotype import OPERATIONS, Genotype, edges, parse_genotype, read_genotype
from dints_search.network import DiNTSNetwork, channel_counts, count_gmac, count_parameters
from dints_search.operations import FactorizedIncrease, FactorizedReduce, resize

ZOO = Path(__file__).parents[2] / "zoo"
CVPR = read_genotype(ZOO / "dints-cvpr2021-pancreas" / "genotype.json")
TUTORIAL = read_genotype(ZOO / "dints-tutorial-sigma0.2" / "genotype.json")

Weights = dict[str, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: on a busy machine two that wait for each other take many times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_genotype(seed: int, *, depths: int, blocks: int, up: str = "reference") -> Genotype:
    """Return a feasible genotype: from each active node, some edges lead on; the nodes they enter are active."""
    rng = random.Random(seed)
    table = edges(depths)
    nodes = [set(rng.sample(range(depths), rng.randint(1, depths)))]
    active = []
    for _ in range(blocks):
        used: set[int] = set()
        for level in sorted(nodes[-1]):
            leaving = [e for e, edge in enumerate(table) if edge.in_level == level]
            used.update(rng.sample(leaving, rng.randint(1, len(leaving))))
        active.append([int(e in used) for e in range(len(table))])
        nodes.append({table[e].out_level for e in used})
    return parse_genotype(
        json.dumps(
            {
                "schema_version": 1,
                "num_blocks": blocks,
                "num_depths": depths,
                "up": up,
                "operations": OPERATIONS,
                "edge_in_level": [edge.in_level for edge in table],
                "edge_out_level": [edge.out_level for edge in table],
                "node_active": [[int(level in row) for level in range(depths)] for row in nodes],
                "edge_active": active,
                "edge_operation": [[rng.randrange(len(OPERATIONS)) for _ in table] for _ in active],
            }
        )
    )


def randomise(network: nn.Module, seed: int = 0) -> None:
    """Draw every weight, the norms' too, so that a swapped or missing one changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            values = torch.randn(p.shape, generator=generator)
            p.copy_(0.5 + values.abs() if p.dim() == 1 else values / p[0].numel() ** 0.5)


def network_of(genotype: Genotype, *, width: float = 1 / 16, **options: bool) -> DiNTSNetwork:
    network = DiNTSNetwork(genotype, in_channels=2, num_classes=3, channel_multiplier=width, **options).eval()
    randomise(network)
    return network


def scan(*size: int, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randn((batch, 2, *size), generator=torch.Generator().manual_seed(seed))


def monai_network(genotype: Genotype, *, width: float, in_channels: int = 2) -> nn.Module:
    code = [np.array(genotype.edge_active), np.array(genotype.edge_operation)]
    space = TopologyInstance(
        code, channel_mul=width, num_blocks=genotype.num_blocks, num_depths=genotype.num_depths, use_downsample=True
    )
    nodes = torch.tensor(genotype.node_active)
    network: nn.Module = DiNTS(space, in_channels, 3, use_downsample=True, node_a=nodes)
    return network.eval()


def map_from_monai(weights: Weights, genotype: Genotype) -> Weights:
    """Rename the weights of MONAI's network to those of ours built with `compatible`."""
    return {_our_name(name, genotype): value for name, value in weights.items()}


STEMS = {
    "stem_down": {"1": "conv_first", "2": "norm_first", "4": "conv_second", "5": "norm_second"},
    "stem_up": {"1": "unit.conv", "2": "unit.norm"},
    "stem_finals": {"0.conv": "unit.conv", "0.norm": "unit.norm", "1": "classify"},
}


def _our_name(name: str, genotype: Genotype) -> str:
    if found := re.fullmatch(r"(stem_down|stem_up)\.(\d)\.mod\.(\d)\.(\w+)", name):
        stem, level, part, kind = found.groups()
        return f"{'stems_in' if stem == 'stem_down' else 'stems_out'}.level{level}.{STEMS[stem][part]}.{kind}"
    if found := re.fullmatch(r"stem_finals\.(.+)\.(\w+)", name):
        return f"head.{STEMS['stem_finals'][found[1]]}.{found[2]}"
    found = re.fullmatch(r"dints_space\.cell_tree\.\((\d+), (\d+)\)\.(preprocess|op\.ops\.0)\.(\w+)\.(\w+)", name)
    assert found is not None, name
    block, edge, stage, part, kind = found.groups()
    if stage == "preprocess":
        up = edges(genotype.num_depths)[int(edge)].kind == "up"
        ours = (
            "resample.unit." + part
            if up
            else "resample." + {"conv_1": "conv_even", "conv_2": "conv_odd"}.get(part, part)
        )
    else:
        planar = OPERATIONS[genotype.edge_operation[int(block)][int(edge)]].startswith("p3d")
        ours = "operation." + ({"conv": "conv_plane", "conv_1": "conv_line"}.get(part, part) if planar else part)
    return f"cells.block{block}_edge{edge}.{ours}.{kind}"


PARITY = [
    pytest.param(CVPR, 1 / 8, (32, 32, 48), id="cvpr"),
    pytest.param(CVPR, 0.15, (32, 32, 32), id="cvpr with odd channels: 4, 9, 19, 38, 76"),
    pytest.param(TUTORIAL, 1 / 8, (32, 48, 32), id="tutorial, whose finest level is idle until the last block"),
    pytest.param(random_genotype(1, depths=3, blocks=5), 1.0, (16, 24, 16), id="three levels at full width"),
    *(
        pytest.param(random_genotype(seed, depths=3, blocks=5), 1 / 8, (16, 16, 32), id=f"three levels, seed {seed}")
        for seed in range(2, 8)
    ),
    pytest.param(random_genotype(8, depths=2, blocks=1), 1 / 8, (8, 8, 12), id="two levels, one block"),
    pytest.param(random_genotype(9, depths=5, blocks=3), 1 / 16, (64, 32, 64), id="five levels"),
]


@pytest.mark.parametrize(("genotype", "width", "size"), PARITY)
def test_the_logits_are_those_of_monai(genotype: Genotype, width: float, size: tuple[int, int, int]) -> None:
    reference = monai_network(genotype, width=width)
    randomise(reference)
    ours = DiNTSNetwork(genotype, in_channels=2, num_classes=3, channel_multiplier=width, compatible=True).eval()
    ours.load_state_dict(map_from_monai(reference.state_dict(), genotype))
    x = scan(*size, batch=2)
    with torch.no_grad():
        expected, found = reference(x), ours(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("genotype", "compatible", "parameters", "gmac"),
    [
        (CVPR, True, 152_361_027, 334.38),
        (CVPR, False, 148_813_635, 333.61),
        (TUTORIAL, True, 154_813_379, 145.52),
    ],
)
def test_parameters_and_work_are_those_published(
    genotype: Genotype, compatible: bool, parameters: int, gmac: float
) -> None:
    with torch.device("meta"):
        network = DiNTSNetwork(genotype, in_channels=1, num_classes=3, compatible=compatible)
    assert count_parameters(network) == parameters
    assert round(count_gmac(network, (96, 96, 96)), 2) == gmac


def test_counting_work_leaves_the_network_as_it_was() -> None:
    network = network_of(random_genotype(1, depths=3, blocks=2))
    before = copy.deepcopy(network.state_dict())
    small, large = count_gmac(network, (16, 16, 16)), count_gmac(network, (32, 32, 32))
    assert large == pytest.approx(8 * small)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network(scan(16, 16, 16)).device.type == "cpu"


def test_the_channels_double_with_every_level_and_round_down() -> None:
    assert channel_counts(4, 1.0) == (32, 64, 128, 256, 512)
    assert channel_counts(4, 0.15) == (4, 9, 19, 38, 76)


def test_a_network_without_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a channel multiplier of at least 1/32, found 0\.03"):
        DiNTSNetwork(CVPR, in_channels=1, num_classes=2, channel_multiplier=0.03)


def test_dropping_the_inactive_stem_does_not_change_the_logits() -> None:
    full, static = network_of(CVPR, compatible=True), network_of(CVPR)
    dropped = full.state_dict().keys() - static.state_dict().keys()
    assert {name.rsplit(".", 2)[0] for name in dropped} == {"stems_in.level3"}
    static.load_state_dict({name: value for name, value in full.state_dict().items() if name not in dropped})
    x = scan(32, 32, 32)
    with torch.no_grad():
        assert torch.equal(full(x), static(x))


@pytest.mark.parametrize("genotype", [CVPR, TUTORIAL, random_genotype(3, depths=3, blocks=5, up="conv_first")])
def test_every_weight_of_the_static_network_learns(genotype: Genotype) -> None:
    network = network_of(genotype).train()
    logits = network(scan(32, 32, 32))
    functional.cross_entropy(logits, torch.arange(32**3).reshape(1, 32, 32, 32) % 3).backward()  # type: ignore[no-untyped-call]
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []


@pytest.mark.parametrize("order", ["reference", "conv_first"])
def test_the_two_orders_of_going_up_are_what_they_say(order: Literal["reference", "conv_first"]) -> None:
    def grow(y: Tensor) -> Tensor:
        return functional.interpolate(y, size=(6, 8, 10), mode="trilinear", align_corners=True)

    piece = FactorizedIncrease(4, 3, order=order)
    x = torch.randn((2, 4, 3, 4, 5), generator=torch.Generator().manual_seed(0))
    expected = {"reference": piece.unit(grow(x)), "conv_first": grow(piece.unit(x))}
    torch.testing.assert_close(piece(x), expected[order])
    assert not torch.allclose(expected["reference"], expected["conv_first"], atol=0.05)


def test_the_order_of_going_up_changes_the_work_but_not_the_weights() -> None:
    genotype = random_genotype(1, depths=3, blocks=5)
    reference, swift = network_of(genotype), network_of(genotype.model_copy(update={"up": "conv_first"}))
    swift.load_state_dict(reference.state_dict())
    x = scan(16, 16, 32)
    assert count_gmac(swift, (16, 16, 32)) < count_gmac(reference, (16, 16, 32))
    with torch.no_grad():
        assert not torch.allclose(reference(x), swift(x), atol=0.05)


def test_the_direct_skip_adds_the_scan_at_full_resolution_to_what_the_head_sees() -> None:
    genotype = random_genotype(3, depths=3, blocks=2)
    plain, skipped = network_of(genotype), network_of(genotype.model_copy(update={"direct_skip": True}))
    randomise(skipped)
    weights = skipped.state_dict()
    plain.load_state_dict({name: value for name, value in weights.items() if not name.startswith("direct")})
    x, seen = scan(16, 16, 32), []
    skipped.head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    plain.head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    skipped(x), plain(x)
    direct = functional.instance_norm(functional.conv3d(x, weights["direct.conv.weight"], padding=1))
    direct = direct * weights["direct.norm.weight"].view(-1, 1, 1, 1) + weights["direct.norm.bias"].view(-1, 1, 1, 1)
    torch.testing.assert_close(seen[0] - seen[1], direct, rtol=1e-4, atol=1e-4)


def test_a_reduction_sees_the_even_and_the_odd_voxels() -> None:
    piece = FactorizedReduce(1, 2)
    nn.init.ones_(piece.conv_even.weight)
    nn.init.ones_(piece.conv_odd.weight)
    x = torch.rand((1, 1, 4, 6, 8), generator=torch.Generator().manual_seed(0))
    voxels = torch.cat([x[..., ::2, ::2, ::2], x[..., 1::2, 1::2, 1::2]], dim=1)
    torch.testing.assert_close(piece(x), functional.instance_norm(voxels))


def test_resizing_keeps_the_corners_and_a_linear_ramp() -> None:
    i, j, k = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (4, 6, 8)), indexing="ij")
    ramp = (i + 2 * j - 3 * k)[None, None]
    for factor, sizes in ((2.0, (8, 12, 16)), (0.5, (2, 3, 4))):
        i, j, k = torch.meshgrid(*(torch.linspace(0, 1, n) for n in sizes), indexing="ij")
        torch.testing.assert_close(resize(ramp, factor), (i + 2 * j - 3 * k)[None, None], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 16, 16), r"expected a scan of shape \(N, 2, I, J, K\), found \(1, 2, 16, 16\)"),
        ((1, 1, 16, 16, 16), r"expected a scan of shape \(N, 2, I, J, K\), found \(1, 1, 16, 16, 16\)"),
        ((1, 2, 16, 20, 16), r"multiples of 8, at least one of them 16 or more, found \(16, 20, 16\): pad the scan"),
        ((1, 2, 8, 8, 8), r"multiples of 8, at least one of them 16 or more, found \(8, 8, 8\): pad the scan"),
        ((1, 2, 0, 16, 16), r"multiples of 8, .* found \(0, 16, 16\)"),
    ],
)
def test_a_scan_that_does_not_fit_is_refused_and_the_smallest_that_fits_runs(
    shape: tuple[int, ...], message: str
) -> None:
    network = network_of(random_genotype(1, depths=3, blocks=2)).train()
    assert torch.isfinite(network(scan(8, 16, 8))).all()
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(shape))


def test_copies_and_loaded_weights_give_the_same_logits() -> None:
    genotype = random_genotype(4, depths=3, blocks=4)
    network, x = network_of(genotype), scan(16, 16, 32)
    other = DiNTSNetwork(genotype, in_channels=2, num_classes=3, channel_multiplier=1 / 16).eval()
    copied = copy.deepcopy(network)
    with torch.no_grad():
        expected = network(x)
        assert not torch.allclose(other(x), expected)
        other.load_state_dict(network.state_dict())
        next(network.parameters()).zero_()
        assert torch.equal(copied(x), expected)
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_checkpointing_recomputes_the_cells_and_gives_the_same_gradients(dtype: torch.dtype, tolerance: float) -> None:
    # Not 16 along the first axis: torch 2.13's CPU kernel of bfloat16 weight gradients (oneDNN 3.12) reads memory that
    # nobody wrote where a 3-wide kernel meets a first axis of 2 voxels.
    genotype, size = random_genotype(5, depths=3, blocks=3), (32, 16, 16)
    gradients, calls = [], []
    for checkpointing in (False, True):
        network = network_of(genotype, checkpointing=checkpointing).train()
        counted: list[int] = []
        working = [cell for cell in network.cells.values() if list(cell.parameters())]
        for cell in working:
            cell.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = network(scan(*size))
        logits.float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
        calls.append(len(counted) / len(working))
    assert calls == [1, 2]
    assert torch.linalg.vector_norm(gradients[1] - gradients[0]) < tolerance * torch.linalg.vector_norm(gradients[0])
    assert gradients[0].numel() == count_parameters(network)


def test_a_compiled_network_is_one_graph_with_the_same_logits_and_gradients() -> None:
    network = network_of(random_genotype(11, depths=3, blocks=2)).train()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x, results = scan(16, 16, 16), []
    for run in (network, compiled):
        network.zero_grad()
        logits = run(x)
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in network.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def test_a_torch_export_has_the_same_logits_at_any_batch_size() -> None:
    network = network_of(random_genotype(7, depths=3, blocks=3))
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(network, (scan(16, 16, 16, batch=2),), dynamic_shapes=({0: batch},))
    x = scan(16, 16, 16, batch=3, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), network(x), rtol=0, atol=1e-4)


def run_onnxruntime(model: bytes, x: np.ndarray[Any, Any]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": x})[0]


def run_openvino(model: bytes, x: np.ndarray[Any, Any]) -> Any:
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    core = openvino.Core()
    return core.compile_model(core.read_model(model), "CPU", config)(x)[0]


# The exporter of torch 2.13 copies a tree specification with a class that torch 2.13 deprecates.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.parametrize("up", ["reference", "conv_first"])
def test_both_engines_run_the_onnx_export_and_agree_with_torch(up: str) -> None:
    genotype = random_genotype(11, depths=3, blocks=2, up=up)
    used = {edge.kind for edge, *on in zip(edges(3), *genotype.edge_active, strict=True) if any(on)}
    assert used == {"down", "keep", "up"}
    network = network_of(genotype)
    program = torch.onnx.export(
        network,
        (scan(16, 32, 16, batch=2),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},),
        input_names=["image"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    graph = program.model_proto.graph
    constants = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
    resizes = [node for node in graph.node if node.op_type == "Resize"]
    assert {node.domain for node in graph.node} == {""}
    assert {"Shape", "If", "Loop"}.isdisjoint(node.op_type for node in graph.node)
    assert {float(constants[node.input[2]][-1]) for node in resizes} <= {2.0, 0.5, 0.25}
    model = program.model_proto.SerializeToString()
    for batch in (1, 3):
        x = scan(16, 32, 16, batch=batch, seed=batch)
        with torch.no_grad():
            expected = network(x).numpy()
        for run in (run_onnxruntime, run_openvino):
            np.testing.assert_allclose(run(model, x.numpy()), expected, rtol=0, atol=1e-3)
