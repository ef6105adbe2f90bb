"""What is asked for must fit together before a run folder is opened: windows and levels, the device."""

from __future__ import annotations

import torch

from dints_deploy.errors import DatasetError, UsageError
from dints_search.recipe import Recipe


def check_fits(recipe: Recipe, depths: int) -> None:
    """Refuse a recipe whose window a network of this many levels cannot take.

    Raises:
        DatasetError: `recipe-invalid`.
    """
    advice = "give --set 'window=[I,J,K]', or a network of fewer levels"
    _check_window("a window", recipe.window, depths, advice)
    _check_deepest(recipe.window, depths, recipe.retraining.precision, "--set 'retraining.precision=\"fp32\"'")


def check_search_fits(recipe: Recipe) -> None:
    """Refuse a search whose patches do not fit its levels, or which would find networks that the window does not fit.

    Raises:
        DatasetError: `recipe-invalid`.
    """
    settings = recipe.search
    _check_window("a search window", search_window(recipe), settings.num_depths, "give --window or fewer --depths")
    _check_deepest(search_window(recipe), settings.num_depths, settings.precision, "--precision fp32")
    check_fits(recipe, settings.num_depths)


def search_window(recipe: Recipe) -> tuple[int, int, int]:
    """Return the voxels of a patch in the search."""
    return recipe.search.window or recipe.window


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        UsageError: `usage`.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError as fault:
        raise UsageError("usage", f"expected --device cpu, cuda or cuda:N, found {device}") from fault
    if wanted.type not in ("cpu", "cuda"):
        raise UsageError("usage", f"expected --device cpu, cuda or cuda:N, found {device}")
    count = torch.cuda.device_count() if wanted.type == "cuda" else 0
    if wanted.type == "cuda" and (wanted.index or 0) >= count:
        there = f"has {count} GPUs, cuda:0 the first" if count else "has no GPU"
        raise UsageError("usage", f"expected --device cpu on this machine, which {there}, found {device}")


def check_precision(precision: str, device: str) -> None:
    """Refuse fp16 without a GPU: a CPU computes it slowly, and bf16 there needs no scaled gradients.

    Raises:
        DatasetError: `recipe-invalid`.
    """
    if precision == "fp16" and torch.device(device).type == "cpu":
        raise DatasetError("recipe-invalid", "expected fp32 or bf16 on a CPU, found fp16: give --precision bf16")


def _check_window(what: str, window: tuple[int, int, int], depths: int, advice: str) -> None:
    multiple = 2**depths
    if any(n % multiple for n in window):
        raise DatasetError(
            "recipe-invalid",
            f"expected {what} of multiples of {multiple} for {depths} levels, found {window}: {advice}",
        )


def _check_deepest(window: tuple[int, int, int], depths: int, precision: str, advice: str) -> None:
    """Refuse a last level that is too small to normalise, or that bf16 convolutions on a CPU compute wrongly.

    Over an axis i of exactly two voxels, their weight gradients read memory that was never written (torch 2.13 with
    oneDNN 3.12): NaN, or 1e37.
    """
    deepest = tuple(n // 2**depths for n in window)
    if max(deepest) < 2:
        raise DatasetError(
            "recipe-invalid",
            f"expected more voxels at the deepest level than {deepest}: choose a larger window or fewer levels",
        )
    if precision == "bf16" and deepest[0] == 2:
        raise DatasetError(
            "recipe-invalid",
            f"expected more than two voxels along i at the deepest level for bf16, found {deepest}: choose a larger "
            f"window, fewer levels, or {advice}",
        )
