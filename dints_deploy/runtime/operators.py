"""Which ONNX operators TensorRT takes, with which types and under which restrictions, checked before it is asked.

Source: onnx-tensorrt, docs/operators.md of the parser for TensorRT 10.15, for the operators that segmentation networks
use; the range of opsets is that of TensorRT 11's ONNX Opset Guide. A complaint of the parser itself comes after minutes
and in its own words; these come at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

OPSETS: Final = range(9, 26)

FLOATS: Final = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
NUMBERS: Final = FLOATS | {TensorProto.INT32, TensorProto.INT64}
DATA: Final = NUMBERS | {TensorProto.BOOL}
QUANTISED: Final = frozenset({TensorProto.INT8})

SUPPORTED: Final[dict[str, frozenset[int]]] = {
    "Add": NUMBERS,
    "AveragePool": FLOATS,
    "BatchNormalization": FLOATS,
    "Cast": DATA,
    "Clip": FLOATS,
    "Concat": DATA,
    "Constant": DATA,
    "ConstantOfShape": DATA,
    "Conv": FLOATS,
    "ConvTranspose": FLOATS,
    "DequantizeLinear": QUANTISED,
    "Div": NUMBERS,
    "Elu": FLOATS,
    "Exp": FLOATS,
    "Expand": DATA,
    "Flatten": DATA,
    "Gather": DATA,
    "Gemm": FLOATS,
    "GlobalAveragePool": FLOATS,
    "GroupNormalization": FLOATS,
    "Identity": DATA,
    "InstanceNormalization": FLOATS,
    "LayerNormalization": FLOATS,
    "LeakyRelu": FLOATS,
    "Log": FLOATS,
    "MatMul": FLOATS,
    "Max": NUMBERS,
    "MaxPool": FLOATS,
    "Min": NUMBERS,
    "Mul": NUMBERS,
    "Neg": NUMBERS,
    "PRelu": FLOATS,
    "Pad": NUMBERS,
    "Pow": NUMBERS,
    "QuantizeLinear": FLOATS,
    "Reciprocal": FLOATS,
    "ReduceL2": NUMBERS,
    "ReduceMax": NUMBERS,
    "ReduceMean": NUMBERS,
    "ReduceMin": NUMBERS,
    "ReduceSum": NUMBERS,
    "ReduceSumSquare": NUMBERS,
    "Relu": NUMBERS,
    "Reshape": DATA,
    "Resize": FLOATS,
    "Shape": DATA,
    "Sigmoid": FLOATS,
    "Slice": DATA,
    "Softmax": FLOATS,
    "Split": DATA,
    "Sqrt": FLOATS,
    "Squeeze": DATA,
    "Sub": NUMBERS,
    "Tanh": FLOATS,
    "Transpose": DATA,
    "Unsqueeze": DATA,
    "Where": DATA,
}
"""Operator -> types that its first input may have."""

RESIZE: Final[dict[str, tuple[bytes | int, ...]]] = {
    "coordinate_transformation_mode": (
        b"half_pixel", b"pytorch_half_pixel", b"tf_half_pixel_for_nn", b"asymmetric", b"align_corners",
    ),
    "mode": (b"nearest", b"linear"),
    "nearest_mode": (b"floor", b"ceil", b"round_prefer_floor", b"round_prefer_ceil"),
    "keep_aspect_ratio_policy": (b"stretch",),
    "antialias": (0,),
}  # fmt: skip
"""Attribute of Resize -> values that are taken."""

Constants = Mapping[str, Any]


def complaints(network: bytes) -> list[str]:
    """Return why TensorRT would not take an ONNX network, one phrase per operator and reason; empty where it would."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(network))
    graph = model.graph
    constants = {weight.name: weight for weight in graph.initializer}
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    types |= {name: weight.data_type for name, weight in constants.items()}
    found = [
        f"opset {opset.version}, not within {OPSETS.start} to {OPSETS.stop - 1}"
        for opset in model.opset_import
        if opset.domain in ("", "ai.onnx") and opset.version not in OPSETS
    ]
    for node in graph.node:
        found += [f"{node.op_type}: {reason}" for reason in _reasons(node, types, constants)]
    return sorted(set(found))


def _reasons(node: Any, types: Mapping[str, int], constants: Constants) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield f"of the domain {node.domain!r}"
        return
    if node.op_type not in SUPPORTED:
        yield "not an operator that it takes"
        return
    kind = types.get(node.input[0], 0) if node.input else 0
    if kind and kind not in SUPPORTED[node.op_type]:
        yield f"not for {TensorProto.DataType.Name(kind)}"
    if rule := RULES.get(node.op_type):
        yield from rule(node, constants)


def _resize(node: Any, constants: Constants) -> Iterator[str]:
    for attribute in node.attribute:
        value = attribute.i if attribute.type == onnx.AttributeProto.INT else attribute.s
        if attribute.name in RESIZE and value not in RESIZE[attribute.name]:
            yield f"{attribute.name} {value!r}"


def _reduction(node: Any, constants: Constants) -> Iterator[str]:
    if len(node.input) > 1 and node.input[1] and node.input[1] not in constants:
        yield "axes that are no initialiser"


def _symmetric(node: Any, constants: Constants) -> Iterator[str]:
    zero = node.input[2] if len(node.input) > 2 else ""
    if zero and (zero not in constants or np.any(numpy_helper.to_array(constants[zero]))):
        yield "a zero point that is not 0"


def _pooling(node: Any, constants: Constants) -> Iterator[str]:
    if len(node.output) > 1:
        yield "a second output"
    for attribute in node.attribute:
        if attribute.name == "dilations" and set(attribute.ints) - {1}:
            yield "dilations"


RULES: Final[dict[str, Callable[[Any, Constants], Iterator[str]]]] = {
    "Resize": _resize,
    "QuantizeLinear": _symmetric,
    "DequantizeLinear": _symmetric,
    "MaxPool": _pooling,
    "AveragePool": _pooling,
} | dict.fromkeys(("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare"), _reduction)
"""Operator -> restrictions beyond its types."""
