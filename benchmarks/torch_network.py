"""The torch network of a zoo entry, with the weights of its ONNX file, for contenders that need torch.

python -m benchmarks.torch_network ENTRY_FOLDER NETWORK.ts
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper

from dints_search.genotype import read_genotype
from dints_search.network import DiNTSNetwork


def network_of(folder: Path) -> DiNTSNetwork:
    """Build the torch network of an entry with the weights of its ONNX file."""
    graph = onnx.load(folder / "model.onnx").graph
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    for node in graph.node:  # edges into one node learn equal biases, which the exporter keeps once
        if node.op_type == "InstanceNormalization":
            weights[node.input[1].removesuffix("weight") + "bias"] = weights[node.input[2]]
    wide = weights["stems_in.level0.norm_first.weight"].numel()
    classes = weights["head.classify.bias"].numel()
    network = DiNTSNetwork(
        read_genotype(folder / "genotype.json"), in_channels=1, num_classes=classes, channel_multiplier=wide / 32
    )
    state = network.state_dict()
    network.load_state_dict({name: weights[name].reshape(value.shape) for name, value in state.items()})
    return network.eval()


def main() -> None:
    """Write the network as TorchScript for windows of the hippocampus entry."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    with torch.inference_mode():
        torch.jit.trace(network_of(folder), torch.zeros(1, 1, 40, 56, 40)).save(str(out))  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
