"""Training cases: cut to the body, kept on disk where asked, and refused where a class is in none of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dints_deploy.catalog.dataset import read_dataset
from dints_deploy.catalog.preparation import Channel, Identity, Preparation
from dints_deploy.errors import DatasetError
from dints_search.dataset import TrainingCase, body_box, check_classes, load_cases
from tests.tiny_task import tiny_recipe, write_task

SIZES = st.tuples(*[st.integers(8, 40)] * 3)


def preparation(fill: str, window: tuple[int, int, int] = (8, 8, 8)) -> Preparation:
    channel = Channel.model_validate(
        {"name": "A", "modality": "MR", "intensity": Identity(scheme="identity"), "fill": fill}
    )
    return Preparation(channels=(channel,), window=window)


@given(SIZES, st.integers(0, 2**32 - 1), st.sampled_from(["zero", "minimum"]))
def test_the_box_holds_the_body_every_label_and_at_least_a_window(
    size: tuple[int, int, int], seed: int, fill: str
) -> None:
    rng = np.random.default_rng(seed)
    around = 0.0 if fill == "zero" else -7.0
    data = np.full((1, *size), around, np.float32)
    label = np.zeros(size, np.uint8)
    for volume in (data[0], label):
        first = [rng.integers(0, n) for n in size]
        last = [rng.integers(a, n) + 1 for a, n in zip(first, size, strict=True)]
        volume[tuple(slice(a, b) for a, b in zip(first, last, strict=True))] = 3
    box = body_box(data, label, preparation(fill))
    left = np.ones(size, bool)
    left[box] = False
    assert not label[left].any()
    assert (data[0][left] == around).all()
    for part, n in zip(box, size, strict=True):
        assert 0 <= part.start <= part.stop <= n
        assert part.stop - part.start >= 8


def test_the_box_of_a_small_body_is_small_and_that_of_an_empty_scan_is_whole() -> None:
    data = np.zeros((1, 40, 40, 40), np.float32)
    label = np.zeros((40, 40, 40), np.uint8)
    assert body_box(data, label, preparation("zero")) == (slice(0, 40),) * 3
    data[0, 20:24, 20:24, 20:24] = 1
    assert body_box(data, label, preparation("zero")) == (slice(18, 26),) * 3


def test_cases_from_the_cache_are_those_that_were_prepared_and_lie_on_disk(tmp_path: Path) -> None:
    recipe, task = tiny_recipe(tmp_path), read_dataset(write_task(tmp_path / "task", 3))
    plain = load_cases(task.cases, recipe.preparation, recipe.label_names)
    for _ in range(2):  # made, then found
        cached = load_cases(task.cases, recipe.preparation, recipe.label_names, cache=tmp_path / "cache")
        for ours, theirs in zip(cached, plain, strict=True):
            assert isinstance(ours.image, np.memmap)
            assert ours.id == theirs.id
            assert np.array_equal(ours.image, theirs.image)
            assert np.array_equal(ours.label, theirs.label)
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_a_changed_preparation_does_not_find_the_old_cases_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    recipe, task = tiny_recipe(tmp_path), read_dataset(write_task(tmp_path / "task", 1))
    cache = tmp_path / "cache"
    load_cases(task.cases, recipe.preparation, recipe.label_names, cache=cache)
    other = recipe.preparation.model_copy(update={"spacing": (2.0, 2.0, 2.0)})
    [coarse] = load_cases(task.cases, other, recipe.label_names, cache=cache)
    assert coarse.label.shape == (12, 12, 12)
    assert len(list(cache.iterdir())) == 4
    for file in cache.glob("*.image.npy"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DatasetError) as caught:
        load_cases(task.cases, recipe.preparation, recipe.label_names, cache=cache)
    assert (caught.value.code, "ball_000" in caught.value.message) == ("case-invalid", True)


def test_a_class_that_no_case_shows_is_named() -> None:
    label = np.zeros((4, 4, 4), np.uint8)
    label[0] = 1
    cases = [TrainingCase(name, np.zeros((1, 4, 4, 4), np.float32), label) for name in ("first", "last")]
    check_classes(cases, {1: "shell"})
    with pytest.raises(DatasetError) as caught:
        check_classes(cases, {1: "shell", 2: "core"})
    assert caught.value.code == "dataset-invalid"
    assert all(word in caught.value.message for word in ("2 (core)", "first", "last"))
