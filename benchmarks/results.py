"""Write docs/results.md from the records of `benchmarks.search_vs_random`.

    python -m benchmarks.results [--runs RECORDS]

With --runs, the records of that folder are copied to docs/results first; the page is made from what lies there.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.arms import TOLERANCE, Record, read_record
from benchmarks.bootstrap import LEVEL, RESAMPLES, Interval, paired_interval
from benchmarks.machine import ROOT
from dints_deploy.files import write_text
from dints_search.budget import least_share
from dints_search.cost import CostTable, Setting, memory_table
from dints_search.draw import architecture_figure, save_figure
from dints_search.gap import INHERITED, RETRAINED, SEARCH_NETWORK, WITHIN, GapTable
from dints_search.genotype import parse_genotype
from dints_search.space import SearchSpace

RECORDS = ROOT / "docs" / "results"

HEAD = """# Search against chance

Made by `python -m benchmarks.results` from `docs/results/*.json`; do not edit.

Searched networks and random ones of about the same work are retrained alike and measured on the validation part of the
fold, which no search, no training and no choice has seen. Random networks are uniform over the feasible topologies and
over the operations of their active edges, given that their multiply-adds are within 5 % of the network found at sigma
0.5: other sigmas find networks of another size, which say less about the search. Small searches of small networks on
one task: they say what is said here and no more. Research use only.
"""

Groups = dict[str, list[Record]]
"""The records of an arm's seeds, by the arm's name without its seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder of records to copy to docs/results")
    options = parser.parse_args()
    if options.runs:
        RECORDS.mkdir(parents=True, exist_ok=True)
        for path in sorted(options.runs.glob("*.json")):
            shutil.copyfile(path, RECORDS / path.name)
    records = read_records(RECORDS)
    draw_all(records, RECORDS)
    write_text(ROOT / "docs" / "results.md", page(records))
    print(ROOT / "docs" / "results.md")


def read_records(folder: Path) -> list[Record]:
    """Return all records: searched before random ones, by sigma or number, by seed."""
    records = [read_record(path) for path in folder.glob("*.json")]
    return sorted(records, key=lambda record: (record.kind != "searched", record.figure, record.seed))


def draw_all(records: Sequence[Record], folder: Path) -> None:
    """Draw every network beside its record."""
    for record in records:
        figure = architecture_figure(parse_genotype(json.dumps(record.genotype)), title=record.arm)
        save_figure(figure, folder / f"{record.arm}.svg")


def page(records: Sequence[Record]) -> str:
    """Return the page."""
    if not records:
        return HEAD + "\nNo arm is recorded yet.\n"
    groups = grouped(records)
    parts = [HEAD, _setting(records), "## Networks\n", _networks(records), "## Scores\n", _scores(records)]
    parts += ["## Differences\n", _differences(groups), "## Verdict\n", verdict(groups)]
    parts += ["## Discretisation gap\n", _gaps(records), "## Pictures\n"]
    parts += [f"![{record.arm}](results/{record.arm}.svg)\n" for record in records]
    return "\n".join(parts)


def grouped(records: Sequence[Record]) -> Groups:
    """Return the records by arm without seed, in their order."""
    groups: Groups = {}
    for record in records:
        groups.setdefault(record.arm.rpartition("-seed-")[0], []).append(record)
    return groups


def case_scores(record: Record, score: str = "dice") -> dict[str, float]:
    """Return the mean over the labels of every case."""
    cases: dict[str, dict[str, Any]] = record.scores["cases"]
    present = {
        name: [label[score] for label in labels.values() if label[score] is not None] for name, labels in cases.items()
    }
    return {name: fmean(values) for name, values in sorted(present.items()) if values}


def pooled(records: Sequence[Record]) -> dict[str, float]:
    """Return the mean over the records of every case's score."""
    each = [case_scores(record) for record in records]
    return {case: fmean(scores[case] for scores in each) for case in each[0]}


def compare(ours: Sequence[Record], theirs: Sequence[Record]) -> Interval:
    """Return the difference of two pools of records over the cases that both have."""
    a, b = pooled(ours), pooled(theirs)
    cases = [case for case in a if case in b]
    return paired_interval([a[case] for case in cases], [b[case] for case in cases])


def verdict(groups: Groups) -> str:
    """Say what the intervals say, in words: of the searched networks with the random ones' work, then of the others."""
    searched = {name: found for name, found in groups.items() if found[0].kind == "searched"}
    drawn = [record for found in groups.values() for record in found if record.kind == "random"]
    if not searched or not drawn:
        return "Nothing can be said yet: it takes searched and random networks.\n"
    verdicts = {name: compare(found, drawn).verdict for name, found in searched.items()}
    work = fmean(record.cost["gmac"] for record in drawn)
    shares = {name: fmean(record.cost["gmac"] for record in found) / work for name, found in searched.items()}
    alike = {name: said for name, said in verdicts.items() if abs(shares[name] - 1) <= 2 * TOLERANCE}
    better = [name for name, said in alike.items() if said == "better"]
    equals = [
        f"{drawn_name} is {said}"
        for drawn_name, found in groups.items()
        if found[0].kind == "random" and (said := _holds_against(groups, drawn_name, better))
    ]
    parts = [_verdict_of_equals(alike, equals)] if alike else []
    parts += [
        f"{name}, with {shares[name]:.2f} times the work: {said}."
        for name, said in verdicts.items()
        if name not in alike
    ]
    means = [fmean(pooled(found).values()) for found in groups.values() if found[0].kind == "random"]
    parts.append(f"The random networks differ among themselves by {max(means) - min(means):.4f}.")
    parts.append("The intervals resample cases only: with few networks of each kind they understate what is not known.")
    return " ".join(parts) + "\n"


def _verdict_of_equals(verdicts: dict[str, str], equals: Sequence[str]) -> str:
    """Say what holds for searched networks with about the work of the random ones; `equals` tells which are as good."""
    said = {kind: [name for name, found in verdicts.items() if found == kind] for kind in ("better", "worse")}
    if not said["better"] and not said["worse"]:
        return f"**No difference**: {_named(verdicts)} no different from the random ones beyond what chance explains."
    if said["better"] and equals:  # with few draws one as good is no proof of the search
        better = f"{_named(said['better'])} better than the random ones together"
        return f"**No clear difference**: {better}, but {' and '.join(equals)}."
    if len(said["better"]) == len(verdicts):
        return f"**Search beats chance** here: {_named(verdicts)} better than the random ones together."
    if len(said["worse"]) == len(verdicts):
        return f"**Search does worse than chance** here: {_named(verdicts)} worse than the random ones."
    parts = [f"{', '.join(names)} {kind}" for kind, names in said.items() if names]
    return f"**Mixed**: {'; '.join(parts)} than the random ones, the others no different."


def _holds_against(groups: Groups, drawn: str, searched: Iterable[str]) -> str:
    """Say how a random network stands to searched ones that beat the random ones together; empty where it is worse."""
    said = {name: compare(groups[name], groups[drawn]).verdict for name in searched}
    if beaten := [name for name, verdict in said.items() if verdict == "worse"]:
        return f"better than {' and '.join(beaten)}"
    return "no worse" if "no difference" in said.values() else ""


def _named(names: Iterable[str]) -> str:
    listed = list(names)
    return f"{', '.join(listed)} {'is' if len(listed) == 1 else 'are'}"


def _setting(records: Sequence[Record]) -> str:
    first = records[0]
    searching: dict[str, Any] = next((r.settings["search"] for r in records if r.settings["search"]), {})
    retraining = first.settings["retraining"]
    cases = first.scores["summary"]["cases"]
    made = {c for r in records for c in (r.commit, r.search_commit, r.retrain_commit) if c is not None}
    commits = sorted(commit[:10] + "+" * commit.endswith("+") for commit in made)
    machines = sorted({f"{r.machine['processor']}, {r.machine['threads']} threads" for r in records})
    devices = sorted({r.machine["device"] for r in records})
    lines = [
        f"- {first.task}, fold {first.fold}, {cases} validation cases, window {_x(first.settings['window'])}",
        f"- search: {searching.get('steps')} iterations of {searching.get('batch')} patches, "
        f"{searching.get('num_blocks')} blocks, {searching.get('num_depths')} levels, "
        f"channel multiplier {searching.get('channel_multiplier')}, {searching.get('precision')}",
        f"- retraining: {retraining['steps']} steps of {retraining['batch']} patches, "
        f"channel multiplier {retraining['channel_multiplier']}, {retraining['precision']}, the same for all",
        f"- {', '.join(devices)}: {'; '.join(machines)}; commits {', '.join(commits)} (+ with changes)",
        "- minutes: the median step times the steps, on a machine that did other work beside",
    ]
    return "\n".join(lines) + "\n"


def _networks(records: Sequence[Record]) -> str:
    shares = {record.arm: _shares(record) for record in records}
    columns: dict[str, Callable[[Record], str]] = {
        "network": lambda r: r.arm,
        "edges": lambda r: str(sum(map(sum, r.genotype["edge_active"]))),
        "parameters M": lambda r: f"{r.cost['parameters'] / 1e6:.2f}",
        "GMAC": lambda r: f"{r.cost['gmac']:.3f}",
        "saved activations MiB": lambda r: f"{r.cost['saved_mib']:.1f}",
        "search min": lambda r: _minutes(r.search_s),
        "retraining min": lambda r: _minutes(r.retrain_s),
        "draws": lambda r: "-" if r.draws is None else str(r.draws),
        "share of the space": lambda r: f"{shares[r.arm][0]:.2f}",
    }
    least = min(shares[record.arm][1] for record in records)
    about = (
        "The last column is what sigma aims at: the saved activations, stems and head among them, as a share of the "
        f"whole space's. No network takes less than {least:.2f}.\n"
    )
    return _table(list(columns), [[cell(r) for cell in columns.values()] for r in records]) + "\n" + about


def _shares(record: Record) -> tuple[float, float]:
    """Return which share of the memory of the whole space a network takes, and the cheapest one of the space.

    For scans of one channel: what the input takes beside the features hardly shows.
    """
    genotype, settings = parse_genotype(json.dumps(record.genotype)), record.settings
    space = SearchSpace(genotype.num_blocks, genotype.num_depths)
    width = settings["retraining"]["channel_multiplier"]
    i, j, k = settings["window"]
    table, least = _memory(
        Setting(space, (i, j, k), 1, len(record.labels) + 1, channel_multiplier=width, up=genotype.up)
    )
    return table.of(genotype) / table.whole(space.num_blocks), least


@cache
def _memory(setting: Setting) -> tuple[CostTable, float]:
    """Return what the pieces of a space's networks take, and its least share: the same for most records."""
    table = memory_table(setting)
    return table, least_share(setting.space, table)


def _scores(records: Sequence[Record]) -> str:
    labels = list(records[0].scores["summary"]["labels"])
    names = [records[0].labels.get(int(label), f"label {label}") for label in labels]
    columns = ["network", *(f"Dice, {n}" for n in names), "Dice, mean", *(f"NSD, {n}" for n in names), "NSD, mean"]
    rows = []
    for record in records:
        summary = record.scores["summary"]
        cells = [record.arm]
        for score in ("dice", "nsd"):
            cells += [_score(summary["labels"][label][score]) for label in labels]
            cells.append(_score(summary["mean"][score]))
        rows.append(cells)
    return _table(columns, rows)


def _differences(groups: Groups) -> str:
    drawn = [record for found in groups.values() for record in found if record.kind == "random"]
    about = (
        f"Mean difference in Dice, case by case, with its {LEVEL:.0%} interval from {RESAMPLES} bootstrap samples of "
        "the cases. Seeds of one arm are averaged first; those of a searched arm are different networks.\n"
    )
    rows = []
    for name, found in groups.items():
        if found[0].kind == "searched" and drawn:
            rows.append([name, "all random", *_cells(compare(found, drawn))])
    for (name, found), (other, others) in combinations(groups.items(), 2):
        rows.append([name, other, *_cells(compare(found, others))])
    return about + "\n" + _table(["network", "against", "difference", "interval", ""], rows)


def _cells(interval: Interval) -> list[str]:
    return [f"{interval.mean:+.4f}", f"{interval.low:+.4f} to {interval.high:+.4f}", interval.verdict]


def _gaps(records: Sequence[Record]) -> str:
    tables = [(record.arm, record.gap) for record in records if record.gap is not None]
    inherited = [row.name for _, gap in tables for row in gap.rows if row.stage == INHERITED]
    decoders = sorted({name for name in inherited if not name.startswith(WITHIN)})
    about = (
        "Dice on cases of the training part that neither the search nor the retraining has seen: of the search "
        "network, of what each decoder makes of it with inherited weights (- where it makes no network), of the "
        "likeliest network of half the work of dints's, after retraining.\n"
    )
    rows = [_gap_row(arm, gap, decoders) for arm, gap in tables]
    columns = ["search", "cases", "search network", *decoders, "half the work", "retrained"]
    return about + "\n" + _table(columns, rows) + "\n" + _lost([gap for _, gap in tables])


def _gap_row(arm: str, gap: GapTable, decoders: Sequence[str]) -> list[str]:
    within = next((row for row in gap.rows if row.stage == INHERITED and row.name.startswith(WITHIN)), None)
    half = "-"
    if within is not None and within.dice is not None:
        half = f"{_score(within.dice)} ({within.edges} edges, {within.name})"
    scores = [_score(gap.dice(INHERITED, name)) for name in decoders]
    first, last = _score(gap.dice(SEARCH_NETWORK)), _score(gap.dice(RETRAINED, "dints"))
    return [arm, str(len(gap.cases)), first, *scores, half, last]


def _lost(gaps: Sequence[GapTable]) -> str:
    """Say in words how much is lost at decoding and what retraining makes of it."""
    pairs = [(gap.dice(INHERITED, "dints"), gap.dice(SEARCH_NETWORK)) for gap in gaps]
    lost = [first - decoded for decoded, first in pairs if decoded is not None and first is not None]
    if not lost:
        return "No decoded network was measured.\n"
    ends = [(gap.dice(RETRAINED, "dints"), gap.dice(SEARCH_NETWORK)) for gap in gaps]
    better = [last > first for last, first in ends if last is not None and first is not None]
    return (
        f"Decoding loses {min(lost):.2f} to {max(lost):.2f} Dice before anything is trained: the search network's "
        f"weights are made for all edges together. Retrained from the start, {sum(better)} of {len(better)} networks "
        "are better than the search network that they come from.\n"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _minutes(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds / 60:.1f}"


def _x(sizes: Sequence[int]) -> str:
    return "x".join(str(n) for n in sizes)


if __name__ == "__main__":
    main()
