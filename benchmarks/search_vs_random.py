"""Does the search beat chance? Searched and random networks of about the same work, retrained alike, on unseen cases.

    python -m benchmarks.search_vs_random --data Task04_Hippocampus --out runs

The arms are one search for each sigma, and random feasible networks whose multiply-adds are within 5 % of the network
found at sigma 0.5. Each is retrained with the same budget, without the cases that its gap is measured on, and evaluated
on the fold's validation part. A finished arm leaves a record and is skipped from then on; an unfinished one goes on
where it stopped, so the script may be ended and started at any time. `python -m benchmarks.results` writes the page.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.arms import Arm, Plan, read_record, record_path, run_arm, settings_of
from benchmarks.machine import ROOT
from dints_deploy.catalog.dataset import read_dataset
from dints_search.recipe import Recipe, find_recipe
from dints_search.search_run import with_search

TARGET_SIGMA = 0.5


def main(arguments: list[str] | None = None) -> None:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(options.threads)
    plan = plan_of(options)
    arms = arms_of(options)
    for arm in arms:
        if record_path(plan, arm).exists():
            check_record(plan, arm)
            print(f"{arm.name}: recorded", flush=True)
        elif not options.list:
            begun = time.perf_counter()
            print(f"{arm.name}: begins", flush=True)
            mean = run_arm(plan, arm).scores["summary"]["mean"]
            print(f"{arm.name}: Dice {mean['dice']:.4f} after {time.perf_counter() - begun:.0f} s", flush=True)
        else:
            print(f"{arm.name}: to do")


def plan_of(options: argparse.Namespace) -> Plan:
    """Return what the arms share."""
    target = Arm("searched", TARGET_SIGMA, options.seeds[0])
    return Plan(
        recipe=recipe_of(options),
        dataset=read_dataset(options.data),
        fold=options.fold,
        out=options.out,
        records=options.records,
        device=options.device,
        target=target.name,
    )


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Return the task's recipe with the experiment's settings."""
    recipe = with_search(
        find_recipe(options.task),
        steps=options.search_steps,
        channel_multiplier=options.search_width,
        architecture_rate=options.architecture_rate,
        up=options.up,
        precision=options.precision,
        num_blocks=options.blocks,
        num_depths=options.depths,
    )
    wanted = {"steps": options.retrain_steps, "channel_multiplier": options.width, "precision": options.precision}
    retraining = recipe.retraining.model_copy(update={k: v for k, v in wanted.items() if v is not None})
    return recipe.model_copy(update={"retraining": retraining})


def arms_of(options: argparse.Namespace) -> list[Arm]:
    """Return the arms, seed by seed; the one that the random networks are matched to comes first."""
    sigmas = sorted(options.sigmas, key=lambda sigma: sigma != TARGET_SIGMA)
    arms: list[Arm] = []
    for seed in options.seeds:
        arms += [Arm("searched", sigma, seed) for sigma in sigmas]
        arms += [Arm("random", number, seed) for number in range(options.random)]
    return arms


def check_record(plan: Plan, arm: Arm) -> None:
    """Stop where a record was made with other settings: the arms would not be comparable."""
    if read_record(record_path(plan, arm)).settings != settings_of(plan, arm):
        raise SystemExit(f"{arm.name} was recorded with other settings: choose another --records folder")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the task's folder in MSD layout")
    parser.add_argument("--out", type=Path, required=True, help="where the run folders go")
    parser.add_argument("--records", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--task", default="4")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.2, 0.5, 0.8])
    parser.add_argument("--random", type=int, default=3, help="number of random networks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--search-steps", type=int, default=900)
    parser.add_argument("--retrain-steps", type=int, default=1500)
    parser.add_argument("--width", type=float, default=0.25, help="channel multiplier of the retrained networks")
    parser.add_argument("--search-width", type=float, help="the same of the search network; the recipe's without")
    parser.add_argument("--architecture-rate", type=float, help="of alpha; the recipe's without")
    parser.add_argument("--up", choices=["reference", "conv_first"])
    parser.add_argument("--precision", choices=["fp32", "bf16"])
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--depths", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--list", action="store_true", help="say what is recorded and what is to do")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
