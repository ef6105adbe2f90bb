"""The report of a search, for a person: what was asked for, what was found, what it costs, what was lost on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from dints_deploy.files import write_text
from dints_search.budget import least_share
from dints_search.choice import Chosen, deployed_setting
from dints_search.cost import count_saved, memory_table, time_forward
from dints_search.curves import draw_search_curves
from dints_search.gap import GapRow, GapTable
from dints_search.genotype import OPERATIONS, Genotype
from dints_search.metrics import Figures, read_metrics
from dints_search.network import count_gmac
from dints_search.profile import MIB, build, count
from dints_search.recipe import Recipe
from dints_search.search import search_setting
from dints_search.search_run import SearchConfig, read_search_config
from dints_search.space import SearchSpace

REPORT_FILE: Final = "report.md"
CURVES_FILE: Final = "curves.png"
TIMED_PASSES: Final = 9

GAP_HEAD: Final = "## Discretisation gap\n"
COURSE_HEAD: Final = "## Course\n"


def write_report(folder: Path, chosen: Chosen | None, gap: GapTable | None = None, *, reason: str = "") -> Path:
    """Write `report.md` and `curves.png` into a finished search's folder.

    Args:
        folder: with `config.toml`, `metrics.jsonl`, `architecture.png` and `relaxation.png`.
        chosen: the genotype and, where there was a budget, what was predicted; None where the choice led to none.
        gap: without one the report says that it was not measured.
        reason: why the choice led to none.

    Raises:
        DatasetError: the folder's configuration cannot be read. OutputError: a file cannot be written.
    """
    config = read_search_config(folder)
    lines = read_metrics(folder)
    draw_search_curves(lines, folder / CURVES_FILE, sigma=config.recipe.search.sigma)
    seconds = sum(float(line["seconds"]) for line in lines)
    parts = [
        f"# Search of {config.recipe.task}, sigma {config.recipe.search.sigma:g}\n",
        "Research use only.\n",
        *(["![the network found](architecture.png)\n"] if chosen else []),
        "## Network\n",
        _network(chosen, config.recipe) if chosen else f"None: {reason}.\n",
        "## Memory\n",
        _memory(chosen, config.recipe, lines),
        GAP_HEAD,
        "Not measured.\n" if gap is None else gap_text(gap),
        COURSE_HEAD,
        f"{len(lines)} iterations in {seconds / 60:.1f} min.\n",
        "![losses, entropies, memory, learning rate](curves.png)\n",
        "## What the search holds likely\n",
        "An edge is as wide as it is likely; its length is shared among the operations by weight.\n",
        "![edges and operations by probability](relaxation.png)\n",
        "## Configuration\n",
        _configuration(config),
    ]
    write_text(folder / REPORT_FILE, "\n".join(parts))
    return folder / REPORT_FILE


def renew_gap(folder: Path, gap: GapTable) -> None:
    """Put another table of the gap into a search's report."""
    path = folder / REPORT_FILE
    before, _, rest = path.read_text(encoding="utf-8").partition(GAP_HEAD)
    _, _, after = rest.partition(COURSE_HEAD)
    write_text(path, f"{before}{GAP_HEAD}\n{gap_text(gap)}\n{COURSE_HEAD}{after}")


def actual_cost(genotype: Genotype, recipe: Recipe, unit: str) -> float:
    """Return what a genotype's real network costs, whole, in the unit of a budget: GMAC, MiB or ms."""
    setting = deployed_setting(recipe, SearchSpace(genotype.num_blocks, genotype.num_depths))
    with torch.device("meta"):
        network = build(genotype, setting)
    shape = (setting.batch, setting.in_channels, *setting.size)
    if unit == "GMAC":
        return setting.batch * count_gmac(network, setting.size)
    if unit == "MiB":
        return count_saved(network, shape) / MIB
    return 1000 * time_forward(network, shape, repeats=TIMED_PASSES)


def gap_text(gap: GapTable) -> str:
    """Return the table of the gap, and what it was measured on."""
    labels = sorted({label for row in gap.rows for label in row.dice_by_label})
    columns = [
        "network",
        "edges",
        "Dice",
        *(f"Dice, label {label}" for label in labels),
        "NSD",
        "to the search network",
    ]
    first = gap.rows[0].dice
    about = (
        f"Dice on {len(gap.cases)} cases of the training part that no step of the search has seen. Decoded networks "
        "inherit the weights of the search network; nothing is trained in between.\n"
    )
    return about + "\n" + _table(columns, [_gap_row(row, labels, first) for row in gap.rows])


def _gap_row(row: GapRow, labels: Sequence[int], first: float | None) -> list[str]:
    name = f"{row.stage}, {row.name}" if row.name else row.stage
    if row.reason:
        return [name, "-", "-", *("-" for _ in labels), "-", row.reason]
    lost = "" if row.dice is None or first is None else f"{row.dice - first:+.4f}"
    scores = [_score(row.dice), *(_score(row.dice_by_label.get(label)) for label in labels), _score(row.nsd)]
    return [name, str(row.edges or "all"), *scores, lost]


def _network(chosen: Chosen, recipe: Recipe) -> str:
    genotype = chosen.genotype
    setting = deployed_setting(recipe, SearchSpace(genotype.num_blocks, genotype.num_depths))
    found = count(genotype, setting)
    pairs = list(zip(genotype.edge_active, genotype.edge_operation, strict=True))
    used = [o for active, operations in pairs for on, o in zip(active, operations, strict=True) if on]
    kinds = ", ".join(f"{OPERATIONS[o]} {used.count(o)}" for o in range(len(OPERATIONS)))
    window = "x".join(str(n) for n in setting.size)
    rows = [
        ["how", genotype.source],
        ["edges", f"{len(used)} of {genotype.num_blocks * (3 * genotype.num_depths - 2)}: {kinds}"],
        ["parameters", f"{found.parameters / 1e6:.3f} M (published form {found.compatible_parameters / 1e6:.3f} M)"],
        ["multiply-adds", f"{found.gmac:.4g} GMAC at {window} (published form {found.compatible_gmac:.4g})"],
        ["saved activations", f"{found.saved_mib:.1f} MiB for one window, fp32"],
    ]
    if chosen.budget:
        real = actual_cost(genotype, recipe, chosen.budget)
        said = (
            f"at most {chosen.limit:g} {chosen.budget}: predicted {chosen.predicted:.4g}, the network takes {real:.4g}"
        )
        rows.append(["budget", f"{said} ({real / chosen.predicted - 1:+.1%})"])
    return _table(["", f"at channel multiplier {setting.channel_multiplier:g}"], rows)


def _memory(chosen: Chosen | None, recipe: Recipe, lines: Sequence[Figures]) -> str:
    """Say what share of the whole space's memory was aimed at, expected at the end, and is taken by the network."""
    setting = search_setting(recipe)
    table, space = memory_table(setting), setting.space
    whole = table.whole(space.num_blocks)
    usage = lines[-1].get("usage") if lines else None
    rows = [
        ["sigma", f"{recipe.search.sigma:.3f}"],
        [f"expected by the search at its end ({recipe.search.memory} form)", "-" if usage is None else f"{usage:.3f}"],
        ["network found", "-" if chosen is None else f"{table.of(chosen.genotype) / whole:.3f}"],
        ["least of any network", f"{least_share(space, table):.3f}"],
    ]
    about = "Saved training activations, stems and head among them. Below the least, sigma has nothing to aim at.\n"
    return _table(["", "share of the whole space"], rows) + "\n" + about


def _configuration(config: SearchConfig) -> str:
    parts = f"{len(config.weights)} for the weights, {len(config.architecture)} for the architecture"
    rows = [
        ["cases", f"{parts}, {len(config.held_out)} held out, of fold {config.fold}'s training part"],
        ["seed", str(config.seed)],
        ["processes", str(config.processes)],
        ["commit", config.commit or "unknown"],
    ]
    return _table(["", ""], rows + [[name, str(value)] for name, value in config.recipe.search.model_dump().items()])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
