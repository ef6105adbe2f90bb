"""The results page says what its records say, and its intervals cover what they claim to cover."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from benchmarks.arms import Record
from benchmarks.bootstrap import paired_interval
from benchmarks.machine import ROOT
from benchmarks.results import compare, grouped, page, read_records, verdict
from dints_search.gap import GapRow, GapTable
from dints_search.space import SearchSpace, sample_genotype

CASES = [f"case_{n:02}" for n in range(40)]


def record(kind: str, figure: float, dice: list[float], *, seed: int = 0, gmac: float = 1.4546) -> Record:
    """Return a record of two labels that both have these Dice values."""
    scores = {c: {label: {"dice": d, "nsd": d} for label in ("1", "2")} for c, d in zip(CASES, dice, strict=True)}
    mean = sum(dice) / len(dice)
    label: dict[str, Any] = {"dice": mean, "nsd": mean, "left_out": 0}
    summary = {"cases": len(dice), "labels": {"1": label, "2": label}, "mean": {"dice": mean, "nsd": mean}}
    fields = {
        "schema_version": 1,
        "arm": f"{'sigma' if kind == 'searched' else 'random'}-{figure:g}-seed-{seed}",
        "kind": kind,
        "figure": figure,
        "seed": seed,
        "task": "Task04_Hippocampus",
        "fold": 0,
        "commit": "0123456789abcdef",
        "machine": {"processor": "one", "threads": 2, "device": "cpu"},
        "settings": {
            "window": [48, 64, 48],
            "search": None,
            "retraining": {"steps": 9, "batch": 2, "channel_multiplier": 0.25, "precision": "bf16"},
        },
        "genotype": json.loads(sample_genotype(SearchSpace(2, 2), random.Random(1)).to_json()),
        "cost": {"parameters": 9684779.0, "gmac": gmac, "saved_mib": 35.99},
        "draws": None if kind == "searched" else 3,
        "search_s": 90.0 if kind == "searched" else None,
        "retrain_s": 600.0,
        "scores": {"summary": summary, "cases": scores},
        "gap": None,
        "labels": {1: "Anterior", 2: "Posterior"},
        "search_commit": "fedcba9876543210" if kind == "searched" else None,
        "retrain_commit": "00112233445566+",
    }
    return Record.model_validate(fields)


def around(mean: float, seed: int) -> list[float]:
    """Return a Dice for every case: what all networks find hard is the same, the rest is noise."""
    shared = np.random.default_rng(99).normal(0, 0.05, len(CASES))
    return [float(d) for d in mean + shared + np.random.default_rng(seed).normal(0, 0.002, len(CASES))]


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    rng, hits, trials = np.random.default_rng(0), 0, 200
    for trial in range(trials):
        noise = rng.normal(0.01, 0.05, 40)
        found = paired_interval(list(0.8 + noise), [0.8] * 40, seed=trial)
        hits += found.low <= 0.01 <= found.high
    assert 0.88 <= hits / trials <= 0.98


def test_pairing_sees_a_difference_that_the_spread_of_the_cases_would_hide() -> None:
    found = compare([record("searched", 0.5, around(0.86, 1))], [record("random", 0, around(0.85, 2))])
    assert found.verdict == "better"
    assert found.low < 0.01 < found.high
    assert found.high - found.low < 0.004  # unpaired it would be about 0.04


def test_unequal_or_absent_cases_are_refused() -> None:
    with pytest.raises(ValueError, match="the same cases"):
        paired_interval([0.5], [0.5, 0.6])
    with pytest.raises(ValueError, match="the same cases"):
        paired_interval([], [])


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ((0.85, 0.85), "**No difference**"),
        ((0.88, 0.87), "**Search beats chance**"),
        ((0.87, 0.86), "**No clear difference**: sigma-0.2, sigma-0.5 are better than the random ones together"),
        ((0.80, 0.82), "**Search does worse than chance**"),
        ((0.87, 0.85), "**Mixed**: sigma-0.2 better than the random ones, the others no different"),
    ],
)
def test_the_verdict_is_what_the_intervals_say(means: tuple[float, float], expected: str) -> None:
    noise = around(0.0, 7)
    searched = [record("searched", s, [m + n for n in noise]) for s, m in zip((0.2, 0.5), means, strict=True)]
    drawn = [record("random", 0, [0.86 + n for n in noise]), record("random", 1, [0.84 + n for n in noise])]
    said = verdict(grouped([*searched, *drawn]))
    assert said.startswith(expected)
    assert "differ among themselves by 0.0200" in said


def test_a_draw_that_is_as_good_as_the_searched_network_is_named() -> None:
    drawn = [record("random", n, around(mean, n)) for n, mean in enumerate((0.87, 0.83, 0.84))]
    said = verdict(grouped([record("searched", 0.5, around(0.87, 0)), *drawn]))
    told = "sigma-0.5 is better than the random ones together, but random-0 is no worse."
    assert said.startswith(f"**No clear difference**: {told}")


def test_a_draw_that_is_better_than_the_searched_network_is_called_so() -> None:
    drawn = [record("random", n, around(mean, n)) for n, mean in enumerate((0.89, 0.83, 0.84))]
    said = verdict(grouped([record("searched", 0.5, around(0.87, 0)), *drawn]))
    assert "sigma-0.5 is better than the random ones together, but random-0 is better than sigma-0.5." in said


def test_a_network_of_another_size_is_no_proof_for_or_against_the_search() -> None:
    small = record("searched", 0.2, around(0.80, 1), gmac=0.5)
    drawn = record("random", 0, around(0.85, 2))
    said = verdict(grouped([small, record("searched", 0.5, around(0.87, 3)), drawn]))
    assert said.startswith("**Search beats chance** here: sigma-0.5 is better than the random ones together. ")
    assert "sigma-0.2, with 0.34 times the work: worse." in said
    assert verdict(grouped([small, drawn])).startswith("sigma-0.2, with 0.34 times the work: worse.")


def test_seeds_of_one_network_are_averaged_before_they_are_compared() -> None:
    both = [record("searched", 0.5, [0.8] * 40, seed=0), record("searched", 0.5, [0.9] * 40, seed=1)]
    assert list(grouped(both)) == ["sigma-0.5"]
    assert compare(both, [record("random", 0, [0.85] * 40)]).mean == pytest.approx(0)


def test_the_page_has_every_figure_of_a_record() -> None:
    said = page([record("searched", 0.5, [0.8765] * 40), record("random", 2, [0.8654] * 40)])
    for wanted in ("| sigma-0.5-seed-0 |", "| 9.68 | 1.455 | 36.0 | 1.5 | 10.0 |", "| 0.8765 |", "Dice, Anterior"):
        assert wanted in said
    assert "| sigma-0.5 | all random | +0.0111 | +0.0111 to +0.0111 | better |" in said
    assert "(results/random-2-seed-0.svg)" in said
    assert "commits 0011223344+, 0123456789, fedcba9876" in said
    assert "No arm is recorded yet" in page([])


def test_the_gap_is_told_for_every_decoder_under_a_budget_and_in_words() -> None:
    rows = [
        GapRow(stage="search network", dice=0.84),
        GapRow(stage="decoded", name="dints", edges=9, dice=0.24),
        GapRow(stage="decoded", name="block", reason="no way through"),
        GapRow(stage="decoded", name="at most 0.7 GMAC", edges=5, dice=0.01),
        GapRow(stage="retrained", name="dints", dice=0.87),
    ]
    gap = GapTable(cases=("case_00", "case_01"), rows=tuple(rows))
    measured = record("searched", 0.5, around(0.87, 0)).model_copy(update={"gap": gap})
    other = gap.model_copy(update={"rows": (*rows[:3], GapRow(stage="decoded", name="at most 1 GMAC", reason="none"))})
    said = page([measured, record("searched", 0.8, around(0.8, 1)).model_copy(update={"gap": other})])
    assert "| sigma-0.5-seed-0 | 2 | 0.8400 | - | 0.2400 | 0.0100 (5 edges, at most 0.7 GMAC) | 0.8700 |" in said
    assert "| sigma-0.8-seed-0 | 2 | 0.8400 | - | 0.2400 | - | - |" in said
    assert "Decoding loses 0.60 to 0.60 Dice" in said
    assert "1 of 1 networks are better" in said


def test_the_committed_page_is_that_of_the_committed_records() -> None:
    for path in (ROOT / "docs").glob("results.md"):
        assert path.read_text(encoding="utf-8") == page(read_records(path.parent / "results"))
