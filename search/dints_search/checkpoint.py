"""Checkpoints: whole or not at all, tensors only, and bound to the configuration that wrote them.

A file is a mark, the SHA-256 of what follows, and torch's own archive. The digest is checked before torch sees a byte:
a damaged archive can crash its reader, not only fail in it.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any, Final

import torch

from dints_deploy.errors import DatasetError
from dints_deploy.files import write_bytes

CHECKPOINT: Final = "checkpoint.pt"
"""Its name in a run folder."""

MARK: Final = b"dints-checkpoint-1\n"
DIGEST_BYTES: Final = 32


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain numbers durably; the old checkpoint stays until the new one is whole.

    Raises:
        OutputError: `disk-full` or `output-unwritable`; the old checkpoint is untouched.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    write_bytes(path, MARK + hashlib.sha256(payload).digest() + payload)


def load_checkpoint(path: Path, configuration: str) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, tensors only.

    Args:
        path: of the file.
        configuration: digest that the run must have.

    Raises:
        DatasetError: `checkpoint-invalid` or `run-mismatch`.
    """
    try:
        state: Any = torch.load(io.BytesIO(_payload(path)), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise DatasetError("checkpoint-invalid", f"expected only tensors and numbers in {path}, found more") from error
    if not isinstance(state, dict):
        raise DatasetError("checkpoint-invalid", f"expected a checkpoint at {path}, found something else in it")
    if state.get("configuration") != configuration:
        raise DatasetError(
            "run-mismatch", f"expected a checkpoint of this configuration, {path} is of another: choose another --out"
        )
    return state


def _payload(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError("checkpoint-invalid", f"expected a checkpoint at {path}, found: {error.strerror}") from error
    head = len(MARK) + DIGEST_BYTES
    payload = data[head:]
    if not data.startswith(MARK) or data[len(MARK) : head] != hashlib.sha256(payload).digest():
        raise DatasetError("checkpoint-invalid", f"expected a whole checkpoint at {path}, found it damaged")
    return payload
