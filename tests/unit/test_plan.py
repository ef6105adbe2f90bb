"""A fingerprint measures what was written; a plan follows from it by rules, fits its memory, and can be edited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dints_deploy.catalog.dataset import read_dataset
from dints_deploy.catalog.preparation import Window, ZScore
from dints_deploy.errors import DatasetError
from dints_deploy.imaging.nifti import read_nifti, write_nifti
from dints_deploy.imaging.volume import Volume
from dints_search.fingerprint import ChannelFacts, Fingerprint, fingerprint
from dints_search.fits import check_search_fits
from dints_search.plan import (
    choose_batch,
    choose_intensity,
    choose_window,
    flat_axis,
    plan,
    target_spacing,
    write_plan,
)
from dints_search.recipe import find_recipe, override, read_recipe
from dints_search.space import SearchSpace
from dints_search.warp import sampling_grids
from tests.tiny_entry import run_cli
from tests.tiny_task import tiny_recipe, write_task

ZOO = Path(__file__).parents[2] / "zoo"
SMALL = SearchSpace(2, 2)
CPU = torch.device("cpu")

CT = {"name": "CT", "lower": -96.2, "median": 81, "upper": 215.4, "mean": 77.9, "std": 75.4, "zeros": 0}


def facts(**changes: Any) -> Fingerprint:
    """Return the fingerprint of a CT of usual size."""
    fields: dict[str, Any] = {
        "cases": 50,
        "channels": [CT],
        "labels": {1: 1.0},
        "absent": {1: 0},
        "shape": (512, 512, 96), "shape_min": (512, 512, 37), "shape_max": (512, 512, 751),
        "spacing": (0.8, 0.8, 2.5), "spacing_fine": (0.7, 0.7, 1.0), "spacing_min": (0.6, 0.6, 0.7),
        "spacing_max": (0.98, 0.98, 7.5), "extent_min": (300, 300, 150), "extent_max": (500, 500, 700),
    }  # fmt: skip
    return Fingerprint.model_validate(fields | changes)


def test_the_fingerprint_of_written_scans_is_what_was_written(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task", 5)
    for number, path in enumerate(sorted((task / "imagesTr").iterdir())):
        label = read_nifti(task / "labelsTr" / path.name)
        affine = np.diag([-0.5, 1.0, 2.0 + number, 1.0])  # stored from right to left
        values = np.where(label.data > 0, 100.0 * label.data, 0).astype(np.float32)
        write_nifti(path, Volume(values, affine))
        write_nifti(task / "labelsTr" / path.name, Volume(label.data, affine))
    found = fingerprint(read_dataset(task))
    assert (found.cases, found.shape, found.spacing) == (5, (14, 12, 13), (0.5, 1.0, 4.0))
    assert (found.spacing_min[2], found.spacing_max[2], found.extent_max) == (2.0, 6.0, (7.0, 12.0, 78.0))
    assert found.anisotropy == 8
    [channel] = found.channels
    assert (channel.lower, channel.median, channel.upper) == (100, 100, 200)
    assert 100 < channel.mean < 130
    assert 0.7 < channel.zeros < 0.9
    assert sum(found.labels.values()) == pytest.approx(1)
    assert found.labels[1] > found.labels[2] > 0.1
    assert found.absent == {1: 0, 2: 0}


def test_a_case_that_cannot_be_measured_is_named(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task", 3)
    path = task / "imagesTr" / "ball_001.nii.gz"
    image = read_nifti(path)
    data = image.data.copy()
    data[0, 3, 3, 3] = np.nan
    write_nifti(path, Volume(data, image.affine))
    with pytest.raises(DatasetError) as caught:
        fingerprint(read_dataset(task))
    assert (caught.value.code, "ball_001" in caught.value.message) == ("case-invalid", True)


def test_the_spacing_is_the_median_unless_an_axis_is_much_coarser_and_short() -> None:
    assert target_spacing(facts()) == (0.8, 0.8, 1.0)  # 2.5 is three times 0.8: the finer decile
    assert target_spacing(facts(spacing=(0.8, 0.8, 2.0))) == (0.8, 0.8, 2.0)
    assert target_spacing(facts(shape=(512, 512, 400))) == (0.8, 0.8, 2.5)  # long axes keep their median
    assert target_spacing(facts(spacing_fine=(0.7, 0.7, 0.5))) == (0.8, 0.8, 0.8)  # never finer than the others


SPACING = st.tuples(*[st.floats(0.3, 5.0)] * 3)
SHAPE = st.tuples(*[st.integers(8, 600)] * 3)


@given(SHAPE, SPACING, st.floats(1e4, 1e9))
def test_a_window_fits_its_memory_is_a_multiple_and_not_much_larger_than_the_scan(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], memory: float
) -> None:
    window, each = choose_window(shape, spacing, 16, lambda patch: 40.0 * np.prod(patch), memory)
    assert each == 40.0 * np.prod(window)
    assert all(n % 16 == 0 for n in window)
    assert max(window) >= 32
    assert 2 * each <= memory or sum(window) <= 4 * 16
    assert all(n < size + 16 or n <= 32 for n, size in zip(window, shape, strict=True))


def test_a_window_is_about_a_cube_in_mm_and_more_memory_makes_it_larger() -> None:
    sizes = [choose_window((400, 400, 100), (0.8, 0.8, 2.4), 16, lambda p: float(np.prod(p)), m)[0] for m in (4e5, 8e6)]
    assert np.prod(sizes[0]) < np.prod(sizes[1])
    for window in sizes:
        lengths = np.array(window) * (0.8, 0.8, 2.4)
        assert lengths.max() / lengths.min() < 2.5


def test_a_batch_fits_its_memory_and_is_a_small_share_of_the_dataset_but_never_one() -> None:
    assert choose_batch(10, 50, 100, 10**9) == 5
    assert choose_batch(10, 1000, 100, 10**9) == 16
    assert choose_batch(10, 1000, 100, 8000) == 4  # 5 % of the voxels
    assert choose_batch(10, 5, 100, 10**9) == 2


@pytest.mark.parametrize(
    ("window", "spacing", "axis"),
    [
        ((96, 96, 96), (1, 1, 1), None),
        ((96, 96, 48), (1, 1, 2), None),
        ((96, 96, 32), (1, 1, 1), "k"),
        ((96, 96, 64), (0.6, 0.6, 3.6), "k"),
        ((16, 320, 320), (3, 0.6, 0.6), "i"),
        ((64, 16, 16), (1, 1, 1), None),
    ],
)
def test_an_axis_of_few_or_thick_voxels_is_flat(window: Any, spacing: Any, axis: str | None) -> None:
    assert flat_axis(window, spacing) == axis


def test_patches_of_a_flat_plan_stay_in_their_planes(tmp_path: Path) -> None:
    dataset = read_dataset(write_task(tmp_path / "task", 5))
    thick = facts(shape=(320, 320, 20), spacing=(0.6, 0.6, 3.6), spacing_fine=(0.6, 0.6, 3.0), labels={1: 0.5, 2: 0.5},
                  absent={1: 0, 2: 0})  # fmt: skip
    planned, reasons = plan(dataset, thick, memory_bytes=2**33, space=SMALL)
    augmentation = planned.retraining.augmentation
    assert augmentation.flat == "k"
    assert any("augmentation.flat k" in reason for reason in reasons)
    shape = planned.window
    assert shape[2] < shape[0] / 3

    def grids(**changes: Any) -> torch.Tensor:
        rngs = [np.random.default_rng(n) for n in range(4)]
        return sampling_grids(shape, augmentation.model_copy(update={"rotation": 1.0, **changes}), rngs, CPU)[1]

    along = torch.linspace(-1, 1, shape[2]).expand(4, *shape)
    assert torch.allclose(grids(scaling=1.0, elastic=1.0)[..., 0], along, atol=1e-5)
    across = grids(scaling=1.0)[..., 1:]
    assert (across.diff(dim=3).abs() < 1e-5).all()  # the same change in every plane
    assert across.std(dim=0).max() > 0.05
    outside, outside_without = ((found.abs() > 1).any(dim=-1).float().mean() for found in (grids(), grids(flat=None)))
    assert outside < 0.2
    assert outside_without > 0.5  # most of what they would show lies around the scan


def test_ct_gets_a_fixed_window_and_mr_its_own_score() -> None:
    seen = facts().channels[0]
    assert choose_intensity("CT", seen) == Window(scheme="window", lower=-96, upper=215, mean=77.9, std=75.4)
    expected = ZScore(scheme="zscore", clip_percentiles=(0.5, 99.5))
    assert choose_intensity("MR", seen) == expected
    stripped = ChannelFacts.model_validate(seen.model_dump() | {"zeros": 0.6})
    assert choose_intensity("MR", stripped) == expected.model_copy(update={"nonzero": True})


def test_a_plan_is_a_recipe_that_keeps_a_persons_words_and_can_be_read_and_changed(tmp_path: Path) -> None:
    dataset = read_dataset(write_task(tmp_path / "task", 5))
    measured, start = fingerprint(dataset), tiny_recipe(tmp_path)
    recipe, reasons = plan(dataset, measured, start=start, memory_bytes=1 << 28, channel_multiplier=0.25, space=SMALL)
    assert (recipe.labels, recipe.title, recipe.accepts) == (start.labels, start.title, start.accepts)
    assert (recipe.spacing, recipe.window) == ((1.0, 1.0, 1.0), (16, 12, 16))
    assert recipe.retraining.channel_multiplier == 0.25
    path = tmp_path / "plan.toml"
    path.write_text(write_plan(recipe, reasons), encoding="utf-8")
    assert all(f"# {line}" in path.read_text() for line in reasons)
    assert read_recipe(path) == recipe
    changed = override(recipe, ["window = [8, 8, 8]", "retraining.augmentation.noise = 0.5"])
    assert (changed.window, changed.retraining.augmentation.noise) == ((8, 8, 8), 0.5)
    changed = override(recipe, ["labels.1.nsd_tolerance = 2.5", "labels.0.colour.2 = 7"])
    assert [label.nsd_tolerance for label in changed.labels] == [recipe.labels[0].nsd_tolerance, 2.5]
    assert changed.labels[0].colour == (*recipe.labels[0].colour[:2], 7)


def test_a_plan_that_starts_from_a_recipe_fits_the_levels_that_it_searches(tmp_path: Path) -> None:
    dataset = read_dataset(write_task(tmp_path / "task", 5))
    start, measured = tiny_recipe(tmp_path), fingerprint(dataset)
    for depths in (2, 4):
        own = override(start, [f"search.num_depths={depths}", "search.num_blocks=2"])
        recipe, _ = plan(dataset, measured, start=own, memory_bytes=1 << 28, channel_multiplier=0.25)
        assert not any(n % 2**depths for n in recipe.window)
        assert (min(recipe.window) < 16) == (depths == 2)


def test_a_task_that_nobody_described_gets_a_recipe_to_complete(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task", 5)
    said = run_cli("data", "plan", task, "-o", tmp_path / "mine.toml", "--max-memory", "64M", "--channels", "0.125")
    assert said.code == 0, said.err
    recipe = find_recipe(str(tmp_path / "mine.toml"))
    assert [(label.value, label.name, label.type.scheme) for label in recipe.labels] == [
        (1, "shell", "99DINTS"), (2, "core", "99DINTS"),
    ]  # fmt: skip
    assert (recipe.task, recipe.channels[0].modality, recipe.accepts.modality) == ("Balls", "MR", ("MR",))
    assert (recipe.window[0], recipe.search.precision, recipe.retraining.precision) == (32, "fp32", "fp32")
    check_search_fits(recipe)  # bf16 would be refused, there and after, at two voxels along i at the deepest level
    again = run_cli("data", "plan", task, "-o", tmp_path / "mine.toml")
    assert (again.code, "may hold your changes" in again.err) == (2, True)


WRONG = [
    "retraining.batch = 0",
    "retraining.batches = 2",
    "window = 3",
    "title.x = 1",
    "nothing",
    "batch = [",
    "labels = []",
    "labels.2.nsd_tolerance = 1",
    "labels.-1.nsd_tolerance = 1",
    "labels.first.nsd_tolerance = 1",
]


@pytest.mark.parametrize("setting", WRONG)
def test_a_figure_that_no_recipe_has_is_refused(setting: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        override(tiny_recipe(tmp_path), [setting])
    assert (caught.value.code, setting.split("=")[0].split(".")[0].strip() in caught.value.message) == (
        "recipe-invalid",
        True,
    )
