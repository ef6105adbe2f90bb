"""A search's run folder: what was asked for, which cases learn what, and what came out.

RUN/  config.toml  checkpoint.pt  metrics.jsonl  events/  then  genotype.json  architecture.safetensors  report.md
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import tomli_w
from pydantic import Field, ValidationError
from safetensors.torch import load_file, save

from dints_deploy.catalog.dataset import Case
from dints_deploy.catalog.strict import Strict, faults, read_toml
from dints_deploy.errors import DatasetError
from dints_deploy.files import make_folder, sha256_file, write_bytes, write_text
from dints_search.recipe import Recipe
from dints_search.run import commit, mismatch
from dints_search.searching import Searching
from dints_search.space import ArchitectureParameters, SearchSpace

ARCHITECTURE_FILE = "architecture.safetensors"

SHARED_WITH_RETRAINING: Final = ("augmentation", "foreground")
"""Settings of the retraining that the search's patches are drawn with too."""


@dataclass(frozen=True)
class Parts:
    """A fold's training part, split: what the weights learn from, what the architecture learns from, and the rest.

    Attributes:
        weights: train1 of the paper. architecture: train2. held_out: for choices and for the discretisation gap.
    """

    weights: tuple[Case, ...]
    architecture: tuple[Case, ...]
    held_out: tuple[Case, ...]


class SearchConfig(Strict):
    """Everything that decides what a search computes.

    Attributes:
        processes: that share every batch.
        weights, architecture, held_out: id -> SHA-256 of the image of the cases of each part.
        labels: id -> SHA-256 of the label of every case; none in searches of before they were kept.
        commit: of the code, for the record.
    """

    schema_version: Literal[1]
    recipe: Recipe
    fold: int
    seed: int
    processes: int
    weights: dict[str, str]
    architecture: dict[str, str]
    held_out: dict[str, str]
    labels: dict[str, str] = Field(default_factory=dict, exclude_if=lambda labels: not labels)
    commit: str

    def digest(self) -> str:
        """Return a digest of what decides the result; a checkpoint belongs to exactly one."""
        fields = self.model_dump(mode="json", exclude={"commit"})
        retraining = fields["recipe"]["retraining"]  # what comes after the search does not decide it
        fields["recipe"]["retraining"] = {name: retraining[name] for name in SHARED_WITH_RETRAINING}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def split_training(cases: Sequence[Case], *, seed: int, held_out: float) -> Parts:
    """Split a fold's training part at random: at least one case held out, the rest halved.

    Raises:
        DatasetError: `dataset-invalid` with fewer than three cases.
    """
    if len(cases) < 3:
        raise DatasetError("dataset-invalid", f"expected at least 3 training cases to search on, found {len(cases)}")
    order = random.Random(seed).sample(list(cases), len(cases))
    out = min(max(1, round(held_out * len(order))), len(order) - 2)
    half = (len(order) - out + 1) // 2
    rest = order[out:]
    return Parts(*(tuple(sorted(part, key=lambda case: case.id)) for part in (rest[:half], rest[half:], order[:out])))


def with_search(recipe: Recipe, **changes: Any) -> Recipe:
    """Return the recipe with other search settings; those that are None stay as they are.

    Raises:
        DatasetError: `recipe-invalid`.
    """
    wanted = {name: value for name, value in changes.items() if value is not None}
    try:
        settings = Searching.model_validate(recipe.search.model_dump() | wanted)
    except ValidationError as fault:
        raise DatasetError("recipe-invalid", f"expected other search settings: {faults(fault)}") from fault
    return recipe.model_copy(update={"search": settings})


def configure_search(recipe: Recipe, parts: Parts, *, fold: int, seed: int, processes: int) -> SearchConfig:
    """Return the configuration of a search on these parts."""
    split = (parts.weights, parts.architecture, parts.held_out)
    digests = [{case.id: sha256_file(case.image) for case in part} for part in split]
    return SearchConfig(
        schema_version=1,
        recipe=recipe,
        fold=fold,
        seed=seed,
        processes=processes,
        weights=digests[0],
        architecture=digests[1],
        held_out=digests[2],
        labels={case.id: sha256_file(case.label) for part in split for case in part},
        commit=commit(),
    )


def check_search(folder: Path, config: SearchConfig, *, resume: bool) -> SearchConfig:
    """Return the configuration to search with: this one, less what the search in the folder never said.

    Raises:
        DatasetError: `run-mismatch` when something else is there already.
    """
    if not (folder / "config.toml").exists():
        return config
    kept = read_search_config(folder)
    if not kept.labels:
        config = config.model_copy(update={"labels": {}})
    if kept.digest() != config.digest():
        raise mismatch(folder, kept, config)
    if not resume:
        raise DatasetError("run-mismatch", f"{folder} holds a search already: give --resume or choose another --out")
    return config


def open_search(folder: Path, config: SearchConfig) -> None:
    """Create the run folder, unless it is there; only once the cases are read, so that a bad one leaves none behind."""
    path = folder / "config.toml"
    if not path.exists():
        make_folder(folder)
        write_text(path, tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))


def read_search_config(folder: Path) -> SearchConfig:
    """Read a search's configuration; raise `DatasetError` (`recipe-invalid`) when it is none."""
    return read_toml(folder / "config.toml", SearchConfig, DatasetError, "recipe-invalid")


def write_architecture(folder: Path, parameters: ArchitectureParameters) -> None:
    """Keep alpha_c and alpha_a, so that other networks can be decoded later."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parameters.state_dict().items()}
    write_bytes(folder / ARCHITECTURE_FILE, save(tensors))


def read_architecture(folder: Path) -> ArchitectureParameters:
    """Return the architecture parameters of a finished search.

    Raises:
        DatasetError: `checkpoint-invalid` when the search is not finished.
    """
    settings = read_search_config(folder).recipe.search
    parameters = ArchitectureParameters(SearchSpace(settings.num_blocks, settings.num_depths))
    path = folder / ARCHITECTURE_FILE
    if not path.is_file():
        raise DatasetError("checkpoint-invalid", f"expected a finished search at {folder}: --resume it")
    parameters.load_state_dict(load_file(path))
    return parameters
