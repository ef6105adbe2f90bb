"""The card of a zoo entry: what it is for and not for, how good it is, how it was made, how to repeat it."""

from __future__ import annotations

from string import Template
from typing import Any, Final, NamedTuple

from dints_deploy.catalog.entry import RESEARCH_USE, Entry
from dints_search.export import Exported
from dints_search.run import RunConfig

CARD: Final = Template("""# $title

**$research_use**

- For: $intended_use
- Not for: $not_for
- Labels: $labels
- Licence of the weights: $licence, that of the training data

## How good it is

$scores

## How it was made

- Task $task: $cases training cases of fold $fold. Their ids and digests are in `entry.toml`; `evaluate` refuses them.
  The training made no choice on the other cases of the fold, which the scores above are measured on.
- `genotype.json`: $origin.
- $members of it with channel multiplier $multiplier: $parameters M parameters and
  $gmac GMAC for a window of $window voxels.
- $steps steps of $batch, AdamW at $rate falling to zero, Dice + cross-entropy, $precision, seed $seed.
  The weights are the running average (EMA $ema) after the last step.$school
- Code of the training: commit `$commit`.
- Exported to ONNX; the largest difference of a logit to torch, over both CPU engines, is $parity (`parity.json`).

## Repeat it

```
$retrain
dints-deploy publish $runs --name $name --data $task --out my-zoo
```
""")

RECIPE_FILE: Final = "recipe.toml"
"""The recipe that an entry was trained with, beside the card that tells how to repeat it."""

MEMBERS: Final = ("The DiNTS network", "The mean of the logits of {} DiNTS networks, each that")
"""What runs: one network, or an ensemble."""


class Described(NamedTuple):
    """A member's parameters, its GMAC for one window, and where its genotype comes from."""

    parameters: int
    gmac: float
    origin: str


def write_card(
    spec: Entry, configs: list[RunConfig], metrics: dict[str, Any], exports: list[Exported], network: Described
) -> str:
    """Return the card's text.

    Args:
        spec: the entry.
        configs: of the runs; the first one tells how.
        metrics: as in `metrics.json`.
        exports: for the parity figures.
        network: what each member is.
    """
    config, retraining = configs[0], configs[0].recipe.retraining
    worst = max(comparison.max_abs_logit for exported in exports for comparison in exported.comparisons)
    return CARD.substitute(
        title=spec.title,
        name=spec.name,
        research_use=RESEARCH_USE,
        intended_use=spec.intended_use,
        not_for=spec.not_for,
        labels=", ".join(f"{label.value} {label.name}" for label in spec.labels),
        licence=spec.licence,
        scores=_scores(spec, metrics),
        task=config.recipe.task,
        cases=len({case for c in configs for case in c.cases}),
        members=MEMBERS[len(configs) > 1].format(len(configs)),
        fold=", ".join(dict.fromkeys(str(c.fold) for c in configs)),
        origin=network.origin,
        multiplier=f"{retraining.channel_multiplier:g}",
        parameters=f"{network.parameters / 1e6:.2f}",
        gmac=f"{network.gmac:.2f}",
        window=" x ".join(str(n) for n in spec.window),
        steps=retraining.steps,
        batch=_batch(config),
        rate=f"{retraining.learning_rate:g}",
        precision=retraining.precision,
        seed=", ".join(str(c.seed) for c in configs),
        ema=f"{retraining.ema:g}",
        school="".join(_school(c, several=len(configs) > 1) for c in configs),
        commit=config.commit,
        parity=f"{worst:.2g}",
        retrain="\n".join(
            _retrain(spec.name, c, run) for c, run in zip(configs, _runs(spec.name, configs), strict=True)
        ),
        runs=" ".join(f"--run {run}" for run in _runs(spec.name, configs)),
    )


def _runs(name: str, configs: list[RunConfig]) -> list[str]:
    """Return where the runs that repeat an entry's members go."""
    return [f"runs/{name}"] if len(configs) == 1 else [f"runs/{name}-{n}" for n in range(len(configs))]


def _retrain(name: str, config: RunConfig, run: str) -> str:
    """Return the command that trains a member again."""
    entry, data = f"zoo/{name}", config.recipe.task
    alone = config.processes == 1
    program = "dints-deploy" if alone else f"torchrun --nproc-per-node {config.processes} -m dints_deploy"
    school = ["--from RUN"] * bool(config.origin) + ["--teacher RUN"] * len(config.teachers)
    return (
        f"{program} retrain --genotype {entry}/genotype.json --task {entry}/{RECIPE_FILE} --data {data} \\\n"
        f"    {' '.join(['--fold', str(config.fold), '--seed', str(config.seed), *school, '--out', run])}"
    )


def _school(config: RunConfig, *, several: bool) -> str:
    """Say what a run built on: earlier weights, and teachers."""
    lines = []
    if config.origin:
        lines.append(f"The first weights were those of an earlier run (SHA-256 {config.origin}).")
    if config.teachers:
        share = f"{config.recipe.retraining.teaching:g} of the target was the mean opinion of earlier runs"
        lines.append(f"{share} (SHA-256 of their weights: {', '.join(config.teachers)}).")
    if config.known:
        lines.append(f"Those runs knew {len(config.known)} further cases, which `entry.toml` lists too.")
    which = f"Fold {config.fold}, seed {config.seed}: " if several else ""
    return "".join(f"\n- {which}{line}" for line in lines)


def _batch(config: RunConfig) -> str:
    """Say how many patches a step takes, of all processes together."""
    each = config.recipe.retraining.batch
    shared = f" ({each} in each of {config.processes} processes)" if config.processes > 1 else ""
    return f"{each * config.processes} patches{shared}"


def _scores(spec: Entry, metrics: dict[str, Any]) -> str:
    summary = metrics["summary"]
    if summary is None:
        return str(metrics["note"])
    rows = [
        f"{summary['cases']} unseen cases of fold {metrics['fold']}; {metrics['engine']}, {metrics['precision']}:",
        "",
        "| structure | Dice | NSD | tolerance |",
        "|---|---|---|---|",
    ]
    for label in spec.labels:
        scores = summary["labels"][str(label.value)]
        dice, nsd = _number(scores["dice"]), _number(scores["nsd"])
        rows.append(f"| {label.name} | {dice} | {nsd} | {label.nsd_tolerance:g} mm |")
    rows.append(f"| mean | {_number(summary['mean']['dice'])} | {_number(summary['mean']['nsd'])} | |")
    return "\n".join(rows)


def _number(score: float | None) -> str:
    """Return a score; a structure that is in no case, neither found nor missed, has none."""
    return "-" if score is None else f"{score:.4f}"
