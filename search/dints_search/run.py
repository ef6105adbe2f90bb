"""A run folder: what was asked for, so that a run can resume, be evaluated and be published.

RUN/  config.toml  genotype.json  checkpoint.pt  metrics.jsonl  events/  then  curves.png  weights.safetensors
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Literal

import tomli_w
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


class RunConfig(Strict):
    """Everything that decides what a training run computes.

    Attributes:
        cases: id -> SHA-256 of the image, the cases trained on.
        commit: of the code, for the record; it does not decide whether a checkpoint fits.
    """

    schema_version: Literal[1]
    recipe: Recipe
    genotype: str
    fold: int | None
    seed: int
    cases: dict[str, str]
    commit: str

    def digest(self) -> str:
        """Return a digest of what decides the result; a checkpoint belongs to exactly one."""
        text = json.dumps(self.model_dump(mode="json", exclude={"commit"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def configure(recipe: Recipe, genotype: Genotype, cases: tuple[Case, ...], *, fold: int | None, seed: int) -> RunConfig:
    """Return the configuration of a run on these training cases."""
    digests = {case.id: sha256_file(case.image) for case in cases}
    return RunConfig(
        schema_version=1,
        recipe=recipe,
        genotype=genotype.digest(),
        fold=fold,
        seed=seed,
        cases=digests,
        commit=commit(),
    )


def open_run(folder: Path, config: RunConfig, genotype: Genotype, *, resume: bool) -> None:
    """Create the run folder, or check that it holds the same configuration.

    Raises:
        DatasetError: `run-mismatch` when something else is there already.
    """
    if (folder / "config.toml").exists():
        if read_config(folder).digest() != config.digest():
            raise DatasetError("run-mismatch", f"expected {folder} to hold this configuration: choose another --out")
        if not resume:
            raise DatasetError("run-mismatch", f"{folder} holds a run already: give --resume or choose another --out")
        return
    make_folder(folder)
    write_text(folder / "genotype.json", genotype.to_json())
    write_text(folder / "config.toml", tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))


def read_config(folder: Path) -> RunConfig:
    """Read a run's configuration; raise `DatasetError` (`recipe-invalid`) when it is none."""
    return read_toml(folder / "config.toml", RunConfig, DatasetError, "recipe-invalid")


def check_precision(recipe: Recipe, genotype: Genotype) -> None:
    """Refuse what torch computes wrongly: bf16 convolutions on a CPU over an axis i of exactly two voxels.

    Their weight gradients read memory that was never written (torch 2.13 with oneDNN 3.12): NaN, or 1e37.

    Raises:
        DatasetError: `recipe-invalid`.
    """
    deepest = recipe.window[0] // 2**genotype.num_depths
    if recipe.retraining.precision == "bf16" and deepest == 2:
        raise DatasetError(
            "recipe-invalid", "expected more than two voxels along i at the deepest level for bf16: use precision fp32"
        )


def build_network(config: RunConfig, genotype: Genotype) -> DiNTSNetwork:
    """Return the untrained network of a run."""
    recipe = config.recipe
    return DiNTSNetwork(
        genotype,
        in_channels=len(recipe.channels),
        num_classes=len(recipe.labels) + 1,
        channel_multiplier=recipe.retraining.channel_multiplier,
    )


def trained_network(folder: Path) -> tuple[RunConfig, DiNTSNetwork]:
    """Return a finished run's configuration and its network with the published (averaged) weights, ready to infer.

    Raises:
        DatasetError: `checkpoint-invalid` when the run is not finished or its weights are damaged, `run-mismatch` when
            its genotype is not the one that was trained.
    """
    config, path = read_config(folder), folder / "weights.safetensors"
    if not path.is_file():
        raise DatasetError("checkpoint-invalid", f"expected a finished run at {folder}, found no weights: --resume it")
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
