"""fp16 with fp32 islands: which nodes compute in which type, and that it is still the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from dints_deploy.errors import EngineError
from dints_deploy.runtime.half import NORMALISATIONS, STATISTICS, to_fp16
from tests.tiny_entry import model, random_network, tensor

ZOO = Path(__file__).parents[2] / "zoo"
SHIPPED = (ZOO / "hippocampus" / "model.onnx").read_bytes()


def types_of(network: bytes) -> dict[str, int]:
    """Return tensor -> element type, as shape inference finds it."""
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(network), strict_mode=True).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {weight.name: weight.data_type for weight in graph.initializer}


def run(network: bytes, batch: Any) -> Any:
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: batch})[0]


def written_out(*, spread: float) -> bytes:
    """Return a convolution and a normalisation written out in single operators; its variance overflows fp16."""
    axes = tensor("axes", np.array([2, 3, 4], np.int64))
    weights = [tensor("w", np.full((1, 1, 1, 1, 1), spread, np.float32)), axes]
    weights += [tensor("eps", np.array(1e-5, np.float32)), tensor("gain", np.full((1, 1, 1, 1, 1), 2, np.float32))]
    chain = [
        ("Conv", ["scan", "w"], "x", {}),
        ("ReduceMean", ["x", "axes"], "mean", {"keepdims": 1}),
        ("Sub", ["x", "mean"], "centred", {}),
        ("Mul", ["centred", "centred"], "square", {}),
        ("ReduceMean", ["square", "axes"], "variance", {"keepdims": 1}),
        ("Add", ["variance", "eps"], "sum", {}),
        ("Sqrt", ["sum"], "deviation", {}),
        ("Reciprocal", ["deviation"], "rate", {}),
        ("Mul", ["gain", "rate"], "scale", {}),
        ("Mul", ["centred", "scale"], "normal", {}),
        ("Relu", ["normal"], "positive", {}),
        ("Conv", ["positive", "w"], "logits", {}),
    ]
    nodes = [helper.make_node(kind, inputs, [out], **more) for kind, inputs, out, more in chain]
    return model(nodes, weights, 1, 1)


def test_convolutions_are_fp16_and_normalisations_fp32_with_their_weights() -> None:
    half = to_fp16(SHIPPED)
    onnx.checker.check_model(onnx.load_from_string(half), full_check=True)
    types = types_of(half)
    graph = onnx.load_from_string(half).graph
    kinds = {kind: {types[name] for node in graph.node if node.op_type == kind for name in node.input if name}
             for kind in ("Conv", "InstanceNormalization", "ReduceMean", "Sqrt", "Relu")}  # fmt: skip
    assert kinds["Conv"] == {TensorProto.FLOAT16} == kinds["Relu"]
    assert kinds["InstanceNormalization"] == {TensorProto.FLOAT} == kinds["Sqrt"]
    assert TensorProto.FLOAT16 not in kinds["ReduceMean"]
    for node in graph.node:
        if node.op_type in NORMALISATIONS | STATISTICS:
            assert types[node.output[0]] == TensorProto.FLOAT, node.name
    assert {types[value.name] for value in (*graph.input, *graph.output)} == {TensorProto.FLOAT}
    assert len(half) < 0.52 * len(SHIPPED)
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)


def test_the_network_stays_the_network() -> None:
    rng = np.random.default_rng(0)
    for seed in range(5):
        network = random_network(seed)
        batch = rng.normal(size=(2, 1, 8, 6, 10)).astype(np.float32)
        expected = network.logits(batch)
        found = run(to_fp16(network.onnx()), batch)
        assert found.dtype == np.float32
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert 1e-6 < error < 3e-3  # it is fp16, and no worse


def test_a_normalisation_that_is_written_out_does_not_overflow() -> None:
    """Squares of values around 600 are beyond fp16's 65504: as fp16 the scale would be 0 and the logits with it."""
    network = written_out(spread=600.0)
    batch = np.random.default_rng(1).normal(size=(1, 1, 6, 6, 6)).astype(np.float32)
    expected = run(network, batch)
    found = run(to_fp16(network), batch)
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=5e-3 * np.abs(expected).max())


def test_a_weight_beyond_fp16_is_refused() -> None:
    for value in (1e5, np.inf, np.nan):
        with pytest.raises(EngineError) as caught:
            to_fp16(written_out(spread=value))
        assert caught.value.code == "engine-failed"
        assert "w" in caught.value.message
