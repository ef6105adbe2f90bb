"""Does a network that was decoded under a budget cost what was predicted? Work, saved activations, latency.

    python -m benchmarks.budget --draws 5 --threads 1

Architecture parameters are drawn at random; the budget is a share of what the likeliest network costs. Work and saved
activations are counted on the whole network. Latency is measured: pieces and whole networks in turn, round by round, so
that a machine that is faster in one minute than in the next does not speak for or against the prediction. With one
thread the clock is the process's own processor time, which other programs disturb least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.machine import write
from dints_search.budget import decode_within
from dints_search.cost import (
    Cache,
    CostTable,
    Setting,
    count_saved,
    latency_table,
    memory_table,
    time_in_turn,
    work_table,
)
from dints_search.decode import decode
from dints_search.genotype import Genotype
from dints_search.network import DiNTSNetwork, count_gmac
from dints_search.profile import MIB, build
from dints_search.space import ArchitectureParameters, SearchSpace

SHARES = (0.7, 0.5)
"""Budgets, as shares of what the likeliest network costs."""

SPREAD = 2.0
"""Standard deviation of the random architecture parameters: edges from very unlikely to nearly certain."""


@dataclass(frozen=True)
class Found:
    """A network that was decoded under a limit, 0 for none."""

    draw: int
    limit: float
    genotype: Genotype


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    space = SearchSpace(options.blocks, options.depths)
    setting = Setting(space, options.size, in_channels=1, num_classes=3, channel_multiplier=options.width)
    rows = [*counted(setting, options.draws), *timed(setting, options)]
    for row in rows:
        print(row)
    worst = {unit: max(abs(r["off"]) for r in rows if r["unit"] == unit) for unit in ("GMAC", "MiB", "ms")}
    print(worst)
    if options.record:
        print(write("budget", result(rows, worst, setting, options.threads)))


def counted(setting: Setting, draws: int) -> list[dict[str, Any]]:
    """Compare work and saved activations."""
    shape = (1, setting.in_channels, *setting.size)
    rows = []
    for found in decoded(setting, work := work_table(setting), draws):
        real = count_gmac(network(found.genotype, setting), setting.size)
        rows.append(compared("GMAC", 1.0, found, work, real))
    for found in decoded(setting, memory := memory_table(setting), draws):
        rows.append(compared("MiB", MIB, found, memory, count_saved(network(found.genotype, setting), shape)))
    return rows


def timed(setting: Setting, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare latency; the table that decodes is measured once more beside the networks."""
    clock = time.process_time if options.threads == 1 else time.perf_counter
    founds = decoded(setting, latency_table(setting, repeats=options.repeats, clock=clock), options.draws)
    shape = (1, setting.in_channels, *setting.size)
    networks = [(network(found.genotype, setting), shape) for found in founds]
    pieces: Cache = {}
    reals = [float("inf")] * len(founds)
    for _ in range(options.repeats):
        once: Cache = {}
        latency_table(setting, repeats=1, cache=once, clock=clock)
        pieces = {key: min(seconds, pieces.get(key, seconds)) for key, seconds in once.items()}
        reals = [min(pair) for pair in zip(reals, time_in_turn(networks, repeats=1, clock=clock), strict=True)]
    table = latency_table(setting, cache=pieces)
    return [compared("ms", 1e-3, found, table, real) for found, real in zip(founds, reals, strict=True)]


def decoded(setting: Setting, table: CostTable, draws: int) -> list[Found]:
    """Decode random architecture parameters without and with budgets."""
    founds = []
    for draw in range(draws):
        parameters = ArchitectureParameters(setting.space)
        generator = torch.Generator().manual_seed(draw)
        with torch.no_grad():
            for alpha in parameters.parameters():
                alpha.copy_(SPREAD * torch.randn(alpha.shape, generator=generator))
        likeliest = decode(parameters)
        founds.append(Found(draw, 0.0, likeliest))
        for limit in (share * table.of(likeliest) for share in SHARES):
            genotype = decode_within(parameters, table, limit)
            if isinstance(genotype, Genotype):
                founds.append(Found(draw, limit, genotype))
    return founds


def network(genotype: Genotype, setting: Setting) -> DiNTSNetwork:
    """Return the genotype's network on the meta device."""
    with torch.device("meta"):
        return build(genotype, setting)


def compared(unit: str, per_unit: float, found: Found, table: CostTable, real: float) -> dict[str, Any]:
    """Compare one genotype's prediction with its network."""
    predicted = table.of(found.genotype)
    return {
        "unit": unit,
        "draw": found.draw,
        "limit": round(found.limit / per_unit, 4),
        "edges": sum(map(sum, found.genotype.edge_active)),
        "predicted": round(predicted / per_unit, 4),
        "real": round(real / per_unit, 4),
        "off": round(real / predicted - 1, 4),
    }


def result(rows: list[dict[str, Any]], worst: dict[str, float], setting: Setting, threads: int) -> dict[str, Any]:
    """Return what the performance page shows."""
    table = []
    for unit, off in worst.items():
        offs = [abs(row["off"]) for row in rows if row["unit"] == unit]
        table.append([unit, str(len(offs)), f"{statistics.median(offs):.2%}", f"{off:.2%}"])
    window = "x".join(str(n) for n in setting.size)
    about = (
        f"{setting.space.num_blocks} blocks, {setting.space.num_depths} levels, window {window}, channel multiplier "
        f"{setting.channel_multiplier:g}, {threads} threads."
    )
    columns = ["budget", "networks", "median difference to the network's own cost", "greatest"]
    tables = [{"about": about, "columns": columns, "rows": table}]
    return {"title": "Decoding under a budget: prediction and network", "tables": tables, "rows": rows}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--depths", type=int, default=4)
    parser.add_argument("--size", type=lambda text: tuple(int(n) for n in text.split(",")), default=(48, 64, 48))
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/budget.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
