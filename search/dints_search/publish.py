"""Publish: finished runs become a zoo entry, complete or not at all.

The weights that are evaluated are the weights that ship: `metrics.json` is measured on the exported ONNX files through
the appliance's runtime and holds their SHA-256.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import tomli_w

from dints_deploy.catalog.catalog import LoadedEntry, load_entry
from dints_deploy.catalog.dataset import Dataset
from dints_deploy.catalog.entry import Entry
from dints_deploy.catalog.weights import SUMS_FILE, write_sums
from dints_deploy.errors import DatasetError, UsageError
from dints_deploy.files import make_folder, sync_folder, write_bytes, write_text
from dints_deploy.runtime.evaluate import Evaluation, evaluate, unseen_cases
from dints_deploy.runtime.sessions import open_sessions
from dints_search.card import RECIPE_FILE, Described, write_card
from dints_search.evaluate import entry_of
from dints_search.export import Exported, certificate, export_network
from dints_search.network import DiNTSNetwork, count_gmac, count_parameters
from dints_search.plan import UNSAID
from dints_search.recipe import Recipe
from dints_search.run import trained_network

MANY_WINDOWS: Final = 1_000


def publish(
    runs: list[Path],
    name: str,
    dataset: Dataset,
    out: Path,
    *,
    version: str = "1.0.0",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Export, prove, evaluate and describe runs of one recipe and genotype as `out/name`.

    Raises:
        UsageError: `entry-exists`. DatasetError: the runs do not belong together, or parity fails.
    """
    target = out / name
    if target.exists():
        raise UsageError("entry-exists", f"expected no {target} yet: remove it or choose another --name")
    trained = [trained_network(run) for run in runs]
    configs = [config for config, _ in trained]
    if len({(config.genotype, config.recipe.model_dump_json()) for config in configs}) != 1:
        raise DatasetError("run-mismatch", "expected runs of one recipe and one genotype")
    check_words(configs[0].recipe)
    spec = entry_of(configs, name, version)
    seen = tuple(case for case in dataset.cases if case.id in configs[0].cases)
    exports = [export_network(network, spec, seen) for _, network in trained]
    make_folder(out)
    with tempfile.TemporaryDirectory(dir=out, prefix=".publishing-") as work:
        staged = Path(work) / name
        staged.mkdir()
        write_weights(staged, spec, exports, runs[0])
        recipe = configs[0].recipe.model_dump(mode="json", exclude_none=True)
        write_text(staged / RECIPE_FILE, tomli_w.dumps(recipe))
        write_text(staged / SUMS_FILE, write_sums(staged))
        metrics = measure(load_entry(staged), dataset, progress)
        write_text(staged / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        described = _described(trained[0][1], spec)
        write_text(staged / "card.md", write_card(spec, configs, metrics, exports, described))
        write_text(staged / SUMS_FILE, write_sums(staged))
        load_entry(staged)
        shutil.move(staged, target)
    sync_folder(out)
    return target


def _described(network: DiNTSNetwork, spec: Entry) -> Described:
    """Return what the card says of a network."""
    genotype = network.genotype
    origin = genotype.about or genotype.source or "of unknown origin"
    return Described(count_parameters(network), count_gmac(network, spec.window), origin)


def check_words(recipe: Recipe) -> None:
    """Refuse a planned recipe whose words nobody has completed.

    Raises:
        DatasetError: `recipe-invalid`.
    """
    if unsaid := [name for name, words in UNSAID.items() if getattr(recipe, name) == words]:
        raise DatasetError(
            "recipe-invalid",
            f"expected a person's words for {', '.join(unsaid)} in the recipe, found the planner's: complete the "
            "recipe's file, and those lines of the run's config.toml",
        )


def write_weights(folder: Path, spec: Entry, exports: list[Exported], run: Path) -> None:
    """Write what makes the entry run: description, genotype, networks, certificate, parity inputs."""
    write_text(folder / "entry.toml", tomli_w.dumps(spec.model_dump(mode="json", exclude_none=True)))
    shutil.copyfile(run / "genotype.json", folder / "genotype.json")
    for member, exported in zip(spec.members, exports, strict=True):
        write_bytes(folder / member.onnx, exported.onnx)
    write_text(folder / "parity.json", certificate(exports))
    buffer = io.BytesIO()
    arrays = {f"logits{n}": exported.logits for n, exported in enumerate(exports)}
    np.savez_compressed(buffer, allow_pickle=False, windows=exports[0].windows, **arrays)
    write_bytes(folder / "parity_inputs.npz", buffer.getvalue())


def measure(entry: LoadedEntry, dataset: Dataset, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Evaluate the ONNX files in fp32 on the cases that no member was trained on."""
    fold = entry.spec.training.fold if entry.spec.training else None
    weights = {member.onnx: entry.digests[member.onnx] for member in entry.spec.members}
    about: dict[str, Any] = {"dataset": dataset.name, "fold": fold, "onnx_sha256": weights}
    try:
        cases = unseen_cases(dataset, entry.spec, fold)
    except DatasetError as fault:
        if fault.code != "cases-seen":
            raise
        return {**about, "summary": None, "note": "every case was trained on by a member: no unbiased score exists"}
    sessions = open_sessions(entry, windows=MANY_WINDOWS)
    result: Evaluation = evaluate(cases, entry.spec, sessions, progress=progress)
    info = sessions[0].info
    return {**about, "engine": info.engine, "version": info.version, "precision": info.precision, **result.as_dict()}
