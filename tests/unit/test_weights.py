"""check_onnx reads the wire format itself; the `onnx` package, which reads it with protobuf, is its oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from dints_deploy.catalog.weights import ALLOWED_DOMAINS, NESTED, check_onnx
from dints_deploy.errors import EntryError
from tests.tiny_entry import customised, model, outside, random_network, tensor

FLOAT = TensorProto.FLOAT
NETWORK = random_network(0).onnx()


def verdict(data: bytes) -> str:
    """Return what check_onnx says: `accepted`, or the sentence of its refusal, which must name the file."""
    try:
        check_onnx(data, "tiny/model.onnx")
    except EntryError as refusal:
        named = refusal.code == "entry-onnx" and "tiny/model.onnx" in refusal.message
        return refusal.message if named else f"without its code or the file's name: {refusal}"
    return "accepted"


def messages(message: Any) -> Iterator[Any]:
    """Yield a message and every message inside it, by protobuf's own reflection."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from messages(inner)


def forbidden(parsed: Any) -> bool:
    """Say whether a parsed model holds a tensor outside the file or an operator of another domain."""
    for message in messages(parsed):
        name = message.DESCRIPTOR.name
        if name == "TensorProto" and (message.external_data or message.data_location != TensorProto.DEFAULT):
            return True
        if name in ("NodeProto", "FunctionProto") and message.domain not in ALLOWED_DOMAINS:
            return True
    return False


def far_tensor(name: str = "far") -> Any:
    """Return a tensor whose data lies in another file."""
    far = TensorProto(name=name, data_type=FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    far.external_data.add(key="location", value="weights.bin")
    return far


def near_tensor() -> Any:
    return tensor("near", np.ones(1, np.float32))


def graph(nodes: list[Any], **extra: Any) -> Any:
    return helper.make_graph(nodes, "inner", [], [helper.make_tensor_value_info("y", FLOAT, None)], **extra)


def constant(value: Any) -> Any:
    return helper.make_node("Constant", [], ["y"], value=value)


def relu(domain: str = "") -> Any:
    return helper.make_node("Relu", ["x"], ["y"], domain=domain)


Place = Callable[[Any, Any], Any]
"""Puts a tensor and a node somewhere in a model."""


def at_top(held: Any, node: Any) -> Any:
    return onnx.load_from_string(model([node], [held], 1, 1))


def inside_a_constant(held: Any, node: Any) -> Any:
    return at_top(near_tensor(), helper.make_node("If", ["c"], ["y"], then_branch=graph([constant(held), node])))


def inside_a_loop(held: Any, node: Any) -> Any:
    body = graph([node], initializer=[held])
    return at_top(near_tensor(), helper.make_node("Loop", ["m", "c"], ["y"], body=body))


def inside_nested_branches(held: Any, node: Any) -> Any:
    inner = graph([node], initializer=[held])
    for _ in range(5):
        inner = graph([helper.make_node("If", ["c"], ["y"], then_branch=graph([relu()]), else_branch=inner)])
    return at_top(near_tensor(), helper.make_node("If", ["c"], ["y"], then_branch=inner))


def inside_a_function(held: Any, node: Any) -> Any:
    function = helper.make_function("", "f", ["x"], ["y"], [constant(held), node], [helper.make_opsetid("", 20)])
    return onnx.load_from_string(model([relu()], [], 1, 1, functions=[function]))


def as_a_functions_default(held: Any, node: Any) -> Any:
    made = inside_a_function(near_tensor(), relu())
    made.functions[0].attribute_proto.append(helper.make_attribute("a", held))
    made.functions[0].attribute_proto.append(helper.make_attribute("g", graph([node])))
    return made


def in_a_list_of_attributes(held: Any, node: Any) -> Any:
    odd = helper.make_node("Odd", ["x"], ["y"], tensors=[near_tensor(), held], graphs=[graph([]), graph([node])])
    return at_top(near_tensor(), odd)


def in_sparse_tensors(held: Any, node: Any) -> Any:
    made = at_top(near_tensor(), helper.make_node("If", ["c"], ["y"], then_branch=graph([node])))
    made.graph.sparse_initializer.add().indices.CopyFrom(held)
    return made


def in_a_sparse_attribute(held: Any, node: Any) -> Any:
    sparse = helper.make_sparse_tensor(near_tensor(), tensor("i", np.zeros(1, np.int64)), [1])
    sparse.values.CopyFrom(held)
    return at_top(near_tensor(), helper.make_node("Constant", [], ["y"], sparse_value=sparse, b=graph([node])))


def in_training_information(held: Any, node: Any) -> Any:
    made = at_top(near_tensor(), relu())
    made.training_info.add().algorithm.CopyFrom(graph([node], initializer=[held]))
    return made


PLACES: list[Place] = [
    at_top,
    inside_a_constant,
    inside_a_loop,
    inside_nested_branches,
    inside_a_function,
    as_a_functions_default,
    in_a_list_of_attributes,
    in_sparse_tensors,
    in_a_sparse_attribute,
    in_training_information,
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_external_data_and_custom_domains_are_found_wherever_they_hide(place: Place) -> None:
    for held, node, said in [
        (near_tensor(), relu(), "accepted"),
        (near_tensor(), relu("ai.onnx"), "accepted"),
        (far_tensor(), relu(), "external data"),
        (near_tensor(), relu("com.example"), "com.example"),
        (near_tensor(), relu("ai.onnx.ml"), "ai.onnx.ml"),
    ]:
        made = place(held, node)
        assert forbidden(made) == (said != "accepted")
        assert said in verdict(made.SerializeToString())


def test_a_function_of_a_custom_domain_is_refused() -> None:
    function = helper.make_function("com.example", "f", ["x"], ["y"], [relu()], [helper.make_opsetid("", 20)])
    assert "com.example" in verdict(model([relu()], [], 1, 1, functions=[function]))


@pytest.mark.parametrize("clear", ["data_location", "external_data"])
def test_half_a_mark_of_external_data_is_enough(clear: str) -> None:
    held = far_tensor()
    held.ClearField(clear)
    assert "external data" in verdict(at_top(held, relu()).SerializeToString())


def test_the_checks_own_table_reaches_all_that_the_onnx_schema_can_hold() -> None:
    names = {
        "ModelProto": "model", "TrainingInfoProto": "training", "GraphProto": "graph", "NodeProto": "node",
        "AttributeProto": "attribute", "FunctionProto": "function", "TensorProto": "tensor",
        "SparseTensorProto": "sparse",
    }  # fmt: skip

    def reaches(kind: Any, seen: frozenset[str] = frozenset()) -> bool:
        if kind.name in ("TensorProto", "NodeProto", "FunctionProto"):
            return True
        inner = [f.message_type for f in kind.fields if f.message_type is not None and f.message_type.name not in seen]
        return any(reaches(message, seen | {kind.name}) for message in inner)

    for name, ours in names.items():
        kind: Any = getattr(onnx, name).DESCRIPTOR
        expected = {
            field.number: names[field.message_type.name]
            for field in kind.fields
            if field.message_type is not None and reaches(field.message_type)
        }
        assert NESTED[ours] == expected, name


# torch 2.13 calls its own deprecated isinstance check while it exports
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
def test_a_network_that_torch_exports_is_accepted() -> None:
    import torch

    network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3, padding=1), torch.nn.InstanceNorm3d(2, affine=True)).eval()
    program = torch.onnx.export(network, (torch.zeros(1, 1, 4, 4, 4),), dynamo=True, external_data=False, verbose=False)
    assert program is not None
    assert not forbidden(program.model_proto)
    assert verdict(program.model_proto.SerializeToString()) == "accepted"


def test_a_custom_domain_that_no_operator_uses_is_accepted() -> None:
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.example", 1)]
    assert verdict(model([relu()], [], 1, 1, opset_imports=imports)) == "accepted"


@pytest.mark.parametrize("data", [b"", b"\x08\x0a", b"not an ONNX file", NETWORK[:-1], b"\x00" * 64])
def test_what_holds_no_whole_network_is_refused(data: bytes) -> None:
    assert verdict(data) != "accepted"


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def part(number: int, content: bytes, *, beyond: int = 0) -> bytes:
    """Return a field of bytes; `beyond` is added to its tag, where a 32-bit reader does not see it."""
    return varint((number << 3 | 2) + beyond) + varint(len(content)) + content


def test_a_tag_whose_high_bits_some_readers_drop_hides_no_external_data() -> None:
    """C++ protobuf, which the engines use, reads a tag in 32 bits; a longer one must be no way around the check."""
    far, kept = far_tensor(), TensorProto(name="far", data_type=FLOAT, dims=[1])
    entry = far.external_data[0].SerializeToString()
    hidden = kept.SerializeToString() + part(13, entry, beyond=1 << 32) + varint((14 << 3) + (1 << 32)) + b"\x01"
    inner = onnx.load_from_string(NETWORK).graph.SerializeToString() + part(5, hidden)
    rest = onnx.load_from_string(NETWORK)
    rest.ClearField("graph")
    assert "damaged" in verdict(rest.SerializeToString() + part(7, inner))


@pytest.mark.timeout(30)
def test_deep_and_wide_messages_are_answered_in_bounded_time() -> None:
    nested = b""
    for number in [6, 5, 1] * 200:  # attribute.g, node.attribute, graph.node, and so on outwards
        nested = part(number, nested)
    assert "nested" in verdict(part(7, nested))
    assert verdict(part(7, part(5, b"\x08\x01" * 500_000))) == "accepted"


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Draw an ONNX file, with or without something forbidden, with bytes changed, cut, doubled or put in."""
    base = draw(st.sampled_from([NETWORK, outside(NETWORK), customised(NETWORK), STRANGE]))
    data = bytearray(base)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["change", "cut", "insert", "double"])):
            case "change" if place < len(data):
                data[place] = draw(st.integers(0, 255))
            case "cut":
                del data[place : place + draw(st.integers(1, 40))]
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=12))
            case _:
                data[place:place] = data[place : place + draw(st.integers(1, 40))]
    return bytes(data)


STRANGE = inside_nested_branches(far_tensor(), relu("com.example")).SerializeToString()


@pytest.mark.timeout(60)
@settings(max_examples=400, deadline=None)
@given(data=damaged())
def test_damage_never_crashes_the_check_and_never_hides_what_protobuf_finds(data: bytes) -> None:
    said = verdict(data)
    try:
        parsed = onnx.load_from_string(data)
    except DecodeError:
        return
    assert said.startswith(("accepted", "expected"))
    assert said != "accepted" or not forbidden(parsed)


@pytest.mark.timeout(60)
@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300))
def test_noise_never_crashes_the_check(data: bytes) -> None:
    assert verdict(data).startswith(("accepted", "expected"))


def test_what_is_accepted_here_runs() -> None:
    assert verdict(NETWORK) == "accepted"
    session = onnxruntime.InferenceSession(NETWORK, providers=["CPUExecutionProvider"])
    assert session.run(None, {"scan": np.zeros((1, 1, 3, 3, 3), np.float32)})[0].shape == (1, 3, 3, 3, 3)
