"""The usual way with torch and MONAI: what a user writes today to run the same network on the same scan.

    python benchmarks/monai_path.py SCAN ENTRY_FOLDER OUT.nii.gz

Weights come from the entry's ONNX file, so that both contenders run the same network in fp32.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import torch
from monai.inferers import sliding_window_inference
from monai.transforms import (
    Compose,
    EnsureChannelFirst,
    LoadImage,
    Orientation,
    SaveImage,
)
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
    """Segment one scan."""
    scan, folder, out = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    network = network_of(folder)
    prepare = Compose([LoadImage(image_only=True), EnsureChannelFirst(), Orientation(axcodes="RAS")])
    image = prepare(scan)
    low, high = np.percentile(image, [0.5, 99.5])
    values = image.clamp(low, high)
    values = (values - values.mean()) / values.std(unbiased=False)
    with torch.inference_mode():
        logits = sliding_window_inference(values[None], (40, 56, 40), 1, network, overlap=0.5, mode="gaussian")
    labels = logits.argmax(1).to(torch.uint8)
    labels.meta.update(image.meta)
    SaveImage(output_dir=out.parent, output_postfix="monai", separate_folder=False, print_log=False)(labels)


if __name__ == "__main__":
    main()
