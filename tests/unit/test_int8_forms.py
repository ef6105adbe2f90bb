"""The INT8 forms of each engine: what they round, and what they leave alone."""

from __future__ import annotations

import random

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from dints_deploy.runtime.engine import COMPUTES, build_engine
from dints_deploy.runtime.int8_forms import CAREFUL, FORMS, Int8Form, int8_forms
from dints_deploy.runtime.machine import FEATURES, VNNI_FEATURES
from dints_deploy.runtime.operators import complaints
from dints_deploy.runtime.parity import run_windows
from dints_deploy.runtime.quantise import end_convolutions, to_int8
from dints_search.export import to_onnx
from dints_search.network import DiNTSNetwork
from dints_search.space import SearchSpace, sample_genotype
from tests.tiny_entry import TinyNetwork, model, tensor

WINDOW = (32, 32, 32)
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def network() -> bytes:
    genotype = sample_genotype(SearchSpace(2, 4), random.Random(3))
    return to_onnx(DiNTSNetwork(genotype, in_channels=1, num_classes=3, channel_multiplier=1 / 16), WINDOW)


def test_every_engine_that_computes_in_int8_has_forms_and_the_last_is_the_careful_one() -> None:
    assert set(FORMS) == {engine for engine, precisions in COMPUTES.items() if "int8" in precisions}
    assert {forms[-1].ends for forms in FORMS.values()} == {CAREFUL}


@pytest.mark.parametrize(("features", "unsigned"), [(["avx2", "avx512_vnni"], True), (["avx2"], False), ([], False)])
def test_activations_are_unsigned_where_the_processor_sums_them_up_without_saturation(
    features: list[str], unsigned: bool
) -> None:
    assert {form.unsigned for form in int8_forms("openvino", features)} == {unsigned}
    others = [form for engine in FORMS if engine != "openvino" for form in int8_forms(engine, features)]
    assert not any(form.unsigned for form in others)  # TensorRT takes none
    assert set(FEATURES) >= VNNI_FEATURES


@pytest.mark.parametrize("form", sorted({form for forms in FORMS.values() for form in forms}, key=repr), ids=repr)
def test_a_form_rounds_what_it_says(network: bytes, form: Int8Form) -> None:
    windows = np.random.default_rng(1).normal(size=(1, 1, *WINDOW)).astype(np.float32)
    full = set(end_convolutions(_named(network), form.ends))
    graph = onnx.load_from_string(to_int8(network, windows, form)).graph
    makers = {name: node for node in graph.node for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    rounded = [node for node in convolutions if node.name not in full]
    assert len(convolutions) > len(rounded) > 0
    for node in convolutions:
        made_by = {makers[name].op_type for name in node.input[:2] if name in makers}
        assert made_by == {"DequantizeLinear"} if node in rounded else "DequantizeLinear" not in made_by
    for node in rounded:
        readers = [n for n in graph.node if node.output[0] in n.input]
        if form.outputs:
            assert {n.op_type for n in readers} == {"QuantizeLinear"}
        else:  # only what another convolution reads
            assert all("Conv" in _read_through(graph, n) for n in readers if n.op_type == "QuantizeLinear")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    stored = {constants[node.input[2]].dtype for node in graph.node if node.op_type == "QuantizeLinear"}
    assert stored == {np.dtype(np.uint8 if form.unsigned else np.int8)}


def test_tensorrt_takes_the_int8_form_of_a_network_with_biases() -> None:
    rng = np.random.default_rng(2)
    shapes = [(4, 1, 1, 1, 1), *[(4, 4, 3, 3, 3)] * 6, (2, 4, 1, 1, 1)]
    network = TinyNetwork(tuple((_normal(rng, *shape), _normal(rng, shape[0])) for shape in shapes)).onnx()
    for form in FORMS["tensorrt"]:
        assert complaints(to_int8(network, _normal(rng, 1, 1, 8, 8, 8), form)) == []


def test_what_comes_out_of_no_relu_is_rounded_around_its_own_zero() -> None:
    rng = np.random.default_rng(3)
    shapes = [(4, 1, 1, 1, 1), (4, 4, 3, 3, 3), (4, 4, 3, 3, 3), (2, 4, 1, 1, 1)]
    weights = [_normal(rng, *shape) / np.float32(np.sqrt(np.prod(shape[1:]))) for shape in shapes]
    names = ["scan", "a", "b", "c", "logits"]
    nodes = [
        helper.make_node("Conv", [names[n], f"weight{n}"], [names[n + 1]], pads=[weight.shape[2] // 2] * 6)
        for n, weight in enumerate(weights)
    ]
    network = model(nodes, [tensor(f"weight{n}", weight) for n, weight in enumerate(weights)], 1, 2)
    windows = _normal(rng, 2, 1, 8, 8, 8) + 1
    rounded = to_int8(network, windows, Int8Form((1, 1), unsigned=True))
    stored = [numpy_helper.to_array(values) for values in onnx.load_from_string(rounded).graph.initializer]
    assert any(zero.dtype == np.uint8 and zero.max() > 0 for zero in stored)
    engine = build_engine("openvino", "cpu", 1)
    exact, near = (
        run_windows(engine.open(data, window=(8, 8, 8), batch=1, precision=precision, why="a test"), windows)
        for data, precision in ((network, "fp32"), (rounded, "int8"))
    )
    assert 0 < np.abs(near - exact).mean() < 0.03 * np.abs(exact).mean()


def _normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.normal(size=shape).astype(np.float32)


def _read_through(graph: onnx.GraphProto, quantiser: onnx.NodeProto) -> set[str]:
    """Return the operators that read what a QuantizeLinear rounds."""
    back = {name for node in graph.node if quantiser.output[0] in node.input for name in node.output}
    return {node.op_type for node in graph.node if back & set(node.input)}


def _named(network: bytes) -> onnx.GraphProto:
    """Return a network's graph with the names that quantisation gives to nodes without one."""
    graph = onnx.load_from_string(network).graph
    for number, node in enumerate(graph.node):
        node.name = node.name or f"node{number}"
    return graph
