"""A run folder: what was asked for, so that a run can resume, be evaluated and be published.

RUN/  config.toml  genotype.json  checkpoint.pt  metrics.jsonl  events/  then  curves.png  weights.safetensors
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Literal

import tomli_w
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dints_deploy.catalog.dataset import Case
from dints_deploy.catalog.strict import Strict, read_toml
from dints_deploy.errors import DatasetError
from dints_deploy.files import make_folder, sha256_file, write_text
from dints_search.genotype import Genotype, read_genotype
from dints_search.network import DiNTSNetwork
from dints_search.recipe import Recipe

WEIGHTS: Final = "weights.safetensors"
"""The weights to publish, which a finished run has."""


class RunConfig(Strict):
    """Everything that decides what a training run computes.

    Attributes:
        processes: that share every batch.
        cases: id -> SHA-256 of the image, the cases trained on. labels: id -> SHA-256 of the label; none in runs of
            before they were kept.
        origin: SHA-256 of the weights that the training began with, where those were a finished run's.
        teachers: SHA-256 of the weights of the runs whose opinion it learned.
        known: id -> SHA-256 of the image of further cases, which those runs were trained on.
        commit: of the code, for the record; it does not decide whether a checkpoint fits.
    """

    schema_version: Literal[1]
    recipe: Recipe
    genotype: str
    fold: int | None
    seed: int
    processes: int = Field(default=1, exclude_if=lambda count: count == 1)
    cases: dict[str, str]
    labels: dict[str, str] = Field(default_factory=dict, exclude_if=lambda labels: not labels)
    origin: str | None = Field(default=None, exclude_if=lambda origin: origin is None)
    teachers: tuple[str, ...] = Field(default=(), exclude_if=lambda teachers: not teachers)
    known: dict[str, str] = Field(default_factory=dict, exclude_if=lambda known: not known)
    commit: str

    @property
    def all_cases(self) -> dict[str, str]:
        """Return every case that the weights depend on: id -> SHA-256 of the image."""
        return self.known | self.cases

    def digest(self) -> str:
        """Return a digest of what decides the result; a checkpoint belongs to exactly one."""
        text = json.dumps(self.model_dump(mode="json", exclude={"commit"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def configure(
    recipe: Recipe, genotype: Genotype, cases: tuple[Case, ...], *, fold: int | None, seed: int, processes: int = 1
) -> RunConfig:
    """Return the configuration of a run on these training cases."""
    return RunConfig(
        schema_version=1,
        recipe=recipe,
        genotype=genotype.digest(),
        fold=fold,
        seed=seed,
        processes=processes,
        cases=image_digests(cases),
        labels={case.id: sha256_file(case.label) for case in cases},
        commit=commit(),
    )


def check_run(folder: Path, config: RunConfig, *, resume: bool) -> RunConfig:
    """Return the configuration to run with: this one, less what the run in the folder never said.

    Raises:
        DatasetError: `run-mismatch` when something else is there already.
    """
    if not (folder / "config.toml").exists():
        if (folder / WEIGHTS).exists():
            raise DatasetError(
                "run-mismatch", f"expected {folder} to say how its weights were trained: choose another --out"
            )
        return config
    kept = read_config(folder)
    if not kept.labels:
        config = config.model_copy(update={"labels": {}})
    if (folder / WEIGHTS).exists():  # nothing is left to compute, so it no longer matters how many would share it
        config = config.model_copy(update={"processes": kept.processes})
    if kept.digest() != config.digest():
        raise mismatch(folder, kept, config)
    if not resume:
        raise DatasetError("run-mismatch", f"{folder} holds a run already: give --resume or choose another --out")
    return config


def mismatch(folder: Path, kept: Strict, config: Strict) -> DatasetError:
    """Return the error that a run folder holds another configuration, which names where the two differ."""
    names = (name for name in type(config).model_fields if name != "commit")
    other = ", ".join(name for name in names if getattr(kept, name) != getattr(config, name))
    return DatasetError(
        "run-mismatch",
        f"expected {folder} to hold this configuration, found another ({other}): give the same options, or "
        "choose another --out",
    )


def open_run(folder: Path, config: RunConfig, genotype: Genotype) -> None:
    """Create the run folder, unless it is there; only once the cases are read, so that a bad one leaves none behind."""
    if (folder / "config.toml").exists():
        return
    make_folder(folder)
    write_text(folder / "genotype.json", genotype.to_json())
    write_text(folder / "config.toml", tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))


def image_digests(cases: Iterable[Case]) -> dict[str, str]:
    """Return id -> SHA-256 of the image."""
    return {case.id: sha256_file(case.image) for case in cases}


def seen_cases(config: RunConfig, cases: Mapping[str, str]) -> list[str]:
    """Return the ids of those cases (id -> digest) that a run was trained on, known by id or by content."""
    known = config.all_cases
    digests = set(known.values())
    return [case for case, digest in cases.items() if case in known or digest in digests]


def read_config(folder: Path) -> RunConfig:
    """Read a run's configuration; raise `DatasetError` (`checkpoint-invalid`, `recipe-invalid`) when there is none."""
    if not (folder / "config.toml").is_file():
        raise DatasetError(
            "checkpoint-invalid", f"expected the folder of a run, found no config.toml in {folder}: see --out"
        )
    return read_toml(folder / "config.toml", RunConfig, DatasetError, "recipe-invalid")


def build_network(config: RunConfig, genotype: Genotype) -> DiNTSNetwork:
    """Return the untrained network of a run."""
    recipe = config.recipe
    return DiNTSNetwork(
        genotype,
        in_channels=len(recipe.channels),
        num_classes=len(recipe.labels) + 1,
        channel_multiplier=recipe.retraining.channel_multiplier,
    )


def finished_weights(folder: Path) -> Path:
    """Return where a finished run's weights lie; raise `DatasetError` (`checkpoint-invalid`) when it has none."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise DatasetError("checkpoint-invalid", f"expected a finished run at {folder}, found no weights: --resume it")
    return path


def trained_network(folder: Path) -> tuple[RunConfig, DiNTSNetwork]:
    """Return a finished run's configuration and its network with the published (averaged) weights, ready to infer.

    Raises:
        DatasetError: `checkpoint-invalid` when the run is not finished or its weights are damaged, `run-mismatch` when
            its genotype is not the one that was trained.
    """
    config, path = read_config(folder), finished_weights(folder)
    genotype = read_genotype(folder / "genotype.json")
    if genotype.digest() != config.genotype:
        raise DatasetError("run-mismatch", f"expected the genotype that was trained in {folder}, found another")
    network = build_network(config, genotype)
    try:
        weights: dict[str, Tensor] = load_file(path)
        network.load_state_dict(weights)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise DatasetError("checkpoint-invalid", f"expected the run's weights at {path}, found: {error}") from error
    return config, network.eval()


def commit() -> str:
    """Return the commit of the checkout this code runs from, with `+` when it has changes, or an empty text."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")
