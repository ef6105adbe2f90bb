"""A tiny synthetic task in MSD layout, a recipe and a genotype that train on it in seconds, and runs to interrupt."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch

from dints_deploy.catalog.dataset import read_dataset
from dints_deploy.imaging.nifti import write_nifti
from dints_deploy.imaging.volume import Volume
from dints_search.genotype import OPERATIONS, Genotype, parse_genotype
from dints_search.recipe import Recipe, read_recipe
from dints_search.retrain import retrain
from dints_search.search import search
from dints_search.search_run import with_search
from tests.tiny_entry import Fields, entry_fields

SIZE = (14, 12, 13)
WINDOW = (12, 12, 12)

PROCESSES = multiprocessing.get_context("forkserver")
"""Starts clean processes that have torch imported already."""
PROCESSES.set_forkserver_preload(["dints_search.retrain", "torch._dynamo", "tests.tiny_task"])


def write_task(folder: Path, cases: int = 10, *, seed: int = 0) -> Path:
    """Write `cases` scans of a bright ball in noise, labelled 1 in its outer and 2 in its inner part."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    ids = [f"ball_{number:03}" for number in range(cases)]
    for number, case in enumerate(ids):
        write_case(folder, case, np.random.default_rng((seed, number)))
    write_description(folder, ids)
    return folder


def write_case(folder: Path, case: str, rng: np.random.Generator) -> None:
    """Write one case's image and label."""
    centre = np.array(SIZE) / 2 + rng.uniform(-1.5, 1.5, 3)
    distance = np.sqrt(sum((index - c) ** 2 for index, c in zip(np.indices(SIZE), centre, strict=True)))
    label = (distance < 4.5).astype(np.uint8) + (distance < 2.5)
    image = 2.0 * label + rng.normal(0, 0.3, SIZE)
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    write_nifti(folder / "imagesTr" / f"{case}.nii.gz", Volume(image.astype(np.float32)[np.newaxis], affine))
    write_nifti(folder / "labelsTr" / f"{case}.nii.gz", Volume(label.astype(np.uint8)[np.newaxis], affine))


def write_description(folder: Path, ids: list[str], **changes: Any) -> None:
    """Write `dataset.json`."""
    pairs = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in ids]
    description: Fields = {
        "name": "Balls",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "shell", "2": "core"},
        "training": pairs,
    }
    (folder / "dataset.json").write_text(json.dumps(description | changes), encoding="utf-8")


def write_recipe(path: Path, **retraining: Any) -> Path:
    """Write a recipe for the tiny task; `retraining` changes how it is trained."""
    fields = entry_fields(window=list(WINDOW), not_for="Anything else.", schema_version=1)
    fields["channels"][0]["intensity"] = {"scheme": "zscore"}
    for key in ("name", "version", "members"):
        del fields[key]
    settings: Fields = {"steps": 8, "channel_multiplier": 0.125, "warmup_steps": 2, "checkpoint_every": 3}
    path.write_text(tomli_w.dumps(fields | {"task": "Balls", "retraining": settings | retraining}), encoding="utf-8")
    return path


def tiny_recipe(folder: Path, **retraining: Any) -> Recipe:
    """Return the recipe of the tiny task, written in `folder` on the way."""
    return read_recipe(write_recipe(folder / "recipe.toml", **retraining))


def tiny_genotype() -> Genotype:
    """Return two blocks of two levels with every node and edge active."""
    fields = {
        "schema_version": 1,
        "num_blocks": 2,
        "num_depths": 2,
        "up": "conv_first",
        "operations": list(OPERATIONS),
        "edge_in_level": [0, 1, 0, 1],
        "edge_out_level": [0, 0, 1, 1],
        "node_active": [[1, 1]] * 3,
        "edge_active": [[1, 1, 1, 1]] * 2,
        "edge_operation": [[1, 0, 0, 2], [3, 0, 0, 4]],
    }
    return parse_genotype(json.dumps(fields))


def write_genotype(path: Path) -> Path:
    """Write the tiny genotype."""
    path.write_text(tiny_genotype().to_json(), encoding="utf-8")
    return path


def train(folder: Path, *, resume: bool = False, stop_at: int = 0, **retraining: Any) -> Path:
    """Train the tiny task that lies in `folder` to `folder/run`; the target of a process that a test kills.

    Args:
        folder: holds `task/`; gets the run.
        resume: continue an interrupted run.
        stop_at: after this step write `folder/reached` and wait to be killed.
        retraining: of the recipe.
    """
    torch.set_num_threads(1)

    def wait(step: int, loss: float, rate: float) -> None:
        if step == stop_at:
            (folder / "reached").touch()
            time.sleep(600)

    recipe = tiny_recipe(folder, **retraining)
    task = read_dataset(folder / "task")
    return retrain(recipe, tiny_genotype(), task, folder / "run", fold=0, seed=3, resume=resume, report=wait)


def search_tiny(folder: Path, *, resume: bool = False, stop_at: int = 0, **settings: Any) -> Path:
    """Search on the tiny task that lies in `folder` to `folder/run`, with arguments as those of `train`."""
    torch.set_num_threads(1)

    def wait(step: int, figures: object) -> None:
        if step == stop_at:
            (folder / "reached").touch()
            time.sleep(600)

    recipe = tiny_search_recipe(folder, **settings)
    task = read_dataset(folder / "task")
    search(recipe, task, folder / "run", fold=0, seed=3, resume=resume, report=wait)
    return folder / "run"


def tiny_search_recipe(folder: Path, **settings: Any) -> Recipe:
    """Return the recipe of the tiny task with a search of two blocks and two levels."""
    space = {"num_blocks": 2, "num_depths": 2, "channel_multiplier": 0.125, "memory": "reference"}
    steps = {"steps": 8, "batch": 2, "precision": "fp32", "checkpoint_every": 3}
    return with_search(tiny_recipe(folder), **space | steps | settings)


def die_at(step: int, target: Callable[..., Path], folder: Path, **options: Any) -> None:
    """Run `train` or `search_tiny` in a process of its own until a step, then end it with SIGKILL."""
    process = PROCESSES.Process(target=target, args=(folder,), kwargs={"stop_at": step, **options})
    process.start()
    while process.is_alive() and not (folder / "reached").exists():
        time.sleep(0.02)
    (folder / "reached").unlink()
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise AssertionError(f"expected training to be killed, found exit code {process.exitcode}")


def train_and_die(folder: Path, step: int, **options: Any) -> None:
    """Train in a process of its own until a step, then end it with SIGKILL."""
    die_at(step, train, folder, **options)


def train_apart(folder: Path, target: Callable[..., Path] = train, **options: Any) -> Path:
    """Train, or search, in a process of its own to the end and return the run folder."""
    process = PROCESSES.Process(target=target, args=(folder,), kwargs=options)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise AssertionError(f"expected training to end, found exit code {process.exitcode}")
    return folder / "run"
