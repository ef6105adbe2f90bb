"""The engine seam with a torch network behind it: the workshop validates with the appliance's window loop."""

from __future__ import annotations

import torch
from torch import nn

from dints_deploy.runtime.engine import Batch, Handle, SessionInfo
from dints_search.precision import autocast


class TorchSession:
    """A network in torch, ready to run on batches of windows."""

    under_way = 2

    def __init__(self, network: nn.Module, *, device: str = "cpu", precision: str = "fp32") -> None:
        self._network = network.to(device).eval()
        self._device = device
        self.info = SessionInfo("torch", torch.__version__, device, precision, "the network in training form")

    def submit(self, batch: Batch) -> Handle:
        """Run a batch (N, C, I, J, K) now; the handle is its result."""
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # fp32 means fp32, on a GPU too
        with torch.inference_mode(), exact, autocast(torch.device(self._device).type, self.info.precision):
            return self._network(torch.from_numpy(batch).to(self._device)).float().cpu().numpy()

    def result(self, handle: Handle) -> Batch:
        """Return the logits (N, classes, I, J, K) of a submitted batch."""
        logits: Batch = handle
        return logits

    def memory_bytes(self) -> int:
        """Return the bytes of the weights."""
        return sum(p.numel() * p.element_size() for p in self._network.parameters())
