"""Mixed precision of a training or an inference with torch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    """Return the mixed-precision context of a precision: autocast to bf16 or fp16, or none for fp32."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return nullcontext() if precision == "fp32" else torch.autocast(device, kinds[precision])
