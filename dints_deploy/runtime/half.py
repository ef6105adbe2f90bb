"""Half precision: a network that computes in fp16, with islands of fp32 where digits are lost.

The ONNX file says the type of every tensor, which is what a strongly typed engine (TensorRT 11) obeys. Islands are the
normalisations, the statistics they are written out in, and softmax; casts lie at their shores. Input and output stay
float32.

The converters of ONNX Runtime and onnxconverter-common were tried first: they give two casts of one name where two
nodes share an initialiser, and name islands by operator only, which misses a normalisation that is written out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dints_deploy.errors import EngineError

NORMALISATIONS: Final = frozenset(
    {"InstanceNormalization", "LayerNormalization", "GroupNormalization", "BatchNormalization", "Softmax", "LogSoftmax"}
)
STATISTICS: Final = frozenset(
    {"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Sqrt", "Reciprocal", "Exp", "Log", "Pow"}
)
"""Operators that normalisations are written out in."""

ELEMENTWISE: Final = frozenset({"Add", "Sub", "Mul", "Div"})
"""Belong to an island when they take up one of its statistics."""

UNTOUCHED: Final = frozenset({"Constant", "ConstantOfShape", "Cast", "Shape", "QuantizeLinear", "DequantizeLinear"})
"""Operators whose types the file fixes itself."""

FLOAT32_INPUTS: Final = {"Resize": (1, 2), "Upsample": (1,)}
"""Operator -> inputs that ONNX wants in float32 whatever the data's type is: regions and scales."""

NAMES: Final = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16"}


def to_fp16(network: bytes) -> bytes:
    """Return an ONNX network with fp16 convolutions and fp32 islands.

    Args:
        network: an fp32 ONNX file with its weights inside and no branches.

    Raises:
        EngineError: `engine-failed` when a weight does not fit into fp16 or the network has branches.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(network))
    graph = model.graph
    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        raise EngineError("engine-failed", "expected a network without branches, found If or Loop: export it in fp32")
    conversion = _Conversion(graph)
    nodes = list(conversion.nodes())
    used = {name for node in nodes for name in node.input}
    weights = [weight for weight in graph.initializer if weight.name in used] + conversion.weights
    for part, content in ((graph.node, nodes), (graph.initializer, weights), (graph.value_info, [])):
        del part[:]
        part.extend(content)
    data: bytes = model.SerializeToString()
    return data


def islands(nodes: Any) -> set[str]:
    """Return the first output of every node that has to compute in fp32."""
    statistics: set[str] = set()
    fixed: set[str] = set()
    for node in nodes:  # in the order of computation, as ONNX demands
        if node.op_type in STATISTICS or (node.op_type in ELEMENTWISE and statistics.intersection(node.input)):
            statistics.update(node.output)
        elif node.op_type in NORMALISATIONS:
            fixed.update(node.output)
    return statistics | fixed


@dataclass
class _Conversion:
    """A pass over the graph; casts are made where they are first needed, once per tensor and type."""

    graph: Any
    weights: list[Any] = field(default_factory=list)
    types: dict[str, int] = field(default_factory=dict)
    aliases: dict[tuple[str, int], str] = field(default_factory=dict)

    def nodes(self) -> Iterator[Any]:
        """Yield the converted nodes and the casts between them."""
        self.types = {value.name: value.type.tensor_type.elem_type for value in self.graph.value_info}
        self.types |= {value.name: value.type.tensor_type.elem_type for value in self.graph.input}
        self.types |= {value.name: value.type.tensor_type.elem_type for value in self.graph.output}
        initial = {weight.name: weight for weight in self.graph.initializer}
        self.types |= {name: weight.data_type for name, weight in initial.items()}
        outputs = {value.name for value in self.graph.output}
        fp32 = islands(self.graph.node)
        for node in self.graph.node:
            if node.op_type in UNTOUCHED:
                yield node
                continue
            wanted = TensorProto.FLOAT if node.output[0] in fp32 else TensorProto.FLOAT16
            yield from self._inputs(node, wanted, initial)
            ends = []
            for n, name in enumerate(node.output):
                if self.types.get(name) != TensorProto.FLOAT:
                    continue
                if name in outputs and wanted == TensorProto.FLOAT16:
                    node.output[n] = f"{name}_fp16"
                    ends.append(_cast(node.output[n], name, TensorProto.FLOAT))
                    self.aliases[name, TensorProto.FLOAT16] = node.output[n]
                else:
                    self.types[name] = wanted
            yield node
            yield from ends

    def _inputs(self, node: Any, wanted: int, initial: dict[str, Any]) -> Iterator[Any]:
        """Point the node's inputs to tensors of the wanted type; yield the casts that are new."""
        for n, name in enumerate(node.input):
            if n in FLOAT32_INPUTS.get(node.op_type, ()) or self.types.get(name) not in NAMES:
                continue
            if self.types[name] == wanted:
                continue
            alias = self.aliases.get((name, wanted))
            if alias is None:
                alias = self.aliases[name, wanted] = f"{name}_{NAMES[wanted]}"
                if name in initial:
                    self.weights.append(_half(initial[name], alias))
                else:
                    yield _cast(name, alias, wanted)
            node.input[n] = alias


def _cast(source: str, target: str, to: int) -> Any:
    return helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=to)


def _half(weight: Any, name: str) -> Any:
    """Return a weight in fp16 under another name."""
    values = numpy_helper.to_array(weight)
    if not np.abs(values).max(initial=0) <= np.finfo(np.float16).max:
        raise EngineError(
            "engine-failed", f"expected weights within fp16, found a larger one in {weight.name}: use fp32 or bf16"
        )
    return numpy_helper.from_array(values.astype(np.float16), name)
