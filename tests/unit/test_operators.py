"""TensorRT's documented operators against the networks that the project ships and exports."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from dints_deploy.runtime.half import to_fp16
from dints_deploy.runtime.int8_forms import FORMS
from dints_deploy.runtime.operators import OPSETS, complaints
from dints_deploy.runtime.quantise import end_convolutions, to_int8
from dints_search.export import OPSET, to_onnx
from dints_search.network import DiNTSNetwork
from dints_search.space import SearchSpace, sample_genotype
from tests.tiny_entry import customised, model, random_network, tensor

ZOO = Path(__file__).parents[2] / "zoo"
SHIPPED = sorted(ZOO.glob("*/*.onnx"))
# torch 2.13 calls its own deprecated isinstance check while it exports
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_every_shipped_network_is_one_that_tensorrt_takes_in_each_precision(path: Path) -> None:
    network = path.read_bytes()
    with np.load(path.parent / "parity_inputs.npz") as stored:
        windows = stored["windows"][:1]
    for typed in (network, to_fp16(network), *(to_int8(network, windows, form) for form in FORMS["tensorrt"])):
        assert complaints(typed) == []


def test_a_freshly_exported_network_is_one_that_tensorrt_takes() -> None:
    genotype = sample_genotype(SearchSpace(2, 2), random.Random(2))
    network = DiNTSNetwork(genotype, in_channels=1, num_classes=3, channel_multiplier=1 / 16)
    exported = to_onnx(network, (32, 32, 32))  # large enough for a norm that is written out
    graph = onnx.load_from_string(exported).graph
    assert {"ReduceMean", "InstanceNormalization", "Resize"} <= {node.op_type for node in graph.node}
    assert complaints(exported) == []
    assert complaints(to_fp16(exported)) == []


def one(kind: str, inputs: list[str], weights: list[Any], **attributes: Any) -> bytes:
    return model([helper.make_node(kind, inputs, ["logits"], **attributes)], weights, 1, 1)


SCALES = tensor("s", np.array([1, 1, 2, 2, 2], np.float32))
REFUSED = {
    "Det": (one("Det", ["scan"], []), "not an operator"),
    "custom domain": (customised(random_network(0).onnx()), "com.example"),
    "cubic": (one("Resize", ["scan", "", "s"], [SCALES], mode="cubic"), "mode b'cubic'"),
    "antialias": (one("Resize", ["scan", "", "s"], [SCALES], mode="linear", antialias=1), "antialias 1"),
    "zero point": (
        one("QuantizeLinear", ["scan", "s", "z"], [SCALES, tensor("z", np.array(3, np.uint8))]),
        "zero point",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_tensorrt_does_not_take_is_named(name: str) -> None:
    network, words = REFUSED[name]
    assert words in "; ".join(complaints(network))


def test_the_opset_of_exports_is_within_tensorrts() -> None:
    assert OPSET in OPSETS
    changed = onnx.load_from_string(random_network(0).onnx())
    changed.opset_import[0].version = 8
    assert "opset 8" in complaints(changed.SerializeToString())[0]


def test_only_convolutions_near_the_ends_stay_in_fp32() -> None:
    graph = onnx.load(SHIPPED[0]).graph
    weights = {node.name: node.input[1] for node in graph.node if node.op_type == "Conv"}
    kept = {weights[name] for name in end_convolutions(graph, (1, 1))}
    assert {name for name in kept if name.startswith("stems_in")} == {
        name for name in weights.values() if name.startswith("stems_in") and "conv_first" in name
    }
    assert "head.classify.weight" in kept
    few, some, many = (set(end_convolutions(graph, ends)) for ends in ((1, 1), (2, 1), (3, 3)))
    assert few < some < many
    assert len(many) < len(weights) / 3
    assert set(end_convolutions(graph, (2, 0))) | set(end_convolutions(graph, (0, 1))) == some
