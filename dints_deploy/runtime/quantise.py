"""INT8 by ONNX Runtime's static quantisation, calibrated on an entry's own real windows.

Convolutions compute on int8; normalisation, resampling and addition stay in floating point, and so do the convolutions
at both ends of the network, which carry the scan's digits in and the decision out. Weights and activations are
symmetric, per channel and per tensor, as OpenVINO, ONNX Runtime and TensorRT all take them.
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
from dints_deploy.runtime.plain_norm import with_plain_norms

FULL_ENDS: Final = 3
"""Convolutions kept in fp32 at each end, counted along the shortest way to the input or output.

With 0, 1, 2, 3 and 4 of them, 68, 22, 2.0, 1.5 and 1.0 of 10 000 labels of the hippocampus network were others than in
fp32 on real windows, and 8.3, 7.7, 7.0, 2.7 and 1.3 % on hostile ones; the file grew from 3.3 to 6.0 MB.
"""

CONVOLUTIONS: Final = frozenset({"Conv", "ConvTranspose"})


def to_int8(network: bytes, windows: Batch, *, plain_norms: bool = False) -> bytes:
    """Return an ONNX network with QuantizeLinear and DequantizeLinear around its convolutions.

    Args:
        network: an fp32 ONNX file with its weights inside.
        windows: real windows (N, C, I, J, K) to calibrate on.
        plain_norms: write norms that are partial sums as one operator.

    Raises:
        EngineError: `engine-failed` when no convolution lies between the ends: it would be fp32 under another name.
    """
    model = onnx.load_from_string(network)
    if plain_norms:
        with_plain_norms(model)
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"node{number}"  # by which nodes are excluded
    full = end_convolutions(model.graph, FULL_ENDS)
    if all(node.name in full for node in _convolutions(model.graph)):
        raise EngineError(
            "engine-failed", f"expected convolutions deeper than {FULL_ENDS} from both ends, found none: use fp32"
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
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )
        return result.read_bytes()


class _Windows(CalibrationDataReader):  # type: ignore[misc]
    """Hands out windows one at a time."""

    def __init__(self, name: str, windows: Batch) -> None:
        self._feeds = ({name: window[np.newaxis]} for window in windows)

    def get_next(self) -> Any:
        """Return the next feed, None after the last."""
        return next(self._feeds, None)


def end_convolutions(graph: Any, ends: int) -> list[str]:
    """Return the names of the convolutions that are among the first or last `ends` of some way through the network."""
    forwards = _depths(graph.node, {value.name for value in graph.input}, lambda node: (node.input, node.output))
    backwards = _depths(
        reversed(graph.node), {value.name for value in graph.output}, lambda node: (node.output, node.input)
    )
    near = (node.name for node in _convolutions(graph) if min(forwards[node.name], backwards[node.name]) <= ends)
    return sorted(near)


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
