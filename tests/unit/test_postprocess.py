"""Postprocessing keeps the largest part and drops what is too small, and changes nothing else."""

from __future__ import annotations

import tracemalloc
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dints_deploy.imaging.volume import Volume
from dints_deploy.runtime.memory import PARTS_BYTES
from dints_deploy.runtime.postprocess import keep_largest, postprocess
from tests.phantoms import affine, entry

EXAMPLES = settings(max_examples=40, deadline=None)
NEIGHBOURS = [np.array(step) for step in product((-1, 0, 1), repeat=3)]


@st.composite
def label_maps(draw: st.DrawFn) -> NDArray[np.uint8]:
    """Draw a small map of sparse labels 0..2, so that parts touch by faces, edges and corners."""
    shape = draw(st.tuples(*[st.integers(1, 6)] * 3))
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    share = draw(st.floats(0.05, 0.35))
    return generator.choice(np.arange(3, dtype=np.uint8), shape, p=[1 - 2 * share, share, share])


def parts(mask: NDArray[np.bool_]) -> list[set[tuple[int, ...]]]:
    """Return the connected parts of a mask over 26 neighbours, in the order of their first voxels, by walking."""
    left = [tuple(int(n) for n in voxel) for voxel in np.argwhere(mask)]
    found = []
    while left:
        part, queue = set(), [left[0]]
        while queue:
            voxel = queue.pop()
            if voxel in left:
                left.remove(voxel)
                part.add(voxel)
                queue += [tuple(int(n) for n in np.array(voxel) + step) for step in NEIGHBOURS]
        found.append(part)
    return found


def volume(labels: NDArray[Any], spacing: tuple[float, float, float] = (1, 1, 1)) -> Volume:
    return Volume(labels[np.newaxis], affine("LAS", spacing))


@EXAMPLES
@given(label_maps())
def test_only_the_largest_part_over_26_neighbours_stays_the_first_of_equals(labels: NDArray[np.uint8]) -> None:
    kept = keep_largest(labels, 1)
    expected = labels.copy()
    found = parts(labels == 1)
    for part in found:
        if part is not max(found, key=len):
            for voxel in part:
                expected[voxel] = 0
    np.testing.assert_array_equal(kept, expected)
    assert kept.dtype == labels.dtype


def test_looking_for_the_largest_part_takes_the_memory_that_a_plan_counts() -> None:
    labels = (np.random.default_rng(0).random((64, 64, 64)) < 0.1).astype(np.uint16)
    keep_largest(labels, 1)
    tracemalloc.start()
    keep_largest(labels, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= PARTS_BYTES * labels.size


@EXAMPLES
@given(label_maps())
def test_keeping_the_largest_part_twice_is_the_same_as_once(labels: NDArray[np.uint8]) -> None:
    once = keep_largest(labels, 1)
    np.testing.assert_array_equal(keep_largest(once, 1), once)


@pytest.mark.parametrize(("least", "stays"), [(0.053, True), (0.054, True), (0.055, False)])
def test_a_structure_below_its_volume_is_removed_and_others_are_not(least: float, stays: bool) -> None:
    """Nine voxels of 1 x 2 x 3 mm are 0.054 mL."""
    labels = np.zeros((5, 5, 5), np.uint8)
    labels[:3, :3, 0] = 1
    labels[4, 4, 4] = 2
    rules = {"min_volume_ml": {"part-1": least}}
    done = postprocess(volume(labels, (1, 2, 3)), entry(2, postprocess=rules))
    expected = labels.copy()
    if not stays:
        expected[labels == 1] = 0
    np.testing.assert_array_equal(done.data[0], expected)


def test_the_volume_is_measured_after_small_parts_are_gone() -> None:
    labels = np.zeros((9, 1, 1), np.uint8)
    labels[[0, 1, 4, 8]] = 1  # four voxels in all, two in the largest part
    rules = {"keep_largest": [1], "min_volume_ml": {"part-1": 0.003}}
    assert not postprocess(volume(labels), entry(postprocess=rules)).data.any()
    rules = {"keep_largest": [1], "min_volume_ml": {"part-1": 0.002}}
    assert postprocess(volume(labels), entry(postprocess=rules)).data.ravel().tolist() == [1, 1] + [0] * 7


@EXAMPLES
@given(label_maps())
def test_without_rules_nothing_changes_and_with_rules_the_input_does_not(labels: NDArray[np.uint8]) -> None:
    before = labels.copy()
    same = postprocess(volume(labels), entry(2))
    np.testing.assert_array_equal(same.data[0], before)
    rules = {"keep_largest": [1, 2], "min_volume_ml": {"part-1": 0.002, "part-2": 0.002}}
    done = postprocess(volume(labels), entry(2, postprocess=rules))
    np.testing.assert_array_equal(labels, before)
    np.testing.assert_array_equal(done.affine, same.affine)
    assert done.data.dtype == np.uint8
    assert set(np.unique(done.data)) <= set(np.unique(before)) | {0}


def test_an_absent_label_is_no_error() -> None:
    labels = np.zeros((3, 3, 3), np.uint8)
    rules = {"keep_largest": [1], "min_volume_ml": {"part-1": 1.0}}
    assert not postprocess(volume(labels), entry(postprocess=rules)).data.any()
