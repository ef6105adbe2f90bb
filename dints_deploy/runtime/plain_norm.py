"""Instance normalisations that were written as partial sums, as one operator again.

Entries sum large norms axis by axis, because engines lose small terms of one long sum in float32. Beside the rounding
of int8 that loss is nothing, and one operator passes over memory half as often as the dozen that write it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import helper, numpy_helper

SPATIAL: Final = (4, 3, 2)
"""Axes of (N, C, I, J, K) in the order in which an entry's norms sum them."""

Maker = Mapping[str, Any]
"""Name of a value -> the node that makes it."""

Constants = Mapping[str, NDArray[Any]]
"""Name of a value -> it, where the file holds it."""


def with_plain_norms(model: Any) -> int:
    """Replace the norms of an ONNX model, in place, that are written as partial sums; return how many there were.

    Anything that is not exactly such a norm stays as it is, and so does a network with branches.
    """
    graph = model.graph
    if any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute):
        return 0
    made: dict[str, Any] = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    count = 0
    for place, node in enumerate(graph.node):
        found = _norm(node, made, constants)
        if found is None:
            continue
        x, weight, bias, epsilon = found
        count += 1
        names = [f"{node.output[0]}.{part}" for part in ("weight", "bias")]
        for name, values in zip(names, (weight, bias), strict=True):
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values.ravel()), name))
        plain = helper.make_node("InstanceNormalization", [x, *names], [node.output[0]], node.name, epsilon=epsilon)
        graph.node[place].CopyFrom(plain)
    if count:
        _drop_unused(graph)
    return count


def _norm(node: Any, made: Maker, constants: Constants) -> tuple[str, NDArray[Any], NDArray[Any], float] | None:
    """Return (input, weight, bias, epsilon) where a node ends a norm: (x - m) * (weight / sqrt(v + epsilon)) + bias."""
    scaled, bias = _inputs(node, "Add")
    centred, scale = _inputs(made.get(scaled), "Mul")
    x, mean = _inputs(made.get(centred), "Sub")
    weight, inverse = _inputs(made.get(scale), "Mul")
    root, _ = _inputs(made.get(inverse), "Reciprocal")
    shifted, _ = _inputs(made.get(root), "Sqrt")
    variance, epsilon = _inputs(made.get(shifted), "Add")
    squares = _averaged(variance, made, constants)
    if not x or _averaged(mean, made, constants) != x or not {weight, bias, epsilon} <= set(constants):
        return None
    if _inputs(made.get(squares), "Mul") != (centred, centred):
        return None
    values = constants[weight], constants[bias], constants[epsilon]
    per_channel = (1, values[0].size, 1, 1, 1)
    if (values[0].shape, values[1].shape, values[2].size) != (per_channel, per_channel, 1):
        return None
    return x, values[0], values[1], values[2].item()


def _averaged(name: str, made: Maker, constants: Constants) -> str:
    """Return what a value is the mean of over i, j and k: mean over k, sum over j over its number, mean over i."""
    outer, over_i = _inputs(made.get(name), "ReduceMean")
    total, number = _inputs(made.get(outer), "Div")
    inner, over_j = _inputs(made.get(total), "ReduceSum")
    source, over_k = _inputs(made.get(inner), "ReduceMean")
    axes = [constants[axis].tolist() if axis in constants else None for axis in (over_k, over_j, over_i)]
    divided = number in constants and constants[number].size == 1
    return source if divided and axes == [[axis] for axis in SPATIAL] else ""


def _inputs(node: Any, kind: str) -> tuple[str, str]:
    """Return the first two inputs of a node of a kind; empty names for another one, or where there are none."""
    names = (*node.input, "", "") if node is not None and node.op_type == kind else ("", "")
    return names[0], names[1]


def _drop_unused(graph: Any) -> None:
    """Remove nodes and initialisers that no result needs any more."""
    wanted = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    initialisers = [tensor for tensor in graph.initializer if tensor.name in wanted]
    for field, values in ((graph.node, kept[::-1]), (graph.initializer, initialisers)):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(copies)
