"""Write an OpenVINO network with fewer multiplications: Winograd's convolutions as slices, sums and small convolutions.

OpenVINO's own operators do all of it: neighbours are cut out (slices), combined (sums, which it compiles into one
pass), convolved with what is left of the kernel, combined again and put in order (one concatenation). It keeps
features channels-last, where cutting along i and j moves whole runs of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dints_deploy.runtime import openvino_engine  # noqa: F401 (first: it imports openvino without what sends)
from dints_deploy.runtime.winograd import SPATIAL, TAPS, Form, choose_form, matrices, products, transform_weights

from openvino import Type, opset13 as ops  # isort: skip

LEAST_GAIN: Final = 20 * 10**9
"""Multiplications that a window must save: otherwise the longer start is not won back within a run."""

Part = Any
"""A node's output; None stands for zeros."""


def with_fewer_products(model: Any, *, least: float = LEAST_GAIN) -> float:
    """Rewrite the convolutions of a network that are worth it, in place; return the multiplications saved per window.

    Args:
        model: an `openvino.Model` with a fixed shape.
        least: multiplications per window to save; a network that saves fewer stays as it is.
    """
    chosen = [(node, form) for node in model.get_ordered_ops() if (form := _form_of(node)) is not None]
    saved = sum(_saved(node, form) for node, form in chosen)
    if saved < least:
        return 0.0
    writer = _Writer()
    for node, form in chosen:
        weight, pads = node.input_value(1).get_node().data, list(node.get_attributes()["pads_begin"])
        write = writer.in_turn if form.in_turn else writer.together
        written = write(node.input_value(0), weight, form, pads)
        written.get_node().set_friendly_name(node.get_friendly_name())
        node.output(0).replace(written)
    model.validate_nodes_and_infer_types()
    return saved


def _form_of(node: Any) -> Form | None:
    """Return the form of a 3-D convolution that keeps the size and whose weights are known; None for others."""
    if node.get_type_name() != "Convolution" or node.input_value(1).get_node().get_type_name() != "Constant":
        return None
    reads = node.input(0)
    if not reads.get_partial_shape().is_static or reads.get_element_type() != Type.f32:
        return None
    attributes, kernel = node.get_attributes(), list(node.input(1).get_shape())
    same = [size // 2 for size in kernel[2:]]
    if len(kernel) != 5 or any(size not in (1, TAPS) for size in kernel[2:]):
        return None
    if any(list(attributes[name]) != [1, 1, 1] for name in ("strides", "dilations")):
        return None
    if any(list(attributes[name]) != same for name in ("pads_begin", "pads_end")):
        return None
    return choose_form(kernel, list(reads.get_shape()))


def _saved(node: Any, form: Form) -> float:
    return products(node.input(1).get_shape(), node.input(0).get_shape()) * (1 - 1 / form.gain)


class _Writer:
    """Write convolutions; numbers that many operators need are one constant, as every node costs time to compile."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def together(self, x: Part, weight: Any, form: Form, pads: Sequence[int]) -> Part:
        """Return the convolution with all tiles of an axis at once: features of every m-th position."""
        size, shape = form.tile + TAPS - 1, list(x.get_shape())
        parts = [x]
        for axis in form.axes:
            stacked = self._stack(parts)
            apart = [self._every(stacked, axis, first, form.tile) for first in range(-1, form.tile + 1)]
            parts = self._combined(matrices(form.tile)[2], apart)
        parts = self._apart(self._stack(parts), size ** len(form.axes)) if len(form.axes) > 1 else parts
        parts = self._convolved(parts, self._constants(transform_weights(weight, form)), form, pads)
        for n, axis in reversed(list(enumerate(form.axes))):
            inner = size**n
            planes = [self._stack(parts[p * inner : (p + 1) * inner]) for p in range(size)]
            results = self._combined(matrices(form.tile)[0], planes)
            count = shape[axis] // form.tile
            rows = [ops.split(result, self._number(np.array(axis, np.int64)), count).outputs() for result in results]
            whole = ops.concat([row[t] for t in range(count) for row in rows], axis)
            parts = self._apart(whole.output(0), inner)
        return parts[0]

    def in_turn(self, x: Part, weight: Any, form: Form, pads: Sequence[int]) -> Part:
        """Return the convolution tile by tile along one axis."""
        axis, extent = form.axes[0], x.get_shape()[form.axes[0]]
        weights = self._constants(transform_weights(weight, form))
        rows: list[Part] = []
        for begin in range(0, extent, form.tile):
            near = range(begin - 1, begin + form.tile + 1)
            apart = [self._cut(x, axis, n, n + 1, 1) if 0 <= n < extent else None for n in near]
            parts = self._convolved(self._combined(matrices(form.tile)[2], apart), weights, form, pads)
            rows += self._combined(matrices(form.tile)[0], parts)
        return ops.concat(rows, axis).output(0)

    def _constants(self, values: NDArray[np.float32]) -> list[Any]:
        return [ops.constant(value) for value in values]

    def _convolved(self, parts: Sequence[Part], weights: Sequence[Any], form: Form, pads: Sequence[int]) -> list[Part]:
        """Return each part convolved with its weights along the axes that are left."""
        left = [0 if axis in form.axes else pad for axis, pad in zip(SPATIAL, pads, strict=True)]
        return [
            ops.convolution(part, weight, [1, 1, 1], left, left, [1, 1, 1]).output(0)
            for part, weight in zip(parts, weights, strict=True)
        ]

    def _every(self, x: Part, axis: int, first: int, step: int) -> Part:
        """Return every `step`-th position from `first` on, zeros where that is outside; None where all are."""
        shape = list(x.get_shape())
        extent, count = shape[axis], shape[axis] // step
        if 0 <= first < step:
            return self._cut(x, axis, first, extent, step)
        if count == 1:
            return None
        zeros = ops.constant(np.zeros([*shape[:axis], 1, *shape[axis + 1 :]], np.float32)).output(0)
        begin, end = (step - 1, extent - step) if first < 0 else (step, extent)
        inside = self._cut(x, axis, begin, end, step)
        return ops.concat([zeros, inside] if first < 0 else [inside, zeros], axis).output(0)

    def _combined(self, matrix: Any, parts: Sequence[Part]) -> list[Part]:
        """Return the sums of parts that the rows of a matrix name."""
        return [self._sum(row, parts) for row in matrix]

    def _sum(self, factors: Sequence[float], parts: Sequence[Part]) -> Part:
        total: Part = None
        for factor, part in zip(factors, parts, strict=True):
            if factor == 0 or part is None:
                continue
            term = part if factor == 1 else ops.multiply(part, self._number(np.array(factor, np.float32))).output(0)
            total = term if total is None else ops.add(total, term).output(0)
        return total

    def _cut(self, x: Part, axis: int, begin: int, end: int, step: int) -> Part:
        return ops.slice(x, *map(self._integers, (begin, end, step, axis))).output(0)

    def _apart(self, x: Part, count: int) -> list[Part]:
        return [x] if count == 1 else list(ops.split(x, self._number(np.array(0, np.int64)), count).outputs())

    def _stack(self, parts: Sequence[Part]) -> Part:
        return parts[0] if len(parts) == 1 else ops.concat(list(parts), 0).output(0)

    def _integers(self, *values: int) -> Any:
        return self._number(np.array(values, np.int64))

    def _number(self, value: Any) -> Any:
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._known:
            self._known[key] = ops.constant(value)
        return self._known[key]
