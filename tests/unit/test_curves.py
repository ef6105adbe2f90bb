"""The curves show every step that was logged, and the running mean is a mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dints_search.curves import draw_retraining_curves, draw_search_curves, running_mean
from dints_search.metrics import Figures


def lines(warmup: int, search: int) -> list[Figures]:
    """Return the lines of a search."""
    found: list[Figures] = [
        {"step": n, "phase": "warmup", "loss": 1 / n, "learning_rate": 0.1, "progress": 0.0, "seconds": 1.0}
        for n in range(1, warmup + search + 1)
    ]
    more = {"L_seg": 0.5, "L_alpha": 0.3, "L_eta": 0.007, "L_tp": 30.0, "L_m": 0.2, "usage": 0.7}
    return found[:warmup] + [line | more | {"phase": "search"} for line in found[warmup:]]


@pytest.mark.parametrize(("warmup", "search"), [(30, 30), (5, 0), (0, 1)])
def test_a_search_is_drawn_at_any_length(warmup: int, search: int, tmp_path: Path) -> None:
    path = draw_search_curves(lines(warmup, search), tmp_path / "curves.png", sigma=0.5)
    with Image.open(path) as image:
        assert image.size[0] > 1000
        assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_the_same_lines_give_the_same_bytes_and_others_do_not(tmp_path: Path) -> None:
    first, again, other = (
        draw_retraining_curves(lines(length, 0), tmp_path / f"{name}.png").read_bytes()
        for name, length in (("first", 20), ("again", 20), ("other", 21))
    )
    assert first == again != other


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.integers(1, 50))
def test_the_running_mean_is_the_mean_of_the_values_around(values: list[float], width: int) -> None:
    found = running_mean(np.array(values), width)
    for n, mean in enumerate(found):
        around = values[max(0, n - width // 2) : n + width - width // 2]
        assert mean == pytest.approx(sum(around) / len(around), abs=1e-9)
