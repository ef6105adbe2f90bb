"""The discretisation gap: what is lost on the way from the search network to one that is decoded, then retrained.

All networks are measured through the appliance's runtime on cases of the training part that no step of the search has
seen. The fold's validation part has no say in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from pydantic import Field
from torch import nn

from dints_deploy.catalog.dataset import Case, Dataset
from dints_deploy.catalog.entry import Entry
from dints_deploy.catalog.strict import Strict, read_json
from dints_deploy.errors import DatasetError
from dints_deploy.files import write_text
from dints_deploy.runtime.evaluate import evaluate
from dints_search.budget import decode_within
from dints_search.choice import BUDGETS, Chosen, deployed_setting
from dints_search.decode import DECODERS, Infeasible
from dints_search.evaluate import entry_of
from dints_search.genotype import Genotype
from dints_search.recipe import Recipe
from dints_search.run import RunConfig, trained_network
from dints_search.supernet import Supernet
from dints_search.torch_engine import TorchSession

GAP_FILE: Final = "gap.json"

SEARCH_NETWORK: Final = "search network"
INHERITED: Final = "decoded"
RETRAINED: Final = "retrained"
WITHIN: Final = "at most"
"""How the name of a network that was decoded under a budget begins."""

Progress = Callable[[int, int], None]
"""Called with (networks measured, networks in all)."""


class GapRow(Strict):
    """One network's scores on the held-out cases; a choice that makes no network has a reason instead.

    Attributes:
        stage: the search network, a network with inherited weights, or a retrained one.
        name: of the decoder.
        digest: of the genotype's edges and operations.
        dice, nsd: mean over the cases, then over the labels.
        dice_by_label: mean over the cases by label value.
        edges: active ones.
        reason: why there is no network.
    """

    stage: str
    name: str = ""
    digest: str = ""
    edges: int = 0
    dice: float | None = None
    nsd: float | None = None
    dice_by_label: dict[int, float | None] = Field(default_factory=dict)
    reason: str = ""


class GapTable(Strict):
    """The gap of one search: the cases it was measured on, and a row for every network."""

    schema_version: int = 1
    cases: tuple[str, ...]
    rows: tuple[GapRow, ...]

    def dice(self, stage: str, name: str = "") -> float | None:
        """Return the Dice of a row, None where there is none."""
        return next((row.dice for row in self.rows if (row.stage, row.name) == (stage, name)), None)


def all_decoded(supernet: Supernet, chosen: Chosen | None = None) -> dict[str, Genotype | Infeasible]:
    """Return the network of every decoder, and the chosen one under a budget by the budget's name."""
    parameters = supernet.architecture
    found: dict[str, Genotype | Infeasible] = {name: decoder(parameters) for name, decoder in DECODERS.items()}
    if chosen is not None and chosen.budget:
        found[f"{chosen.limit:g} {chosen.budget}"] = chosen.genotype
    return found


def within_work(supernet: Supernet, recipe: Recipe, gmac: float) -> Genotype | Infeasible:
    """Return the likeliest network of at most so many multiply-adds (10^9) for one window, as it would be retrained."""
    table = BUDGETS["max_gmac"].table(deployed_setting(recipe, supernet.space))
    return decode_within(supernet.architecture, table, gmac)


def measure_gap(
    supernet: Supernet,
    genotypes: Mapping[str, Genotype | Infeasible],
    cases: Sequence[Case],
    recipe: Recipe,
    *,
    device: str = "cpu",
    progress: Progress = lambda done, total: None,
) -> GapTable:
    """Measure the search network, and each decoded network with the weights that it inherits.

    Args:
        supernet: as the search left it.
        genotypes: by the name of what decoded them.
        cases: labelled, of the training part, seen by no step of the search.
        recipe: of the search.
        device: cpu or cuda:N.
        progress: called after every network.

    Raises:
        DatasetError: `case-invalid`, naming the case.
    """
    spec = _spec(recipe)
    rows = [_measured(supernet, cases, spec, device, GapRow(stage=SEARCH_NETWORK))]
    progress(1, len(genotypes) + 1)
    known: dict[str, GapRow] = {}  # two decoders often agree
    for number, (name, genotype) in enumerate(genotypes.items(), start=2):
        if isinstance(genotype, Infeasible):
            rows.append(GapRow(stage=INHERITED, name=name, reason=genotype.reason))
        else:
            digest, edges = topology_digest(genotype), sum(sum(row) for row in genotype.edge_active)
            if digest not in known:
                row = GapRow(stage=INHERITED, name=name, digest=digest, edges=edges)
                known[digest] = _measured(supernet.inherit(genotype), cases, spec, device, row)
            rows.append(known[digest].model_copy(update={"name": name}))
        progress(number, len(genotypes) + 1)
    return GapTable(cases=tuple(case.id for case in cases), rows=tuple(rows))


def measure_retrained(table: GapTable, run: Path, dataset: Dataset, *, device: str = "cpu") -> GapTable:
    """Return the table with one row more: a finished run of a decoded network, measured on the same cases.

    The row has the name of the decoder whose network it is.

    Raises:
        DatasetError: `cases-seen` when the run was trained on one of them, `checkpoint-invalid` when it is unfinished.
    """
    config, network = trained_network(run)
    if seen := [case for case in table.cases if case in config.all_cases]:
        raise DatasetError(
            "cases-seen", f"expected a run without the held-out cases, {run} was trained on {seen[0]}: retrain without"
        )
    cases = [case for case in dataset.cases if case.id in table.cases]
    genotype = network.genotype
    edges = sum(sum(row) for row in genotype.edge_active)
    digest = topology_digest(genotype)
    decoders = (row.name for row in table.rows if (row.stage, row.digest) == (INHERITED, digest))
    name = next(decoders, "another network")
    row = GapRow(stage=RETRAINED, name=name, digest=digest, edges=edges)
    measured = _measured(network, cases, entry_of([config], "gap"), device, row)
    others = tuple(row for row in table.rows if (row.stage, row.name) != (RETRAINED, name))
    return table.model_copy(update={"rows": (*others, measured)})


def keep_retrained(table: GapTable, folder: Path) -> GapTable:
    """Return the table with the retrained networks of the one in `folder`, where that is of the same cases.

    A search that is resumed after its end is measured again; retrainings since then are not.
    """
    if not (folder / GAP_FILE).is_file() or (kept := read_gap(folder)).cases != table.cases:
        return table
    return table.model_copy(update={"rows": (*table.rows, *(row for row in kept.rows if row.stage == RETRAINED))})


def topology_digest(genotype: Genotype) -> str:
    """Return the digest of what a decoder decides: edges and operations, not how their network is built."""
    return genotype.model_copy(update={"up": "reference", "direct_skip": False}).digest()


def write_gap(folder: Path, table: GapTable) -> None:
    """Keep the table in a search's folder."""
    write_text(folder / GAP_FILE, table.model_dump_json(indent=1) + "\n")


def read_gap(folder: Path) -> GapTable:
    """Return the table that a search's folder keeps; raise `DatasetError` (`recipe-invalid`) when it holds none."""
    return read_json(folder / GAP_FILE, GapTable, DatasetError, "recipe-invalid")


def _measured(network: nn.Module, cases: Sequence[Case], spec: Entry, device: str, row: GapRow) -> GapRow:
    training = network.training
    summary = evaluate(cases, spec, [TorchSession(network, device=device)]).summary
    network.train(training)
    scores = {"dice": summary.mean_dice, "nsd": summary.mean_nsd, "dice_by_label": dict(summary.dice)}
    return row.model_copy(update=scores)


def _spec(recipe: Recipe) -> Entry:
    """Return the entry that the search's networks would be: with the window that they were searched on."""
    window = recipe.search.window or recipe.window
    searched = recipe.model_copy(update={"window": window})
    config = RunConfig(schema_version=1, recipe=searched, genotype="", fold=None, seed=0, cases={}, commit="")
    return entry_of([config], "gap")
