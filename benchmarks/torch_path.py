"""A whole scan with torch eager, by MONAI's sliding window or by nnU-Net's predictor loop: what users run today.

    python -m benchmarks.torch_path LOOP SCAN STATE OUT --classes 3 --window 96 --overlap 0.25

The network is the same as in the entry that `benchmarks.made` wrote; precision is float32. MONAI gets its Gaussian
weights without their lower bound of 1e-3, as the appliance blends; nnU-Net keeps its own and its own steps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import torch
from torch import Tensor

from benchmarks.made import LOWER, UPPER, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loop", choices=LOOPS)
    parser.add_argument("scan", type=Path)
    parser.add_argument("state", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--multiplier", type=float, default=1.0)
    parser.add_argument("--window", type=int, default=96)
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--threads", type=int, help="all by default")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    network = build(options.classes, options.multiplier)
    network.load_state_dict(torch.load(options.state, weights_only=True))
    network.eval()
    image = nibabel.as_closest_canonical(nibabel.load(options.scan))
    voxels = torch.from_numpy(np.ascontiguousarray(image.dataobj, dtype=np.float32))
    voxels = (voxels.clamp(LOWER, UPPER) - LOWER) / (UPPER - LOWER)
    timed = Timed(network)
    logits = LOOPS[options.loop](voxels, timed, options)
    labels = logits.argmax(0).to(torch.uint8).numpy()
    nibabel.save(nibabel.Nifti1Image(labels, image.affine), options.out)
    print(json.dumps({"windows": timed.windows, "network_seconds": timed.seconds}))


class Timed:
    """A network that counts its windows and its seconds."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network, self.windows, self.seconds = network, 0, 0.0

    def __call__(self, x: Tensor) -> Tensor:
        begin = time.perf_counter()
        y: Tensor = self.network(x)
        self.seconds += time.perf_counter() - begin
        self.windows += len(x)
        return y


def monai_loop(voxels: Tensor, network: Timed, options: Any) -> Tensor:
    """Return the logits (C, I, J, K) by MONAI's sliding window."""
    from monai.inferers import sliding_window_inference

    centre = (options.window - 1) / 2
    profile = torch.exp(-0.5 * ((torch.arange(options.window) - centre) / (0.125 * options.window)) ** 2)
    weights = profile[:, None, None] * profile[:, None] * profile
    with torch.inference_mode():
        logits: Tensor = sliding_window_inference(
            voxels[None, None],
            (options.window,) * 3,
            1,
            network,
            overlap=options.overlap,
            mode="gaussian",
            roi_weight_map=weights[None, None],
        )
    return logits[0]


def nnunet_loop(voxels: Tensor, network: Timed, options: Any) -> Tensor:
    """Return the logits (C, I, J, K) by nnU-Net's predictor loop, without mirroring."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor  # type: ignore[import-not-found]

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return network(x)

    predictor = nnUNetPredictor(
        tile_step_size=1 - options.overlap,
        use_gaussian=True,
        use_mirroring=False,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        verbose=False,
        allow_tqdm=False,
    )
    predictor.network = Module()
    predictor.configuration_manager = SimpleNamespace(patch_size=[options.window] * 3)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=options.classes)
    logits: Tensor = predictor.predict_sliding_window_return_logits(voxels[None])
    return logits.float()


LOOPS: dict[str, Callable[[Tensor, Timed, Any], Tensor]] = {"monai": monai_loop, "nnunet": nnunet_loop}


if __name__ == "__main__":
    main()
