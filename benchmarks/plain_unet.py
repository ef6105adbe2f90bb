"""A plain U-Net, trained on the patches of a shipped entry's recipe and measured on its unseen cases: the peer to beat.

    python -m benchmarks.plain_unet --data Task04_Hippocampus --entry zoo/hippocampus --steps 6000

The U-Net is MONAI's DynUNet with two convolutions a level, at full resolution too. Cases, preparation, augmentation,
loss, optimiser, schedule and averaging are those of `dints-deploy retrain`; it has no teachers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, Final

import torch
from monai.networks.nets import DynUNet
from torch import nn

from benchmarks.bootstrap import paired_interval
from benchmarks.machine import write
from dints_deploy.catalog.catalog import read_entry
from dints_deploy.catalog.dataset import Dataset, read_dataset
from dints_deploy.catalog.entry import Entry
from dints_deploy.cli.console import progress
from dints_deploy.runtime.evaluate import Evaluation, evaluate
from dints_search.augment import Augmenter
from dints_search.dataset import Patches, load_cases
from dints_search.recipe import Recipe, read_recipe, with_steps
from dints_search.retrain import batches, start, train_step
from dints_search.torch_engine import TorchSession

FILTERS: Final = (16, 32, 64, 128)
"""Channels of each level; the first is at full resolution."""


def plain_unet(in_channels: int, num_classes: int) -> nn.Module:
    """Return an untrained U-Net."""
    levels = len(FILTERS)
    network: nn.Module = DynUNet(
        3,
        in_channels,
        num_classes,
        kernel_size=[3] * levels,
        strides=[1, *[2] * (levels - 1)],
        upsample_kernel_size=[2] * (levels - 1),
        filters=FILTERS,
        norm_name=("INSTANCE", {"affine": True}),
    )
    return network


def train(recipe: Recipe, dataset: Dataset, fold: int, seed: int) -> nn.Module:
    """Return the averaged U-Net after training on the fold's training part, as `dints_search.retrain` trains."""
    settings = recipe.retraining
    patches = Patches(
        load_cases(dataset.fold(fold)[0], recipe.preparation, recipe.label_names),
        window=recipe.window,
        foreground=settings.foreground,
        augmenter=Augmenter(settings.augmentation, recipe.channels),
        seed=seed,
        length=settings.steps * settings.batch,
    )
    torch.manual_seed(seed)
    state = start(plain_unet(len(recipe.channels), len(recipe.labels) + 1), settings)
    with progress("plain U-Net") as bar:
        for image, label in batches(patches, settings.batch, first=0):
            loss, _ = train_step(state, image, label, settings)
            bar(state.step, settings.steps, f"loss {loss:.3f}")
    return state.average


def compare(unet: Evaluation, spec: Entry, metrics: dict[str, Any], parameters: int, steps: int) -> dict[str, Any]:
    """Return the table of both, and how sure their difference is."""
    cases, summary = metrics["cases"], metrics["summary"]["mean"]
    ours, theirs = (
        [statistics.fmean(d for d in dice if d is not None) for dice in each]
        for each in (
            [[label["dice"] for label in case.values()] for case in cases.values()],
            [list(unet.cases[case].dice.values()) for case in cases],
        )
    )
    found = paired_interval(ours, theirs)
    said = f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f}): {found.verdict}"
    mean = unet.summary
    rows = [
        [f"{spec.name} {spec.version}", f"{summary['dice']:.4f}", f"{summary['nsd']:.4f}", said],
        [f"plain U-Net, {parameters / 1e6:.2f} M, {steps} steps", f"{mean.mean_dice:.4f}", f"{mean.mean_nsd:.4f}", ""],
    ]
    about = f"Mean Dice and NSD on {len(cases)} unseen cases; the difference with its 95 % interval over the cases."
    return {"about": about, "columns": ["network", "Dice", "NSD", "difference in Dice"], "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the task's folder in MSD layout")
    parser.add_argument(
        "--entry", type=Path, default=Path("zoo/hippocampus"), help="folder of the entry to compare with"
    )
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    spec = read_entry(options.entry)
    metrics = json.loads((options.entry / "metrics.json").read_text(encoding="utf-8"))
    recipe = with_steps(read_recipe(options.entry / "recipe.toml"), options.steps)
    dataset, begun = read_dataset(options.data), time.monotonic()
    network = train(recipe, dataset, metrics["fold"], options.seed)
    minutes = (time.monotonic() - begun) / 60
    unet = evaluate(dataset.fold(metrics["fold"])[1], spec, [TorchSession(network)])
    table = compare(unet, spec, metrics, sum(p.numel() for p in network.parameters()), options.steps)
    facts = {"training of the U-Net": f"{minutes:.0f} min on {torch.get_num_threads()} threads, seed {options.seed}"}
    title = "A plain U-Net, trained on the same patches"
    command = f"python -m benchmarks.plain_unet --data Task04_Hippocampus --steps {options.steps}"
    print(
        write("plain_unet", {"title": title, "page": "accuracy", "command": command, "tables": [table], "facts": facts})
    )


if __name__ == "__main__":
    main()
