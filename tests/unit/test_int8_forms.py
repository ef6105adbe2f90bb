"""The INT8 forms of each engine: what they round, and what they leave alone."""

from __future__ import annotations

import random

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from dints_deploy.runtime.engine import COMPUTES
from dints_deploy.runtime.int8_forms import CAREFUL, FORMS, Int8Form, int8_forms
from dints_deploy.runtime.quantise import end_convolutions, to_int8
from dints_search.export import to_onnx
from dints_search.network import DiNTSNetwork
from dints_search.space import SearchSpace, sample_genotype

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
    assert not any(form.unsigned for form in int8_forms("tensorrt", features))  # it takes none


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
    readers = [{n.op_type for n in graph.node if node.output[0] in n.input} for node in rounded]
    assert all(kinds == {"QuantizeLinear"} for kinds in readers) == form.outputs  # without, only what another one reads
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    stored = {constants[node.input[2]].dtype for node in graph.node if node.op_type == "QuantizeLinear"}
    assert stored == {np.dtype(np.uint8 if form.unsigned else np.int8)}


def _named(network: bytes) -> onnx.GraphProto:
    """Return a network's graph with the names that quantisation gives to nodes without one."""
    graph = onnx.load_from_string(network).graph
    for number, node in enumerate(graph.node):
        node.name = node.name or f"node{number}"
    return graph
