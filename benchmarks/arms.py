"""One arm of the comparison of search with chance: a network found or drawn, retrained, measured, and recorded."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal

from pydantic import Field

from benchmarks.machine import description
from dints_deploy.catalog.dataset import Dataset
from dints_deploy.catalog.strict import Strict, read_json
from dints_deploy.errors import DatasetError
from dints_deploy.files import make_folder, write_text
from dints_search.choice import Choice, deployed_setting
from dints_search.conclude import conclude, report
from dints_search.cost import CostTable, work_table
from dints_search.evaluate import evaluate_run
from dints_search.gap import GAP_FILE, GapTable, measure_retrained, read_gap
from dints_search.genotype import Genotype, parse_genotype, read_genotype
from dints_search.matched import sample_within
from dints_search.metrics import read_metrics
from dints_search.profile import Counts, count
from dints_search.recipe import Recipe
from dints_search.retrain import retrain
from dints_search.run import check_run, commit, configure, read_config
from dints_search.search import search
from dints_search.search_run import (
    Parts,
    check_search,
    configure_search,
    read_search_config,
    split_training,
    with_search,
)
from dints_search.searching import Searching
from dints_search.space import SearchSpace

TOLERANCE: Final = 0.05
"""Share of the target's multiply-adds by which a random network's may differ."""


@dataclass(frozen=True)
class Plan:
    """What all arms of one experiment share.

    Attributes:
        recipe: with the experiment's search and retraining settings.
        out: where the run folders go. records: where the results are written.
        target: name of the searched arm whose work the random networks match.
    """

    recipe: Recipe
    dataset: Dataset
    fold: int
    out: Path
    records: Path
    device: str
    target: str

    @property
    def space(self) -> SearchSpace:
        """Return the space of all arms."""
        return SearchSpace(self.recipe.search.num_blocks, self.recipe.search.num_depths)

    @property
    def work(self) -> CostTable:
        """Return the multiply-adds of the pieces of the networks that are retrained."""
        return work_table(deployed_setting(self.recipe, self.space))

    def parts(self, seed: int) -> Parts:
        """Return the split of the fold's training part."""
        training, _ = self.dataset.fold(self.fold)
        return split_training(training, seed=seed, held_out=self.recipe.search.held_out)


@dataclass(frozen=True)
class Arm:
    """One network to measure: a search's at a sigma, or a random one with a number."""

    kind: Literal["searched", "random"]
    figure: float
    seed: int

    @property
    def group(self) -> str:
        """Return the arm's name without its seed."""
        return f"sigma-{self.figure:g}" if self.kind == "searched" else f"random-{self.figure:g}"

    @property
    def name(self) -> str:
        """Return the arm's name."""
        return f"{self.group}-seed-{self.seed}"


class Record(Strict):
    """What an arm found, as it is kept in docs/results.

    Attributes:
        settings: of the recipe, search and retraining, that decide the result.
        cost: parameters, gmac, saved_mib and their published forms.
        draws: random networks looked at until one had the wanted cost.
        scores: of `Evaluation.as_dict`: summary, and Dice and NSD per case.
        gap: of a searched arm.
        labels: name of each label value.
        search_commit, retrain_commit: of the code that searched and that trained; `commit` is of what measured.
    """

    schema_version: Literal[1]
    arm: str
    kind: Literal["searched", "random"]
    figure: float
    seed: int
    task: str
    fold: int
    commit: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    genotype: dict[str, Any]
    cost: dict[str, float]
    draws: int | None
    search_s: float | None
    retrain_s: float
    scores: dict[str, Any]
    gap: GapTable | None
    labels: dict[int, str] = Field(default_factory=dict)
    search_commit: str | None = None
    retrain_commit: str | None = None


class SearchRecord(Strict):
    """What an arm's search found, kept as soon as it is known: retraining may go on elsewhere.

    Attributes:
        settings: of the search. seconds: of its iterations, by the median, so that pauses do not count.
        gap: without the retrained network. commit: of the code that searched.
    """

    schema_version: Literal[1]
    settings: dict[str, Any]
    genotype: dict[str, Any]
    seconds: float
    gap: GapTable
    commit: str


def run_arm(plan: Plan, arm: Arm) -> Record:
    """Bring an arm to its end, from wherever an earlier run left it, and record it."""
    folder = plan.out / arm.name
    found = _searched(plan, arm, folder) if arm.kind == "searched" else None
    genotype, draws = (parse_genotype(json.dumps(found.genotype)), None) if found else _drawn(plan, arm)
    run = folder / "retrained"
    held_out = [case.id for case in plan.parts(arm.seed).held_out]
    if not _trained(plan, arm, genotype, run, held_out):
        options: dict[str, Any] = {"fold": plan.fold, "seed": arm.seed, "device": plan.device, "without": held_out}
        resume = (run / "config.toml").exists()
        retrain(plan.recipe, genotype, plan.dataset, run, resume=resume, report=_say("retrain", 100), **options)
    _, evaluation = evaluate_run(run, plan.dataset, plan.fold, progress=lambda done, total: None)
    gap = measure_retrained(found.gap, run, plan.dataset, device=plan.device) if found else None
    record = Record(
        schema_version=1,
        arm=arm.name,
        kind=arm.kind,
        figure=arm.figure,
        seed=arm.seed,
        task=plan.recipe.task,
        fold=plan.fold,
        commit=commit(),
        machine=description() | {"threads": _threads(), "device": plan.device},
        settings=settings_of(plan, arm),
        genotype=json.loads(genotype.to_json()),
        cost=_cost(count(genotype, deployed_setting(plan.recipe, plan.space))),
        draws=draws,
        search_s=found.seconds if found else None,
        retrain_s=_retrain_seconds(run),
        scores=evaluation.as_dict(),
        gap=gap,
        labels=plan.recipe.label_names,
        search_commit=found.commit if found else None,
        retrain_commit=read_config(run).commit,
    )
    write_text(make_folder(plan.records) / record_path(plan, arm).name, record.model_dump_json(indent=1) + "\n")
    return record


def record_path(plan: Plan, arm: Arm) -> Path:
    """Return where an arm's record lies."""
    return plan.records / f"{arm.name}.json"


def read_record(path: Path) -> Record:
    """Read a record; raise `DatasetError` (`recipe-invalid`) when it is none."""
    return read_json(path, Record, DatasetError, "recipe-invalid")


def settings_of(plan: Plan, arm: Arm) -> dict[str, Any]:
    """Return what decides an arm's result, beside the code."""
    recipe = _recipe(plan, arm)
    retraining = recipe.retraining.model_dump(mode="json")
    return {
        "task": recipe.task,
        "fold": plan.fold,
        "window": list(recipe.window),
        "search": recipe.search.model_dump(mode="json") if arm.kind == "searched" else None,
        "retraining": retraining,
        "matched_to": _target(plan).digest() if arm.kind == "random" else None,
    }


def _recipe(plan: Plan, arm: Arm) -> Recipe:
    return with_search(plan.recipe, sigma=arm.figure) if arm.kind == "searched" else plan.recipe


def _searched(plan: Plan, arm: Arm, folder: Path) -> SearchRecord:
    """Search, decode, measure the gap and keep all that; what is done already is not done again."""
    path, recipe = plan.records / "searches" / f"{arm.name}.json", _recipe(plan, arm)
    settings = recipe.search.model_dump(mode="json")
    if path.exists():
        kept = read_json(path, SearchRecord, DatasetError, "recipe-invalid")
        if Searching.model_validate_json(json.dumps(kept.settings)) != recipe.search:
            raise SystemExit(f"the search of {arm.name} was recorded with other settings: choose another --records")
        return kept
    config = configure_search(recipe, plan.parts(arm.seed), fold=plan.fold, seed=arm.seed, processes=1)
    check_search(folder, config, resume=True)
    if not (folder / GAP_FILE).exists():
        options: dict[str, Any] = {"fold": plan.fold, "seed": arm.seed, "device": plan.device}
        resume = (folder / "config.toml").exists()
        found = search(recipe, plan.dataset, folder, resume=resume, report=_say("search", 50), **options)
        chosen = conclude(folder, found.network.architecture, recipe, Choice())
        report(folder, found, recipe, chosen)
    record = SearchRecord(
        schema_version=1,
        settings=settings,
        genotype=json.loads(read_genotype(folder / "genotype.json").to_json()),
        seconds=_search_seconds(folder),
        gap=read_gap(folder),
        commit=read_search_config(folder).commit,
    )
    make_folder(path.parent)
    write_text(path, record.model_dump_json(indent=1) + "\n")
    return record


def _trained(plan: Plan, arm: Arm, genotype: Genotype, run: Path, held_out: Sequence[str]) -> bool:
    """Say whether a run is finished; raise `DatasetError` (`run-mismatch`) where it is one with other settings."""
    cases = tuple(case for case in plan.dataset.fold(plan.fold)[0] if case.id not in held_out)
    config = configure(plan.recipe, genotype, cases, fold=plan.fold, seed=arm.seed)
    check_run(run, config, resume=True)
    return (run / "weights.safetensors").exists()


def _drawn(plan: Plan, arm: Arm) -> tuple[Genotype, int]:
    """Draw a random network of the target's work; the same arm draws the same one."""
    target = _target(plan)
    rng = random.Random(f"{plan.target} {arm.group}")
    matched = sample_within(plan.space, rng, plan.work, plan.work.of(target), tolerance=TOLERANCE)
    return matched.genotype.model_copy(update={"up": target.up, "direct_skip": target.direct_skip}), matched.draws


def _target(plan: Plan) -> Genotype:
    """Return the network whose work the random ones match."""
    path = plan.records / "searches" / f"{plan.target}.json"
    return parse_genotype(json.dumps(read_json(path, SearchRecord, DatasetError, "recipe-invalid").genotype))


def _cost(counts: Counts) -> dict[str, float]:
    return {name: float(getattr(counts, name)) for name in Counts.__dataclass_fields__}


def _search_seconds(folder: Path) -> float:
    """Return the seconds of a search's iterations: of each phase its median iteration times their number."""
    phases: dict[str, list[float]] = {}
    for line in read_metrics(folder):
        phases.setdefault(str(line["phase"]), []).append(float(line["seconds"]))
    return sum(median(seconds) * len(seconds) for seconds in phases.values())


def _retrain_seconds(run: Path) -> float:
    """Return the seconds of a run's steps: the median span of the log's lines times their number."""
    times = [json.loads(line)["time"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    spans = [after - before for before, after in pairwise(times) if after > before]
    return median(spans) * len(times) if spans else 0.0


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _say(stage: str, every: int) -> Any:
    """Return a report that prints a line now and then."""

    def say(step: int, *figures: Any) -> None:
        if step % every == 0:
            print(f"  {stage} {step}: {figures[0]}", flush=True)

    return say
