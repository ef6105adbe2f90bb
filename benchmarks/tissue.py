"""Give a benchmark's network weights with which it tells tissues apart, without training it.

With purely random weights the logits of all classes are nearly equal, rounding decides the label, and no reduced
precision gets a certificate. Here every convolution behind the stems is the identity and a little noise, norms keep
their output above zero so that it survives the next ReLU, and the last layer is fitted by least squares to air, soft
tissue and bone of one window. Work per window, which is what is measured, is that of any weights.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dints_search.network import DiNTSNetwork

TISSUE_EDGES_HU: Final = (-60.0, 130.0)
"""Air, lung and fat below; soft tissue between; bone and contrast above."""

NOISE_SHARE: Final = 0.02
"""Of the random weights beside the identity, by their gain: more would fall below one int8 step of the identity."""

BIAS: Final = 2.0
"""Of the norms, in standard deviations: ReLU then cuts off little."""

LOGIT_SCALE: Final = 10.0


def tell_tissues_apart(network: DiNTSNetwork, window: NDArray[np.float32], hu: NDArray[np.float32]) -> None:
    """Set the weights of a network of three classes.

    Args:
        network: with random weights; changed in place.
        window: (I, J, K), prepared as the network gets it.
        hu: the same voxels in HU.
    """
    with torch.inference_mode():
        for name, module in network.named_modules():
            if name.startswith("stems_in"):
                continue
            if isinstance(module, nn.InstanceNorm3d):
                module.bias.fill_(BIAS)
            elif isinstance(module, nn.Conv3d) and name != "head.classify":
                gain = module.weight.std() * module.weight[0].numel() ** 0.5
                module.weight.mul_(NOISE_SHARE / gain).add_(nn.init.dirac_(torch.empty_like(module.weight)))
        _fit(network, torch.from_numpy(window), torch.from_numpy(hu))


def _fit(network: DiNTSNetwork, window: Tensor, hu: Tensor) -> None:
    """Fit the last layer to the tissues, linear in the features before it."""
    found: list[Tensor] = []
    hook = network.head.classify.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    network(window[None, None])
    hook.remove()
    features = found[0][0].flatten(1).T.double()  # (IJK, C)
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    tissues = torch.bucketize(hu.flatten(), torch.tensor(TISSUE_EDGES_HU))
    wanted = LOGIT_SCALE * nn.functional.one_hot(tissues, len(TISSUE_EDGES_HU) + 1).double()
    weights = torch.linalg.lstsq(features, wanted).solution.float()  # (C + 1, classes)
    fitted = {"weight": weights[:-1].T[:, :, None, None, None], "bias": weights[-1]}
    network.head.classify.load_state_dict(fitted)
