"""Checkpoints: whole or not at all, tensors only, and bound to the configuration that wrote them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from dints_deploy.errors import DatasetError
from dints_deploy.files import replacing


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain numbers durably; the old checkpoint stays until the new one is whole.

    Raises:
        OutputError: `disk-full` or `output-unwritable`; the old checkpoint is untouched.
    """
    with replacing(path) as partial:
        try:
            torch.save(state, partial)
        except RuntimeError as error:  # torch hides the file system's error behind its own
            raise OSError(
                28 if "No space" in str(error) or "unexpected pos" in str(error) else 5, str(error)
            ) from error


def load_checkpoint(path: Path, configuration: str) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, tensors only.

    Args:
        path: of the file.
        configuration: digest that the run must have.

    Raises:
        DatasetError: `checkpoint-invalid` or `run-mismatch`.
    """
    try:
        _check_whole(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive or pickle fails in any way
        raise DatasetError("checkpoint-invalid", f"expected a checkpoint at {path}, found: {error}") from error
    if not isinstance(state, dict):
        raise DatasetError("checkpoint-invalid", f"expected a checkpoint at {path}, found something else in it")
    if state.get("configuration") != configuration:
        raise DatasetError(
            "run-mismatch", f"expected a checkpoint of this configuration, {path} is of another: choose another --out"
        )
    return state


def _check_whole(path: Path) -> None:
    """Refuse an archive with a changed byte: torch writes the checksums of its records, but does not read them."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"a wrong checksum of {damaged}")
