"""Draw an architecture like the figure of the DiNTS paper: levels down, blocks to the right, edges by operation.

An edge leads from left to right. The same input gives the same bytes: no dates, no random names inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from dints_deploy.files import replacing
from dints_search.genotype import OPERATIONS, Edge, Genotype
from dints_search.space import ArchitectureParameters, SearchSpace

COLOURS: Final = ("#7f7f7f", "#d62728", "#1f77b4", "#2ca02c", "#e69f00")
"""Of the operations, in their order: grey for the one that does nothing, red for the dearest."""

NAMES: Final = ("skip", "3x3x3", "P3D 3x3x1", "P3D 3x1x3", "P3D 1x3x3")
"""Of the operations, for a person."""

SOLID: Final[tuple[float, tuple[float, ...]]] = (0.0, ())
DASHED: Final[tuple[float, tuple[float, ...]]] = (0.0, (2.5, 1.2))

INK: Final = "#222226"
FAINT: Final = "#d9d9dd"
FRAME: Final = "#5b5b66"

ROW: Final = 0.85
"""Distance of two levels, where two blocks are 1 apart."""

NODE_POINTS: Final = 15.0
"""Diameter of a node."""

Point = tuple[float, float]
Segment = tuple[Point, Point]


def draw_architecture(genotype: Genotype, path: Path, *, title: str = "") -> tuple[Path, Path]:
    """Draw a genotype to `path` with the suffixes .svg and .png; return both.

    Raises:
        OutputError: the files cannot be written.
    """
    return save_vector_and_pixels(architecture_figure(genotype, title=title), path)


def architecture_figure(genotype: Genotype, *, title: str = "") -> Figure:
    """Draw a genotype: idle nodes small and grey, idle edges hairlines, squares for the stems and the head."""
    space = SearchSpace(genotype.num_blocks, genotype.num_depths)
    active = np.array(genotype.edge_active, dtype=bool)
    operations = np.array(genotype.edge_operation)
    figure, axes = _canvas(space, title)
    _idle_edges(axes, space, active)
    for operation, colour in enumerate(COLOURS):
        style = DASHED if operation == 0 else SOLID
        chosen = [_place(edge, b) for b, e, edge in _all_edges(space) if active[b, e] and operations[b, e] == operation]
        axes.add_collection(LineCollection(chosen, colors=colour, linewidths=2.4, linestyles=[style], zorder=3))
    _nodes(axes, np.array(genotype.node_active, dtype=np.float64))
    _stems(axes, genotype.node_active[0], genotype.node_active[-1], blocks=genotype.num_blocks)
    counts = [int((active & (operations == o)).sum()) for o in range(len(OPERATIONS))]
    labels = [f"{name}  ({count})" for name, count in zip(NAMES, counts, strict=True)]
    _legend(axes, space, labels, dashed=True)
    return figure


def draw_relaxation(parameters: ArchitectureParameters, path: Path, *, title: str = "") -> tuple[Path, Path]:
    """Draw what a search holds likely to `path` with the suffixes .svg and .png; return both.

    An edge is as wide and as opaque as it is likely to be on; its length is shared among the operations by weight. A
    node is as dark as it is likely to be active.

    Raises:
        OutputError: the files cannot be written.
    """
    space = parameters.space
    marginals: NDArray[np.float64] = parameters.edge_marginals().detach().cpu().double().numpy()
    weights: NDArray[np.float64] = parameters.operation_weights().detach().cpu().double().numpy()
    figure, axes = _canvas(space, title)
    for b, e, edge in sorted(_all_edges(space), key=lambda item: marginals[item[0], item[1]]):
        strength = float(marginals[b, e])
        pieces = _split(_place(edge, b), weights[b, e])
        axes.add_collection(
            LineCollection(
                pieces,
                colors=COLOURS,
                linewidths=0.4 + 5 * strength,
                alpha=0.12 + 0.88 * strength,
                capstyle="butt",
                zorder=3,
            )
        )
    _nodes(axes, _node_probabilities(parameters))
    everything = (1,) * space.num_depths
    _stems(axes, everything, everything, blocks=space.num_blocks)
    labels = [f"{name}  ({share:.0%})" for name, share in zip(NAMES, weights.mean(axis=(0, 1)), strict=True)]
    _legend(axes, space, labels, dashed=False)
    return save_vector_and_pixels(figure, path)


def save_vector_and_pixels(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Write a figure as .svg and as .png beside each other."""
    return save_figure(figure, path.with_suffix(".svg")), save_figure(figure, path.with_suffix(".png"))


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure durably, the same bytes for the same figure; the suffix says how."""
    nameless = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with mpl.rc_context({"svg.hashsalt": "dints", "svg.fonttype": "none"}), replacing(path) as partial:
        figure.savefig(partial, dpi=130, metadata=nameless, facecolor="white", bbox_inches="tight", pad_inches=0.15)
    return path


def _canvas(space: SearchSpace, title: str) -> tuple[Figure, Axes]:
    """Return an empty grid of one unit a block with the names of levels and blocks."""
    blocks, depths = space.num_blocks, space.num_depths
    left, right, top, bottom = -2.5, blocks + 1.9, 0.95, -(depths - 1) * ROW - 1.25
    figure = Figure(figsize=(0.78 * (right - left), 0.78 * (top - bottom)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_aspect("equal")
    axes.axis("off")
    for level in range(depths):
        axes.text(-1.85, -ROW * level, f"1/{2 ** (level + 1)}", ha="right", va="center", color=INK, fontsize=10)
    for block in range(blocks):
        below = -(depths - 1) * ROW - 0.5
        axes.text(block + 0.5, below, str(block + 1), ha="center", va="center", color=FRAME, fontsize=9)
    axes.text(-1.85, 0.45, "level", ha="right", va="center", color=FRAME, fontsize=9)
    axes.text(-0.1, -(depths - 1) * ROW - 0.5, "block", ha="right", va="center", color=FRAME, fontsize=9)
    if title:
        axes.text((left + right) / 2, 0.8, title, ha="center", va="center", color=INK, fontsize=12)
    return figure, axes


def _all_edges(space: SearchSpace) -> list[tuple[int, int, Edge]]:
    return [(b, e, edge) for b in range(space.num_blocks) for e, edge in enumerate(space.edges)]


def _place(edge: Edge, block: int) -> Segment:
    return (block, -ROW * edge.in_level), (block + 1, -ROW * edge.out_level)


def _idle_edges(axes: Axes, space: SearchSpace, active: NDArray[np.bool_]) -> None:
    idle = [_place(edge, b) for b, e, edge in _all_edges(space) if not active[b, e]]
    axes.add_collection(LineCollection(idle, colors=FAINT, linewidths=0.6, zorder=1))


def _split(segment: Segment, shares: NDArray[np.float64]) -> list[Segment]:
    """Cut a segment in pieces of these shares of its length."""
    start, end = np.array(segment)
    cuts = np.concatenate([[0.0], np.cumsum(shares) / shares.sum()])
    points = [(float(x), float(y)) for x, y in start + cuts[:, None] * (end - start)]
    return list(pairwise(points))


def _nodes(axes: Axes, strengths: NDArray[np.float64]) -> None:
    """Draw the nodes (L + 1, D): from 0, small and grey, to 1, black."""
    for row, levels in enumerate(strengths):
        for level, strength in enumerate(levels):
            rim = INK if strength > 0.5 else "#b4b4bc"
            fill = tuple(0.9 * (1 - strength) + strength * c for c in mpl.colors.to_rgb(INK))
            size = NODE_POINTS if strength > 0 else 0.7 * NODE_POINTS
            axes.plot(row, -ROW * level, "o", ms=size, mfc=fill, mec=rim, mew=1.3, zorder=5)


def _node_probabilities(parameters: ArchitectureParameters) -> NDArray[np.float64]:
    """Return (L + 1, D): how likely an edge leaves a node, or for the last row enters it."""
    space = parameters.space
    sides = [parameters.reach(torch.from_numpy(space.incidence(side))) for side in ("in", "out")]
    leaving, entering = (side.detach().cpu().double().numpy() for side in sides)
    rows: NDArray[np.float64] = np.concatenate([leaving, entering[-1:]])
    return rows


def _stems(axes: Axes, first: Sequence[int], last: Sequence[int], *, blocks: int) -> None:
    """Draw the scan with the input stems in use, and the output stems from the deepest node in use up to the head."""
    entered = [-ROW * level for level, on in enumerate(first) if on]
    left = [-ROW * level for level, on in enumerate(last) if on]
    deepest, scan, climb, head = min(left), -1.45, blocks + 0.75, blocks + 1.5
    lines: list[Segment] = [((scan, y), (0.0, y)) for y in entered]
    lines += [((blocks, y), (climb, y)) for y in left]
    lines += [((climb, deepest), (climb, 0.0)), ((climb, 0.0), (head, 0.0))]
    axes.add_collection(LineCollection(lines, colors=FRAME, linewidths=1.4, zorder=2))
    bottom = -ROW * (len(first) - 1)
    axes.plot([scan, scan], [0.28, bottom - 0.28], color=FRAME, linewidth=10, solid_capstyle="round", zorder=4)
    axes.text(scan, bottom / 2, "scan", color="white", rotation=90, ha="center", va="center", fontsize=8, zorder=6)
    squares = [(-0.75, y) for y in entered] + [(climb, -ROW * n) for n in range(round(-deepest / ROW) + 1)]
    for x, y in squares:
        axes.plot(x, y, "s", ms=0.75 * NODE_POINTS, mfc="white", mec=FRAME, mew=1.4, zorder=5)
    axes.plot(head, 0, "s", ms=1.1 * NODE_POINTS, mfc=FRAME, mec=FRAME, zorder=5)
    for x, name in ((-0.75, "stems"), (climb, "stems"), (head, "head")):
        axes.text(x, 0.45, name, ha="center", va="center", color=FRAME, fontsize=9)


def _legend(axes: Axes, space: SearchSpace, labels: Sequence[str], *, dashed: bool) -> None:
    """Name the operations below the blocks."""
    styles = [DASHED if dashed and n == 0 else SOLID for n in range(len(labels))]
    lines = [
        Line2D([], [], color=colour, linewidth=2.6, linestyle=style)
        for colour, style in zip(COLOURS, styles, strict=True)
    ]
    columns = len(labels) if space.num_blocks >= 8 else 2
    axes.legend(
        lines,
        labels,
        loc="upper center",
        bbox_to_anchor=(space.num_blocks / 2, -(space.num_depths - 1) * ROW - 0.7),
        bbox_transform=axes.transData,
        ncols=columns,
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        handlelength=2.4,
    )
