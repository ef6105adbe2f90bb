"""Evaluate a training run through the appliance's runtime, before it is published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from dints_deploy.catalog.dataset import Dataset
from dints_deploy.catalog.entry import Entry, Member, Training
from dints_deploy.catalog.strict import faults
from dints_deploy.errors import DatasetError, UsageError
from dints_deploy.runtime.engine import Session
from dints_deploy.runtime.evaluate import Evaluation, check_labels, evaluate
from dints_search.fits import check_device
from dints_search.run import RunConfig, image_digests, seen_cases, trained_network
from dints_search.torch_engine import TorchSession

MODEL_FILE = "model.onnx"


def entry_of(configs: list[RunConfig], name: str, version: str = "0.0.0") -> Entry:
    """Return the entry that runs of one recipe would publish; several are an ensemble.

    Raises:
        UsageError: `usage` when the name or the version is not one that an entry may have.
    """
    recipe, folds = configs[0].recipe, {config.fold for config in configs}
    files = [MODEL_FILE] if len(configs) == 1 else [f"model{n}.onnx" for n in range(len(configs))]
    try:
        return Entry(
            schema_version=1,
            name=name,
            version=version,
            title=recipe.title,
            intended_use=recipe.intended_use,
            not_for=recipe.not_for,
            licence=recipe.licence,
            genotype="genotype.json",
            members=tuple(Member(onnx=f, fold=c.fold, seed=c.seed) for f, c in zip(files, configs, strict=True)),
            channels=recipe.channels,
            labels=recipe.labels,
            spacing=recipe.spacing,
            window=recipe.window,
            overlap=recipe.overlap,
            tta=recipe.tta,
            accepts=recipe.accepts,
            geometry=recipe.geometry,
            postprocess=recipe.postprocess,
            training=Training(
                task=recipe.task,
                fold=configs[0].fold if len(folds) == 1 else None,
                cases={case: digest for config in configs for case, digest in config.all_cases.items()},
                commit=configs[0].commit,
            ),
        )
    except ValidationError as fault:
        raise UsageError("usage", f"expected the name and version of an entry, found {faults(fault)}") from fault


def open_run_sessions(run: Path, *, device: str = "cpu") -> tuple[Entry, list[Session]]:
    """Return what a finished run would publish, and its network in torch, fp32; raises as `evaluate_run`."""
    check_device(device)
    config, network = trained_network(run)
    return entry_of([config], "run"), [TorchSession(network, device=device)]


def evaluate_run(
    run: Path,
    dataset: Dataset,
    fold: int | None = None,
    *,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Entry, Evaluation]:
    """Measure a finished run on the validation part of its fold, with torch in fp32.

    Raises:
        DatasetError: `cases-seen` when a case of that part was trained on, by id or by content; `dataset-invalid` when
            the dataset has other labels.
        UsageError: this machine has no such device.
    """
    check_device(device)
    config, network = trained_network(run)
    wanted = config.fold if fold is None else fold
    if wanted is None:
        raise DatasetError("fold-unknown", "expected --fold: the run was not trained on a fold")
    _, validation = dataset.fold(wanted)
    if known := seen_cases(config, image_digests(validation)):
        raise DatasetError(
            "cases-seen", f"expected unseen cases, the run was trained on {known[0]}: choose its own fold"
        )
    spec = entry_of([config], "run")
    check_labels(dataset, spec)
    return spec, evaluate(validation, spec, [TorchSession(network, device=device)], progress=progress)
