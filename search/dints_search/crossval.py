"""Five-fold cross-validation: every case is predicted by a network that never saw it. Folds that are done are kept.

OUT/  fold0/ ... fold4/  a run folder each, with evaluation.json once it is measured;  crossval.json at the end
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dints_deploy.catalog.dataset import FOLDS, Dataset
from dints_deploy.catalog.entry import Label
from dints_deploy.errors import UsageError
from dints_deploy.files import write_text
from dints_search.dataset import check_accepted, check_dataset
from dints_search.evaluate import evaluate_run
from dints_search.genotype import Genotype
from dints_search.recipe import Recipe
from dints_search.retrain import retrain
from dints_search.run import WEIGHTS
from dints_search.world import started

EVALUATION = "evaluation.json"
SUMMARY = "crossval.json"

Report = Callable[[int, int, int], None]
"""Called with (fold, steps done, steps in all)."""


@dataclass(frozen=True)
class Spread:
    """A score over folds: mean and standard deviation of the folds' means, and the mean over all cases."""

    mean: float | None
    deviation: float | None
    over_cases: float | None


@dataclass(frozen=True)
class CrossValidation:
    """Scores by label value; the folds they come from.

    Attributes:
        folds: fold -> the mean Dice over labels of its validation part.
        dice: label value -> spread. nsd: the same for the surface Dice.
        mean_dice: of the mean over labels.
    """

    folds: dict[int, float | None]
    dice: dict[int, Spread]
    nsd: dict[int, Spread]
    mean_dice: Spread

    def as_dict(self) -> dict[str, Any]:
        """Return everything ready for JSON."""
        labels = {str(v): {"dice": vars(self.dice[v]), "nsd": vars(self.nsd[v])} for v in self.dice}
        return {"folds": {str(k): v for k, v in self.folds.items()}, "labels": labels, "mean": vars(self.mean_dice)}


def crossval(
    recipe: Recipe,
    genotype: Genotype,
    dataset: Dataset,
    out: Path,
    *,
    folds: Sequence[int] = tuple(range(FOLDS)),
    seed: int = 0,
    device: str = "cpu",
    cache: Path | None = None,
    report: Report = lambda fold, done, steps: None,
) -> CrossValidation:
    """Train and measure the folds that are not done yet in `out`, and sum up all that are.

    Raises:
        DatasetError: as for `retrain` and `evaluate_run`; `run-mismatch` where `out` holds another configuration.
        UsageError: several processes.
    """
    if started() > 1:
        raise UsageError(
            "usage",
            f"expected crossval in one process, found {started()} under torchrun: train fold N with torchrun and "
            f"`dints-deploy retrain --fold N --out {out}/foldN`; crossval then measures the folds and sums them up",
        )
    for fold in folds:
        dataset.fold(fold)  # refuses one that does not exist before another is trained
    check_dataset(dataset, recipe)
    check_accepted(dataset.cases, recipe)
    done, evaluations = measured_folds(out), {}
    for fold in [*done, *(fold for fold in folds if fold not in done)]:  # refusals first: they take no time
        run = out / f"fold{fold}"

        def step(done: int, loss: float, rate: float, fold: int = fold) -> None:
            report(fold, done, recipe.retraining.steps)

        # a finished fold is resumed too: it computes nothing, but refuses another configuration
        retrain(
            recipe, genotype, dataset, run, fold=fold, seed=seed, resume=True, device=device, cache=cache, report=step
        )
        if not (run / EVALUATION).exists():
            _, evaluation = evaluate_run(run, dataset, fold, device=device)
            write_text(run / EVALUATION, json.dumps(evaluation.as_dict(), indent=1) + "\n")
        evaluations[fold] = json.loads((run / EVALUATION).read_text(encoding="utf-8"))
    result = sum_up(dict(sorted(evaluations.items())), recipe.labels)
    write_text(out / SUMMARY, json.dumps(result.as_dict(), indent=1) + "\n")
    return result


def measured_folds(out: Path) -> list[int]:
    """Return the folds that are trained and measured already."""
    return [n for n in range(FOLDS) if all((out / f"fold{n}" / name).exists() for name in (WEIGHTS, EVALUATION))]


def sum_up(evaluations: dict[int, dict[str, Any]], labels: Sequence[Label]) -> CrossValidation:
    """Return mean and spread per label of evaluations by fold, each as `Evaluation.as_dict` gives it."""

    def spread(value: int, score: str) -> Spread:
        means = [e["summary"]["labels"][str(value)][score] for e in evaluations.values()]
        cases = [case[str(value)][score] for e in evaluations.values() for case in e["cases"].values()]
        return Spread(_mean(means), _deviation(means), _mean(cases))

    means = {fold: e["summary"]["mean"]["dice"] for fold, e in evaluations.items()}
    dice, nsd = ({label.value: spread(label.value, score) for label in labels} for score in ("dice", "nsd"))
    overall = Spread(
        _mean(list(means.values())), _deviation(list(means.values())), _mean([d.over_cases for d in dice.values()])
    )
    return CrossValidation(means, dice, nsd, overall)


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return statistics.fmean(known) if known else None


def _deviation(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return statistics.stdev(known) if len(known) > 1 else None
