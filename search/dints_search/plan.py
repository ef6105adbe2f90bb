"""From a fingerprint to a plan: a recipe whose every figure has a reason and can be changed in the file.

The rules are those of nnU-Net (Isensee et al., Nature Methods 2021), with DiNTS's memory in place of a U-Net's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import tomli_w
import torch

from dints_deploy.catalog.dataset import Dataset
from dints_deploy.catalog.entry import AXES, Accepts, Axis, Code, Label
from dints_deploy.catalog.preparation import Channel, Intensity, Triple, Window, ZScore
from dints_search.cost import Setting, memory_table
from dints_search.fingerprint import ChannelFacts, Fingerprint
from dints_search.recipe import Declared, Recipe, Retraining
from dints_search.space import SearchSpace

ANISOTROPIC: Final = 3.0
"""Ratio of spacings, and of sizes, from which the coarse axis is brought to its finer decile instead of its median."""

LARGEST_PATCH: Final = 256**3
"""Voxels of the patch that the search for one that fits starts from."""

SMALLEST_BATCH: Final = 2
LARGEST_BATCH: Final = 16

BATCH_SHARE: Final = 0.05
"""Of all voxels of the dataset that a batch may hold: more would be the same patches again."""

SKULL_STRIPPED: Final = 0.25
"""Share of voxels that are exactly zero from which a scan counts as cut out of its surroundings."""

TYPICAL_SHARE: Final = 0.5
"""Of the whole space's memory that a searched network keeps: the plan is made before there is one."""

DICOM_MODALITY: Final = {"ct": "CT", "pet": "PT", "pt": "PT", "us": "US"}
"""DICOM Modality by the first word of a channel's name in dataset.json; everything else is taken for MR."""

COLOURS: Final = ((230, 110, 40), (60, 130, 220), (90, 180, 90), (200, 60, 140), (240, 200, 60), (130, 90, 200))

UNSAID: Final = {
    "intended_use": "Say what scans this is for, and what for.",
    "not_for": "Say what it must not be used for.",
    "licence": "Say the licence of the data, which the weights inherit.",
}
"""What a planned recipe holds where only a person knows: it trains, but nothing is published with it."""

Sizes = tuple[int, int, int]


def plan(
    dataset: Dataset,
    facts: Fingerprint,
    *,
    start: Recipe | None = None,
    memory_bytes: int,
    channel_multiplier: float = 1.0,
    space: SearchSpace | None = None,
) -> tuple[Recipe, list[str]]:
    """Return a recipe for a dataset, and the reason of each planned figure in a line.

    Args:
        dataset: in MSD layout.
        facts: its fingerprint.
        start: keep this recipe's words, labels and training, which fit the dataset (`check_dataset`); without it a
            person completes what is made up.
        memory_bytes: bound of the activations that a training step keeps for the backward pass.
        channel_multiplier: of the networks.
        space: to search in; without it that of `start`, or D = 4, L = 12.
    """
    space = space or _space(start)
    spacing = target_spacing(facts)
    shape = np.round(np.array(facts.shape) * facts.spacing / spacing).astype(int)
    classes, precision = len(dataset.labels) + 1, torch.bfloat16

    def needs(patch: Sizes) -> float:
        setting = Setting(space, patch, len(dataset.channels), classes, channel_multiplier)
        return TYPICAL_SHARE * memory_table(setting, dtype=precision).whole(space.num_blocks)

    window, each = choose_window([int(n) for n in shape], spacing, 2**space.num_depths, needs, memory_bytes)
    batch = choose_batch(each, memory_bytes, int(np.prod(window)), facts.cases * int(np.prod(shape)))
    recipe = _describe(dataset, facts) if start is None else start
    channels = [
        channel.model_copy(update={"intensity": intensity, "fill": "minimum" if channel.modality == "CT" else "zero"})
        for channel, seen in zip(recipe.channels, facts.channels, strict=True)
        for intensity in [choose_intensity(channel.modality, seen)]
    ]
    sizes: dict[str, Any] = {"batch": batch, "channel_multiplier": channel_multiplier}
    single = {"precision": "fp32"} if window[0] == 2 * 2**space.num_depths else {}  # see fits.check_fits
    augmentation = recipe.retraining.augmentation.model_copy(update={"flat": flat_axis(window, spacing)})
    planned = recipe.model_copy(
        update={
            "spacing": spacing,
            "window": window,
            "channels": tuple(channels),
            "search": recipe.search.model_copy(update=single),
            "retraining": recipe.retraining.model_copy(update=sizes | single | {"augmentation": augmentation}),
        }
    )
    return planned, _reasons(facts, planned, [int(n) for n in shape], each, memory_bytes)


def _space(start: Recipe | None) -> SearchSpace:
    """Return the space that a recipe searches in, or the paper's."""
    return SearchSpace(12, 4) if start is None else SearchSpace(start.search.num_blocks, start.search.num_depths)


def target_spacing(facts: Fingerprint) -> Triple:
    """Return the spacing to train at: the median, or along a much coarser axis its finer decile."""
    spacing, coarse = list(facts.spacing), int(np.argmax(facts.spacing))
    others = [n for n in range(3) if n != coarse]
    apart = facts.spacing[coarse] >= ANISOTROPIC * max(facts.spacing[n] for n in others)
    flat = facts.shape[coarse] * ANISOTROPIC <= min(facts.shape[n] for n in others)
    if apart and flat:
        spacing[coarse] = max(facts.spacing_fine[coarse], *(facts.spacing[n] for n in others))
    return spacing[0], spacing[1], spacing[2]


def choose_window(
    shape: Sequence[int], spacing: Triple, multiple: int, needs: Any, memory_bytes: float
) -> tuple[Sizes, float]:
    """Return the largest patch whose smallest batch fits the memory, and the bytes of one patch of it.

    It starts as a cube in mm, no larger than the median scan, and loses a step of the axis that covers most of it.

    Args:
        shape: median scan at the target spacing, in voxels.
        spacing: mm.
        multiple: that every axis is a multiple of.
        needs: patch -> bytes that autograd keeps.
        memory_bytes: bound for a batch of SMALLEST_BATCH.
    """
    edge = (LARGEST_PATCH * float(np.prod(spacing))) ** (1 / 3)
    wanted = [
        min(int(np.ceil(n / multiple)), round(edge / mm / multiple)) for n, mm in zip(shape, spacing, strict=True)
    ]
    steps = [max(1, n) for n in wanted]
    if max(steps) < 2:
        steps[int(np.argmax(shape))] = 2  # a norm needs more than one voxel at the deepest level
    while True:
        patch = (steps[0] * multiple, steps[1] * multiple, steps[2] * multiple)
        each = needs(patch)
        covered = [n * multiple / size if n > 1 else 0 for n, size in zip(steps, shape, strict=True)]
        if each * SMALLEST_BATCH <= memory_bytes or sum(steps) <= 4:
            return patch, each
        steps[int(np.argmax(covered))] -= 1


def flat_axis(window: Sizes, spacing: Triple) -> Axis | None:
    """Return the axis along which patches have few voxels, or thick ones, beside both others; None where none has."""
    for longs in (spacing, tuple(1 / n for n in window)):
        axis = int(np.argmax(longs))
        if longs[axis] >= ANISOTROPIC * max(n for other, n in enumerate(longs) if other != axis):
            return AXES[axis]
    return None


def choose_batch(each_bytes: float, memory_bytes: float, patch_voxels: int, dataset_voxels: int) -> int:
    """Return as many patches as fit the memory, at least two, and at most a small share of the dataset."""
    fits = int(memory_bytes / each_bytes)
    most = int(BATCH_SHARE * dataset_voxels / patch_voxels)
    return max(SMALLEST_BATCH, min(fits, most, LARGEST_BATCH))


def choose_intensity(modality: str, seen: ChannelFacts) -> Intensity:
    """Return the scheme of a channel: fixed windows for CT, whose units mean something; the scan's own for others."""
    if modality == "CT":
        lower, upper = round(seen.lower), round(seen.upper)
        mean, std = round(seen.mean, 2), round(max(seen.std, 1e-3), 2)
        return Window(scheme="window", lower=lower, upper=max(upper, lower + 1), mean=mean, std=std)
    return ZScore(scheme="zscore", clip_percentiles=(0.5, 99.5), nonzero=seen.zeros > SKULL_STRIPPED)


def _reasons(facts: Fingerprint, recipe: Recipe, shape: list[int], each: float, memory_bytes: int) -> list[str]:
    size = " x ".join(str(n) for n in shape)
    lines = [
        f"{facts.cases} cases, median {' x '.join(f'{n:g}' for n in facts.shape)} voxels of "
        f"{' x '.join(f'{mm:g}' for mm in facts.spacing)} mm, anisotropy {facts.anisotropy:.1f}",
        f"spacing {recipe.spacing}: the median; along an axis {ANISOTROPIC:g} times coarser its finer decile",
        f"window {recipe.window}: of the median scan's {size} voxels there; a patch keeps about {each / 2**30:.2f} GiB",
        f"batch {recipe.retraining.batch}: {int(memory_bytes / each)} such patches fit {memory_bytes / 2**30:.2f} GiB; "
        f"within {SMALLEST_BATCH} .. {LARGEST_BATCH} and {BATCH_SHARE:.0%} of all voxels",
    ]
    if flat := recipe.retraining.augmentation.flat:
        lines.append(f"augmentation.flat {flat}: {ANISOTROPIC:g} times thicker, or fewer, voxels there than elsewhere")
    for channel, seen in zip(recipe.channels, facts.channels, strict=True):
        scheme = channel.intensity.scheme
        lines.append(
            f"{channel.name}: {scheme}; labelled voxels {seen.lower:g} .. {seen.upper:g} (0.5 and 99.5 %), median "
            f"{seen.median:g}, mean {seen.mean:.4g}, deviation {seen.std:.4g}; {seen.zeros:.0%} of a scan is zero"
        )
    for value, share in facts.labels.items():
        lines.append(f"label {value}: {share:.1%} of the labelled voxels, in all cases but {facts.absent[value]}")
    return lines


def _describe(dataset: Dataset, facts: Fingerprint) -> Recipe:
    """Return a recipe with what can be known of a task that nobody described; the words wait for a person."""
    return Recipe(
        schema_version=1,
        task=dataset.name,
        title=dataset.name,
        intended_use=UNSAID["intended_use"],
        not_for=UNSAID["not_for"],
        licence=UNSAID["licence"],
        dataset=Declared(modality=dataset.channels, labels=tuple(dataset.labels.values())),
        channels=tuple(_channel(name) for name in dataset.channels),
        labels=tuple(_label(value, name, facts) for value, name in dataset.labels.items()),
        window=(32, 32, 32),
        accepts=_accepts(dataset, facts),
        retraining=Retraining(steps=40_000, learning_rate=1e-3),
    )


def _channel(name: str) -> Channel:
    modality = DICOM_MODALITY.get(re.split(r"[^a-z]", name.lower())[0], "MR")
    plain = re.sub(r"[^A-Za-z0-9_.-]", "-", name)[:32].lstrip("_.-") or modality
    return Channel(name=plain, modality=modality, intensity=ZScore(scheme="zscore"))


def _label(value: int, name: str, facts: Fingerprint) -> Label:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or f"label-{value}"
    structure = Code(value="91723000", scheme="SCT", meaning="Anatomical Structure")
    private = Code(value=f"LABEL{value}", scheme="99DINTS", meaning=name[:64])
    colour = COLOURS[(value - 1) % len(COLOURS)]
    tolerance = max(target_spacing(facts))  # one voxel, until somebody says what readers differ by
    return Label(
        value=value,
        id=slug,
        name=name[:64],
        colour=colour,
        category=structure,
        type=private,
        nsd_tolerance=tolerance,
    )


def _accepts(dataset: Dataset, facts: Fingerprint) -> Accepts:
    def scaled(values: Triple, factor: float) -> Triple:
        i, j, k = (round(v * factor, 3) for v in values)
        return i, j, k

    return Accepts(
        modality=tuple(sorted({_channel(name).modality for name in dataset.channels})),
        extent_min=scaled(facts.extent_min, 0.7),
        extent_max=scaled(facts.extent_max, 1.4),
        spacing_min=scaled(facts.spacing_min, 0.5),
        spacing_max=scaled(facts.spacing_max, 1.5),
    )


def write_plan(recipe: Recipe, reasons: Sequence[str]) -> str:
    """Return a recipe file with the reasons as comments in front."""
    comments = "".join(f"# {line}\n" for line in ["Planned from the dataset; change what you like.", *reasons])
    return comments + "\n" + tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))
