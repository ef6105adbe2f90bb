"""A norm that is written as partial sums becomes one operator: the same function, and nothing else is touched."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from dints_deploy.runtime.int8_forms import Int8Form
from dints_deploy.runtime.plain_norm import with_plain_norms
from dints_deploy.runtime.quantise import to_int8
from dints_search.export import to_onnx
from dints_search.network import DiNTSNetwork
from dints_search.space import SearchSpace, sample_genotype

WINDOW = (32, 32, 24)  # large enough for norms that are written out; no axis stands for another

# torch 2.13 calls its own deprecated isinstance check while it exports
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def exported() -> bytes:
    """Return a network whose norms have weights and biases of their own."""
    genotype = sample_genotype(SearchSpace(2, 2), random.Random(2))
    network = DiNTSNetwork(genotype, in_channels=1, num_classes=3, channel_multiplier=1 / 8)
    rng = np.random.default_rng(0)
    for name, values in network.named_parameters():
        if "norm" in name:
            values.data += values.data.new_tensor(rng.normal(0, 0.5, values.shape))
    return to_onnx(network, WINDOW)


def logits(model: Any) -> Any:
    scan = np.random.default_rng(1).normal(3, 2, (1, 1, *WINDOW)).astype(np.float32)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {model.graph.input[0].name: scan})[0]


def operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_the_function_stays_and_the_sums_are_gone(exported: bytes) -> None:
    before, after = onnx.load_from_string(exported), onnx.load_from_string(exported)
    count = with_plain_norms(after)
    onnx.checker.check_model(after, full_check=True)
    assert count == operators(before).count("Sqrt") > 0
    assert operators(after).count("InstanceNormalization") == operators(before).count("InstanceNormalization") + count
    assert not {"ReduceMean", "ReduceSum", "Sqrt", "Reciprocal", "Div"} & {*operators(after)}
    assert len(after.graph.initializer) < len(before.graph.initializer)
    np.testing.assert_allclose(logits(after), logits(before), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["ReduceMean", "ReduceSum"])
def test_a_mean_over_other_axes_is_no_norm(exported: bytes, kind: str) -> None:
    changed = onnx.load_from_string(exported)
    axes = {node.input[1] for node in changed.graph.node if node.op_type == kind}
    for tensor in changed.graph.initializer:
        if tensor.name in axes:
            tensor.CopyFrom(numpy_helper.from_array(np.array([1]), tensor.name))
    before = changed.SerializeToString()
    assert with_plain_norms(changed) == 0
    assert onnx.load_from_string(before) == changed


@pytest.mark.parametrize("kind", ["Sub", "Sqrt", "Reciprocal"])
def test_other_arithmetic_is_no_norm(exported: bytes, kind: str) -> None:
    changed = onnx.load_from_string(exported)
    for node in changed.graph.node:
        if node.op_type == kind:
            node.op_type = "Add" if kind == "Sub" else "Abs"
    assert with_plain_norms(changed) == 0


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (4, 1, 1, 1)])
def test_other_weights_than_one_for_each_channel_make_no_norm(exported: bytes, shape: tuple[int, ...]) -> None:
    changed = onnx.load_from_string(exported)
    weights = {name for node in changed.graph.node if node.op_type == "Add" for name in node.input if "bias" in name}
    for tensor in changed.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(np.ones(shape, np.float32), tensor.name))
    assert weights
    assert with_plain_norms(changed) == 0


def test_an_int8_form_has_plain_norms_where_they_are_asked_for(exported: bytes) -> None:
    windows = np.random.default_rng(1).normal(3, 2, (1, 1, *WINDOW)).astype(np.float32)
    plain, written_out = (
        onnx.load_from_string(to_int8(exported, windows, Int8Form((3, 3), plain_norms=p))) for p in (True, False)
    )
    assert "Sqrt" not in operators(plain)
    assert "Sqrt" in operators(written_out)
