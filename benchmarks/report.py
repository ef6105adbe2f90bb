"""Write the pages of figures in docs/ and the chart from the JSON that the benchmarks left in benchmarks/results/.

python -m benchmarks.report
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from benchmarks.machine import ROOT, runs_of
from dints_search.draw import save_figure

CHART = ROOT / "docs" / "pictures" / "performance.svg"
GIB = 1 << 30
PEER = "torch eager + MONAI"
ALONE = "engine alone (openvino)"
OURS = "dints-deploy (openvino)"
STAGES: Final = ("prepare", "load", "cut", "engine", "blend", "restore", "postprocess")

MADE = "Made by `python -m benchmarks.report` from `benchmarks/results/*.json`; do not edit."
PAGES: Final = {
    "performance": f"""# Performance

{MADE} The ratios count, not the
seconds. Contenders took turns on one machine, but for the peaks of memory, which are one run each, and for the CT. Of
the whole CT the runs of a contender are of up to four calls, fp32's of the last three, int8's of the last, nnU-Net's of
an early one; of its eighth MONAI, fp32 and nnU-Net have two runs of a second call. They were gathered over the commits
that are named, on one kind of machine.
""",
    "dicom-measured": f"""# DICOM, measured

{MADE} What is read and written is
described in [dicom.md](dicom.md).
""",
    "reliability": f"""# Reliability, measured

{MADE} What the daemon does and
what to do about it is described in [operate.md](operate.md).

What is promised: an object whose C-STORE was answered with success is on disk and known to the database, whatever is
killed afterwards; every revision of a study has one current result at every destination; a result is repeated only
with the same bytes; nothing stays stuck without a reason code; the audit trail has no gap. What is not: a disk that
loses what it said was written; damage within a row's text, which SQLite's check of its pages does not see.
""",
    "accuracy": f"""# Accuracy, measured

{MADE} How an entry is trained is
told in [train.md](train.md); searched networks beside random ones are in [results.md](results.md). Research use only.
""",
    "images": f"""# Installations, measured

{MADE} How they are built and run
is described in [install.md](install.md). The seconds are those of a machine that other work kept busy, and of its
network.
""",
}
"""Page in docs/ -> its head. A result names its page; without, it belongs to performance."""

Result = dict[str, Any]
Rows = Iterable[Sequence[object]]


def main() -> None:
    """Write the pages and the chart."""
    parts = {name: [head] for name, head in PAGES.items()}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text())
        page = parts[result.get("page", "performance")]
        page.append(section(path.stem, result))
        if path.stem == "full_ct":
            draw(result)
            page.append(f"![Seconds of each contender](pictures/{CHART.name})\n")
    for name, sections in parts.items():
        if len(sections) > 1:
            page_path = ROOT / "docs" / f"{name}.md"
            page_path.write_text("\n".join(sections))
            print(page_path)


def section(name: str, result: Result) -> str:
    """Return one benchmark with its machine, its tables and its facts."""
    machine, command = result["machine"], result.get("command", f"python -m benchmarks.{name}")
    measured = [f"`{commit[:10]}`" for commit in named(result, "commit")]
    processors = ", ".join(named(result, "processor"))
    lines = [
        f"## {result.get('title', name)}",
        "",
        f"`{command}` at commit{'s' * (len(measured) > 1)} {', '.join(measured)}, {processors}, "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB, Python {machine['python']}.",
        "",
        *TABLES.get(name, medians)(result),
        *[line for one in result.get("tables", []) for line in told(one)],
        *[f"- {key}: {value}" for key, value in result.get("facts", {}).items()],
        "",
    ]
    return "\n".join(lines)


def named(result: Result, what: str) -> list[str]:
    """Return the commits or processors whose runs a result gathers, in order; the machine's where none is named."""
    return list(dict.fromkeys(run[what] for run in runs_of(result) if what in run)) or [result["machine"][what]]


def table(head: Sequence[str], rows: Rows) -> list[str]:
    """Return a table's lines and an empty one."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows), ""]


def told(one: Result) -> list[str]:
    """Return a table that a result brings along: {"columns", "rows"}, under its "about" where it has one."""
    about = [one["about"], ""] if "about" in one else []
    return [*about, *table(one["columns"], one["rows"])]


def medians(result: Result) -> list[str]:
    """Return medians and ratios, where the benchmark has them."""
    if "median" not in result:
        return []
    rows = ((name, f"{value:.2f}", f"{result['ratio'][name]:.1f}") for name, value in result["median"].items())
    return table(("contender", "median s", "times faster than the peer"), rows)


def full_ct(result: Result) -> list[str]:
    """Return a table per part of the scan, then what the appliance's time went to."""
    lines: list[str] = []
    for part, runs in result["runs"].items():
        if PEER in runs:
            lines += [f"### The {part} scan", ""]
            head = ("contender", "runs", "median s", "times faster than MONAI", "labels as MONAI's", "over the engine")
            lines += table(head, ct_rows(runs))
    return lines + limits(result) + stages(result)


def limits(result: Result) -> list[str]:
    """Return how far each engine is from what the processor can do, and what that leaves to win."""
    gmac, rows = result["facts"]["GMAC per window"], []
    runs = {name: several for part in ("eighth", "whole") for name, several in result["runs"].get(part, {}).items()}
    alone = runs.get(ALONE)
    if not alone or PEER not in runs:
        return []
    peak = max(run["peak_gmac_per_second"] for run in alone)
    eager = statistics.median(run["network_seconds"] / run["windows"] for run in runs[PEER])
    ours = statistics.median(run["seconds_per_window"] for run in alone)
    for name, seconds in (("torch eager", eager), ("OpenVINO", ours), ("a matrix product's pace", gmac / peak)):
        rows.append((name, f"{seconds:.2f}", f"{gmac / seconds:.0f}", f"{eager / seconds:.2f}"))
    head = ("a window of a run in fp32", "s", "GMAC/s of the network as written", "times faster than torch eager")
    told = (
        f"The peak is that of a float32 product of two large matrices in numpy, {peak:.0f} GMAC/s on all cores. "
        "A long run takes fewer multiplications than the network says (docs/decisions/0024): it can be beyond the peak."
    )
    return ["### What is left to win in fp32", "", told, "", *table(head, rows)]


def ct_rows(runs: dict[str, list[Result]]) -> Rows:
    """Yield a row per contender; `over the engine` is the time over that of the windows that had to run, alone."""
    peer, alone = median_seconds(runs[PEER]), runs.get(ALONE)
    for name, several in runs.items():
        if name == ALONE:
            continue
        agreements = [run["agreement"] for run in several if run.get("agreement") is not None]
        floor = ""
        if name == OURS and alone:
            per_window = statistics.median(run["seconds_per_window"] for run in alone)
            floor = f"{median_seconds(several) / (per_window * several[0]['windows_run']):.2f}"
        agreement = f"{agreements[-1]:.4%}" if agreements else ""
        seconds = median_seconds(several)
        yield name, len(several), f"{seconds:.1f}", f"{peer / seconds:.2f}", agreement, floor


def median_seconds(runs: Sequence[Result]) -> float:
    """Return the median of the runs' seconds."""
    return float(statistics.median(run["seconds"] for run in runs))


def stages(result: Result) -> list[str]:
    """Return the seconds that each stage of the last whole run was busy, and its share of the whole run."""
    runs = result["runs"]["whole"].get(OURS) or result["runs"]["eighth"].get(OURS)
    if not runs:
        return []
    run = runs[-1]
    rows = (
        (name, f"{run['stages'][name]:.2f}", f"{run['stages'][name] / run['seconds']:.1%}")
        for name in STAGES
        if name in run["stages"]
    )
    told = f"{run['windows_run']} of {run['windows']} windows ran; stages overlap in time."
    return ["### The share of each stage", "", told, "", *table(("stage", "busy s", "of the whole"), rows)]


def peak_memory(result: Result) -> list[str]:
    """Return peaks over the baseline of the same number of classes."""

    def of(run: Result) -> tuple[object, ...]:
        return (run["classes"], *run["shape"])

    bases = {of(run): run["peak_bytes"] for run in result["runs"] if run["contender"] == "baseline"}
    shas = {of(run): run["labels_sha256"] for run in result["runs"] if run["contender"] == "dints-deploy"}

    def row(run: Result) -> Sequence[object]:
        over = (run["peak_bytes"] - bases.get(of(run), 0)) / GIB
        same = "" if run["labels_sha256"] is None else ("yes" if run["labels_sha256"] == shas.get(of(run)) else "")
        end = "" if run["fits"] else ", then it failed" if "error" in run else ", stopped"
        peak = f"{run['peak_bytes'] / GIB:.2f}{end}"
        blocks = f"{run['blocks']}, {run['windows_again']} windows again" if "blocks" in run else ""
        size = " x ".join(str(n) for n in run["shape"])
        return run["contender"], run["classes"], size, peak, f"{over:.2f}", blocks, same, f"{run['seconds']:.0f}"

    head = ("contender", "classes", "voxels", "peak GiB", "over the baseline", "blocks", "labels of one sweep", "s")
    return table(head, (row(run) for run in sorted(result["runs"], key=of)))


def draw(result: Result) -> None:
    """Draw the seconds of each contender on the whole scan, or on the eighth where the whole has not run."""
    from matplotlib.figure import Figure

    part = "whole" if PEER in result["runs"]["whole"] else "eighth"
    runs = {name: median_seconds(r) for name, r in result["runs"][part].items() if name != ALONE}
    figure = Figure(figsize=(7, 0.5 + 0.4 * len(runs)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(runs), list(runs.values()), color=["#2f6db3" if "dints" in n else "#b0b0b0" for n in runs])
    axes.bar_label(bars, fmt="%.0f s", padding=3)
    what = "the whole CT" if part == "whole" else "an eighth of the CT"
    axes.set_xlabel(f"seconds for {what}, from a fresh process")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, CHART)


TABLES: Final[dict[str, Callable[[Result], list[str]]]] = {
    "full_ct": full_ct,
    "full_ct_cpu": full_ct,
    "peak_memory": peak_memory,
}
"""Benchmark -> its tables; the others have medians and ratios, or facts alone."""


if __name__ == "__main__":
    main()
