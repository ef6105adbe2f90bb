"""INT8 by ONNX Runtime's static quantisation, calibrated on an entry's own real windows.

Convolutions compute on int8; normalisation, resampling and addition stay in floating point, and so do the convolutions
at both ends of the network, which carry the scan's digits in and the decision out. Weights are symmetric per channel,
activations are quantised per tensor.
Nothing leaves the machine: NNCF, the other tool of the trade, reports its use over the network.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from dints_deploy.errors import EngineError
from dints_deploy.runtime.engine import Batch
from dints_deploy.runtime.int8_forms import Int8Form
from dints_deploy.runtime.plain_norm import with_plain_norms

CONVOLUTIONS: Final = frozenset({"Conv", "ConvTranspose"})


def to_int8(network: bytes, windows: Batch, form: Int8Form) -> bytes:
    """Return an ONNX network with QuantizeLinear and DequantizeLinear at its convolutions.

    Args:
        network: an fp32 ONNX file with its weights inside.
        windows: real windows (N, C, I, J, K) to calibrate on.
        form: how.

    Raises:
        EngineError: `engine-failed` when no convolution lies between the ends: it would be fp32 under another name.
    """
    model = onnx.load_from_string(network)
    if form.plain_norms:
        with_plain_norms(model)
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"node{number}"  # by which nodes are excluded
    full = end_convolutions(model.graph, form.ends)
    if all(node.name in full for node in _convolutions(model.graph)):
        raise EngineError(
            "engine-failed",
            "expected convolutions deeper than {} from the input and {} from the output, found none: use fp32".format(
                *form.ends
            ),
        )
    add_pre_process_metadata(model)  # nothing to fold: the exporter has done it
    with tempfile.TemporaryDirectory(prefix="quantise-") as folder:
        result = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            result,
            _Windows(model.graph.input[0].name, windows),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=sorted(CONVOLUTIONS),
            nodes_to_exclude=full,
            per_channel=True,
            activation_type=QuantType.QUInt8 if form.unsigned else QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "ActivationSymmetric": not form.unsigned,
                "WeightSymmetric": True,
                "QuantizeBias": form.biases,
                "OpTypesToExcludeOutputQuantization": [] if form.outputs else sorted(CONVOLUTIONS),
            },
        )
        return result.read_bytes()


class _Windows(CalibrationDataReader):  # type: ignore[misc]
    """Hands out windows one at a time."""

    def __init__(self, name: str, windows: Batch) -> None:
        self._feeds = ({name: window[np.newaxis]} for window in windows)

    def get_next(self) -> Any:
        """Return the next feed, None after the last."""
        return next(self._feeds, None)


def end_convolutions(graph: Any, ends: tuple[int, int]) -> list[str]:
    """Return the names of the convolutions that are among the first or last `ends` of some way through the network."""
    first, last = ends
    forwards = _depths(graph.node, {value.name for value in graph.input}, lambda node: (node.input, node.output))
    backwards = _depths(
        reversed(graph.node), {value.name for value in graph.output}, lambda node: (node.output, node.input)
    )
    convolutions = (node.name for node in _convolutions(graph))
    return sorted(name for name in convolutions if forwards[name] <= first or backwards[name] <= last)


def _convolutions(graph: Any) -> Iterator[Any]:
    return (node for node in graph.node if node.op_type in CONVOLUTIONS)


def _depths(nodes: Any, start: set[str], ends: Any) -> dict[str, int]:
    """Return node name -> convolutions on the shortest way from `start` up to and with the node."""
    far = 1 << 30
    reached: dict[str, int] = defaultdict(lambda: far, dict.fromkeys(start, 0))
    depths = {}
    for node in nodes:
        sources, targets = ends(node)
        depth = min((reached[name] for name in sources), default=far) + (node.op_type in CONVOLUTIONS)
        depths[node.name] = depth
        for name in targets:
            reached[name] = min(reached[name], depth)
    return depths
