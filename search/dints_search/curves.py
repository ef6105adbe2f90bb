"""The course of a run as a picture: losses, entropies, memory against sigma, learning rate.

The pale line of a loss is every step, the strong one its running mean. The warm-up of a search is shaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dints_search.draw import FAINT, FRAME, INK, save_figure
from dints_search.metrics import Figures

RED: Final = "#d62728"
BLUE: Final = "#1f77b4"
GREEN: Final = "#2ca02c"
SHADE: Final = "#f3f3f5"

SMOOTHED_SHARE: Final = 0.04
"""Share of a curve's points that the running mean takes in."""


def draw_search_curves(lines: Sequence[Figures], path: Path, *, sigma: float) -> Path:
    """Draw the course of a search to a PNG.

    Args:
        lines: of `metrics.jsonl`.
        path: ends in .png.
        sigma: share of the memory that the search aimed at.

    Raises:
        OutputError: the file cannot be written.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    segmentation, entropies, memory, rate = figure.subplots(2, 2).ravel()
    _curve(segmentation, lines, "loss", BLUE, "weights step", smooth=True)
    _curve(segmentation, lines, "L_seg", RED, "architecture step", smooth=True)
    _finish(segmentation, lines, "segmentation loss")
    for name, colour, about in (
        ("L_alpha", BLUE, "operations, L_alpha"),
        ("L_eta", RED, "edges, L_eta"),
        ("L_tp", GREEN, "topology, L_tp"),
    ):
        _curve(entropies, _from_one(lines, name), name, colour, about)
    _finish(entropies, lines, "entropies, as a share of their start")
    _curve(memory, lines, "usage", BLUE, "Me / Ma")
    memory.axhline(sigma, color=INK, linewidth=1, linestyle="--", label=f"sigma {sigma:g}")
    _finish(memory, lines, "memory against sigma")
    _curve(rate, lines, "learning_rate", BLUE, "weights")
    _finish(rate, lines, "learning rate")
    return save_figure(figure, path)


def draw_retraining_curves(lines: Sequence[Figures], path: Path) -> Path:
    """Draw the course of a retraining to a PNG: loss and learning rate.

    Raises:
        OutputError: the file cannot be written.
    """
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    loss, rate = figure.subplots(1, 2)
    _curve(loss, lines, "loss", BLUE, "Dice + cross-entropy", smooth=True)
    _finish(loss, lines, "retraining loss")
    _curve(rate, lines, "learning_rate", BLUE, "")
    _finish(rate, lines, "learning rate")
    return save_figure(figure, path)


def running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return the mean of the `width` values around each, of fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    here = np.arange(len(values))
    first, last = np.maximum(0, here - width // 2), np.minimum(len(values), here + width - width // 2)
    means: NDArray[np.float64] = (sums[last] - sums[first]) / (last - first)
    return means


def _curve(axes: Axes, lines: Sequence[Figures], name: str, colour: str, label: str, *, smooth: bool = False) -> None:
    """Draw one figure of the lines that have it."""
    points = [(float(line["step"]), float(line[name])) for line in lines if name in line]
    if not points:
        return
    steps, values = np.array(points).T
    width = max(1, round(SMOOTHED_SHARE * len(values))) if smooth else 1
    if width > 1:
        axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
    mark = "o" if len(values) == 1 else None
    axes.plot(steps, running_mean(values, width), color=colour, linewidth=1.8, label=label, marker=mark)


def _from_one(lines: Sequence[Figures], name: str) -> list[Figures]:
    """Return a figure's lines divided by its first value."""
    found = [line for line in lines if name in line]
    start = float(found[0][name]) if found else 1.0
    return [{"step": line["step"], name: float(line[name]) / start} for line in found if start]


def _finish(axes: Axes, lines: Sequence[Figures], title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("step", fontsize=9, color=FRAME)
    axes.tick_params(labelsize=9, colors=FRAME)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    warmup = [float(line["step"]) for line in lines if line.get("phase") == "warmup"]
    if warmup:
        axes.axvspan(0, warmup[-1], color=SHADE, zorder=0)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
