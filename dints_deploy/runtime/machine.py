"""What a network runs on: the processor's or the graphics card's model and what it can compute with.

An engine rounds differently on another device, so a local certificate names the device it was made on.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Final

CPU_INFO: Final = Path("/proc/cpuinfo")

FEATURES: Final = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
    "amx_fp16", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""Instruction sets by which engines choose their kernels, as Linux names them."""

BF16_FEATURES: Final = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""With one of these bfloat16 is computed by the processor; without, an engine imitates it slowly."""

VNNI_FEATURES: Final = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
"""With one of these unsigned times signed bytes sum up in 32 bits; other x86 processors saturate at 16 on the way."""


@functools.cache
def cpu_fields() -> dict[str, str]:
    """Return what Linux says of the first processor, by field name; empty where it says nothing."""
    try:
        block = CPU_INFO.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def cpu_model() -> str:
    """Return the processor's model."""
    return cpu_fields().get("model name") or platform.processor() or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """Return the processor's instruction sets among `FEATURES`, in that order."""
    fields = cpu_fields()
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return tuple(name for name in FEATURES if name in present)


def describe_device(device: str) -> str:
    """Return what an engine's results depend on, in one line.

    Args:
        device: cpu or cuda:N.

    Raises:
        EngineError: `engine-missing` when there is no such GPU.
    """
    if device == "cpu":
        return f"{cpu_model()}; {' '.join(cpu_features())}"
    from dints_deploy.runtime.cuda import describe_gpu

    return describe_gpu(device)
