"""The pictures show every active edge once, in its operation's colour, and are the same bytes each time."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dints_deploy.errors import OutputError
from dints_search.draw import COLOURS, FAINT, draw_architecture, draw_relaxation
from dints_search.genotype import OPERATIONS
from dints_search.space import ArchitectureParameters, SearchSpace, sample_genotype

SPACES = [SearchSpace(12, 4), SearchSpace(1, 2), SearchSpace(3, 5)]


def strokes(svg: Path) -> list[tuple[str, float, float]]:
    """Return colour, width and opacity of every stroked line."""
    styles = re.findall(r'style="(fill: none;[^"]* stroke: #[^"]*)"', svg.read_text(encoding="utf-8"))
    return [(_colour(style), _value(style, "width", 1.0), _value(style, "opacity", 1.0)) for style in styles]


def _colour(style: str) -> str:
    return str(re.findall(r"stroke: (#\w{6})", style)[0])


def _value(style: str, name: str, default: float) -> float:
    found = re.search(rf"stroke-{name}: ([\d.]+)", style)
    return float(found[1]) if found else default


@pytest.mark.parametrize("space", SPACES)
def test_every_active_edge_is_drawn_once_in_the_colour_of_its_operation(space: SearchSpace, tmp_path: Path) -> None:
    genotype = sample_genotype(space, random.Random(5))
    svg, _ = draw_architecture(genotype, tmp_path / "architecture")
    drawn = [colour for colour, _, _ in strokes(svg)]
    pairs = zip(genotype.edge_active, genotype.edge_operation, strict=True)
    used = [o for active, operations in pairs for on, o in zip(active, operations, strict=True) if on]
    for operation in range(len(OPERATIONS)):
        assert drawn.count(COLOURS[operation]) == used.count(operation) + 1  # one more in the legend
    assert drawn.count(FAINT) == space.num_blocks * space.num_edges - len(used)


def test_the_picture_names_levels_blocks_and_operations(tmp_path: Path) -> None:
    svg, _ = draw_architecture(sample_genotype(SearchSpace(12, 4), random.Random(1)), tmp_path / "a", title="sigma 0.5")
    words = re.findall(r">([^<>\n]+)</text>", svg.read_text(encoding="utf-8"))
    assert {"sigma 0.5", "scan", "stems", "head", "1/2", "1/4", "1/8", "1/16", "1", "12"} <= set(words)
    assert any(word.startswith("3x3x3 ") for word in words)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_same_architecture_gives_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    genotype = sample_genotype(SPACES[0], random.Random(2))
    first, again = (draw_architecture(genotype, tmp_path / name)[suffix == ".png"] for name in ("first", "again"))
    assert first.suffix == suffix
    assert first.read_bytes() == again.read_bytes()


def test_the_pixels_show_the_colours_of_the_operations_in_use(tmp_path: Path) -> None:
    genotype = sample_genotype(SPACES[0], random.Random(3))
    _, png = draw_architecture(genotype, tmp_path / "architecture")
    with Image.open(png) as image:
        seen = set(np.unique(np.asarray(image.convert("RGB")) @ np.array([1 << 16, 1 << 8, 1])).tolist())
    assert {int(colour.removeprefix("#"), 16) for colour in COLOURS} <= seen


def test_likely_edges_are_wide_and_opaque_and_heavy_operations_long(tmp_path: Path) -> None:
    parameters = ArchitectureParameters(SearchSpace(2, 2))
    with torch.no_grad():
        parameters.alpha_a.fill_(-3.0)
        parameters.alpha_c.fill_(0.0)
        parameters.alpha_a[0, 1] = 6.0
    svg, _ = draw_relaxation(parameters, tmp_path / "relaxation")
    of_skip = sorted({(width, opacity) for colour, width, opacity in strokes(svg) if colour == COLOURS[0]})
    marginals = parameters.edge_marginals().detach()
    likely = float(marginals[0, 1])
    assert of_skip[-1][0] == pytest.approx(0.4 + 5 * likely, abs=1e-3)
    assert of_skip[-1][1] == pytest.approx(0.12 + 0.88 * likely, abs=1e-3)
    assert of_skip[0][0] == pytest.approx(0.4 + 5 * float(marginals.min()), abs=1e-3)


def test_a_picture_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="expected to write"):
        draw_architecture(sample_genotype(SPACES[1], random.Random(1)), tmp_path / "file" / "architecture")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
