"""The discretisation gap of a real, tiny search: what is measured is the networks, on cases that nothing has seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dints_deploy.catalog.dataset import Dataset, read_dataset
from dints_deploy.errors import DatasetError
from dints_deploy.runtime.evaluate import evaluate
from dints_search.choice import Choice, Chosen
from dints_search.conclude import conclude
from dints_search.decode import DECODERS
from dints_search.evaluate import entry_of
from dints_search.gap import (
    INHERITED,
    RETRAINED,
    SEARCH_NETWORK,
    all_decoded,
    measure_gap,
    measure_retrained,
    read_gap,
    within_work,
    write_gap,
)
from dints_search.genotype import Genotype
from dints_search.recipe import Recipe
from dints_search.report import actual_cost, renew_gap, write_report
from dints_search.retrain import retrain
from dints_search.run import configure
from dints_search.search import Found, search
from dints_search.torch_engine import TorchSession
from tests.tiny_task import tiny_search_recipe, write_task

BUDGET_GMAC = 0.0025


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gap")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    return tiny_search_recipe(folder, steps=30, learning_rate=0.1, rate_warmup_steps=1)


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return read_dataset(write_task(folder / "task"))


@pytest.fixture(scope="module")
def found(folder: Path, recipe: Recipe, dataset: Dataset) -> Found:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = search(recipe, dataset, folder / "search", fold=0)
    torch.set_num_threads(threads)
    return result


@pytest.fixture(scope="module")
def chosen(folder: Path, recipe: Recipe, found: Found) -> Chosen:
    return conclude(folder / "search", found.network.architecture, recipe, Choice(max_gmac=BUDGET_GMAC))


def test_every_network_is_measured_with_the_weights_that_it_inherits(
    folder: Path, recipe: Recipe, dataset: Dataset, found: Found, chosen: Chosen
) -> None:
    before = {name: value.clone() for name, value in found.network.state_dict().items()}
    genotypes = all_decoded(found.network, chosen)
    table = measure_gap(found.network, genotypes, found.parts.held_out, recipe)

    assert [row.name for row in table.rows] == ["", *DECODERS, f"{BUDGET_GMAC:g} GMAC"]
    assert table.rows[0].stage == SEARCH_NETWORK
    training, validation = dataset.fold(0)
    assert {case.id for case in training} >= set(table.cases)
    assert not {case.id for case in validation} & set(table.cases)
    spec = entry_of([configure(recipe, chosen.genotype, (), fold=0, seed=0)], "by-hand")
    for name in ("dints", f"{BUDGET_GMAC:g} GMAC"):
        genotype = genotypes[name]
        assert isinstance(genotype, Genotype)
        network = found.network.inherit(genotype)
        by_hand = evaluate(found.parts.held_out, spec, [TorchSession(network)]).summary
        assert table.dice(INHERITED, name) == by_hand.mean_dice
    assert found.network.training
    assert all(torch.equal(value, before[name]) for name, value in found.network.state_dict().items())

    write_gap(folder / "search", table)
    assert read_gap(folder / "search") == table


def test_after_retraining_the_same_cases_are_measured_and_only_by_a_network_that_has_not_seen_them(
    folder: Path, recipe: Recipe, dataset: Dataset, found: Found, chosen: Chosen
) -> None:
    decoded = {"mine": chosen.genotype.model_copy(update={"direct_skip": True})}
    table = measure_gap(found.network, decoded, found.parts.held_out, recipe)
    retrain(recipe, chosen.genotype, dataset, folder / "seen", fold=0)
    with pytest.raises(DatasetError, match="expected a run without the held-out cases"):
        measure_retrained(table, folder / "seen", dataset)
    retrain(recipe, chosen.genotype, dataset, folder / "unseen", fold=0, without=table.cases)
    more = measure_retrained(table, folder / "unseen", dataset)
    assert more.rows[-1].digest == chosen.genotype.digest()
    assert more.dice(RETRAINED, "mine") is not None
    assert measure_retrained(more, folder / "unseen", dataset) == more  # a second time it takes its place


def test_the_report_says_what_was_asked_found_and_lost(
    folder: Path, recipe: Recipe, found: Found, chosen: Chosen
) -> None:
    place = folder / "search"
    gap = measure_gap(found.network, all_decoded(found.network, chosen), found.parts.held_out, recipe)
    said = write_report(place, chosen, gap).read_text(encoding="utf-8")
    for picture in ("architecture.png", "relaxation.png", "curves.png"):
        assert f"]({picture})" in said
        assert (place / picture).stat().st_size > 5000
    assert f"| {SEARCH_NETWORK} | all | {gap.rows[0].dice:.4f} |" in said
    assert f"at most {BUDGET_GMAC:g} GMAC: predicted {chosen.predicted:.4g}, the network takes" in said
    assert actual_cost(chosen.genotype, recipe, "GMAC") == pytest.approx(chosen.predicted, rel=1e-9)
    for setting in ("sigma", "architecture_rate", "commit", "held_out"):
        assert f"| {setting} |" in said
    assert "Not measured" in write_report(place, chosen).read_text(encoding="utf-8")
    renew_gap(place, gap)
    assert (place / "report.md").read_text(encoding="utf-8") == said


def test_a_smaller_budget_gives_a_smaller_network(recipe: Recipe, found: Found) -> None:
    edges = []
    for gmac in (BUDGET_GMAC, 2 * BUDGET_GMAC):
        genotype = within_work(found.network, recipe, gmac)
        assert isinstance(genotype, Genotype)
        assert actual_cost(genotype, recipe, "GMAC") <= gmac
        edges.append(sum(map(sum, genotype.edge_active)))
    assert edges == sorted(edges)
