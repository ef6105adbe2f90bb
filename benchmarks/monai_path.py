"""The usual way with torch and MONAI: what a user writes today to run the same network on the same scan.

    python benchmarks/monai_path.py SCAN NETWORK.ts OUT_FOLDER [MIRRORED_AXIS ...]

The network is a TorchScript file (as MONAI bundles ship it), made beforehand by `torch_network`, so that nothing of
ours is imported and nothing but the user's own work is timed.
"""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Orientation, SaveImage


def main() -> None:
    """Segment one scan."""
    scan, network_file, out = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    mirrored_axes = [2 + "ijk".index(axis) for axis in sys.argv[4:]]  # test-time augmentation
    flips = [list(axes) for size in range(len(mirrored_axes) + 1) for axes in combinations(mirrored_axes, size)]
    network = torch.jit.load(network_file).eval()  # type: ignore[no-untyped-call]
    prepare = Compose([LoadImage(image_only=True), EnsureChannelFirst(), Orientation(axcodes="RAS")])
    image = prepare(scan)
    low, high = np.percentile(image, [0.5, 99.5])
    values = image.clamp(low, high)
    values = (values - values.mean()) / values.std(unbiased=False)

    def mirrored(window: torch.Tensor) -> torch.Tensor:
        copies = [network(window.flip(axes)).flip(axes) if axes else network(window) for axes in flips]
        return torch.stack(copies).mean(0)

    with torch.inference_mode():
        logits = sliding_window_inference(values[None], (40, 56, 40), 1, mirrored, overlap=0.5, mode="gaussian")
    labels = logits.argmax(1).to(torch.uint8)
    labels.meta.update(image.meta)
    SaveImage(output_dir=out, output_postfix="monai", separate_folder=False, print_log=False)(labels)


if __name__ == "__main__":
    main()
