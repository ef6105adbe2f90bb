"""Dice, surface Dice and volumes against the reference (MONAI's port of surface-distance), brute force and by hand."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter

from dints_deploy.errors import DatasetError
from dints_deploy.imaging.volume import Grid
from dints_deploy.runtime.metrics import (
    CaseScores,
    Labels,
    Mask,
    dice,
    score_case,
    summarise,
    surface_dice,
    volume_ml,
)
from dints_deploy.runtime.surfels import neighbour_codes, surfel_areas

Spacing = tuple[float, float, float]
Point = tuple[int, int, int]

SPACINGS: list[Spacing] = [(1.0, 1.0, 1.0), (0.7, 0.7, 5.0), (2.5, 0.9, 1.3), (0.31, 4.0, 1.1)]
CORNERS: list[Point] = [(i, j, k) for i, j, k in product((0, 1), repeat=3)]


def blob(shape: Point, seed: int, smooth: float, share: float) -> Mask:
    """Return smoothed noise, thresholded so that about `share` of the voxels is set; low `smooth` is all speckle."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), smooth)
    mask: Mask = noise > np.quantile(noise, 1.0 - share)
    return mask


def ball(shape: Point, centre: tuple[float, float, float], radius: float, spacing: Spacing) -> Mask:
    mm = [(index - c) * s for index, c, s in zip(np.indices(shape), centre, spacing, strict=True)]
    mask: Mask = sum(axis**2 for axis in mm) <= radius**2
    return mask


def box(shape: Point, low: Point, high: Point) -> Mask:
    mask = np.zeros(shape, dtype=np.bool_)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


def monai_nsd(prediction: Mask, reference: Mask, spacing: Spacing, tolerance: float) -> float:
    pytest.importorskip("monai")
    import torch
    from monai.metrics import compute_surface_dice

    pair = [torch.from_numpy(mask[None, None]) for mask in (prediction, reference)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference warns about its own arguments
        nsd = compute_surface_dice(*pair, [tolerance], include_background=True, spacing=spacing, use_subvoxels=True)
    return float(nsd[0, 0])


def dense_nsd(prediction: Mask, reference: Mask, spacing: Spacing, tolerance: float) -> float:
    """Return the surface Dice in double precision by distance transforms over the whole padded image."""
    areas = surfel_areas(spacing)
    codes = [neighbour_codes(np.pad(mask, 3)) for mask in (prediction, reference)]
    surfaces = [(code > 0) & (code < 255) for code in codes]
    within = 0.0
    for code, surface, other in zip(codes, surfaces, surfaces[::-1], strict=True):
        distances = distance_transform_edt(~other, sampling=spacing)
        within += float(areas[code[surface & (distances <= tolerance * (1.0 + 1e-9))]].sum())
    return within / sum(float(areas[code].sum()) for code in codes)


# --- the table of areas


@pytest.mark.parametrize("spacing", SPACINGS)
def test_all_256_areas_equal_the_references(spacing: Spacing) -> None:
    utils = pytest.importorskip("monai.metrics.utils")
    table, kernel = utils.create_table_neighbour_code_to_surface_area(spacing)
    bits = [int(kernel[0, 0][corner]) for corner in CORNERS]  # the reference numbers the corners its own way
    theirs = [float(table[sum(bits[n] for n in range(8) if code >> n & 1)]) for code in range(256)]
    np.testing.assert_allclose(surfel_areas(spacing), theirs, rtol=1e-6)  # theirs are float32
    assert np.count_nonzero(surfel_areas(spacing)) == 254


@pytest.mark.parametrize("spacing", SPACINGS)
def test_areas_are_those_of_polygons_through_the_middles_of_edges(spacing: Spacing) -> None:
    polygons = [area_by_polygons(code, np.array(spacing)) for code in range(256)]
    np.testing.assert_allclose(surfel_areas(spacing), polygons, rtol=1e-12)


def area_by_polygons(code: int, spacing: NDArray[np.float64]) -> float:
    """Return the area of a code from its polygons, built by the rules of `surfels`: minority, parts, largest."""
    inside = {corner for bit, corner in enumerate(CORNERS) if code >> bit & 1}
    body = inside if len(inside) <= 4 else set(CORNERS) - inside
    total = 0.0
    while body:
        part = {body.pop()}
        while touching := {corner for corner in body if any(math.dist(corner, other) == 1 for other in part)}:
            part |= touching
            body -= touching
        loop = outline(part)
        options = list(triangulations(list(range(len(loop)))))
        largest = max(options, key=lambda triangles: triangle_area(loop, triangles))
        total += triangle_area(loop * spacing, largest)
    return total


def outline(part: set[Point]) -> NDArray[np.float64]:
    """Return the closed polygon (N, 3) between a part and the other corners: one segment on every face it crosses."""
    segments = []
    for axis, side in product(range(3), (0, 1)):
        ring = [tuple(np.insert(corner, axis, side).tolist()) for corner in ((0, 0), (0, 1), (1, 1), (1, 0))]
        steps = [(ring[n], ring[(n + 1) % 4]) for n in range(4)]
        crossed = [tuple(np.add(a, b) / 2.0) for a, b in steps if (a in part) != (b in part)]
        if crossed:
            first, second = crossed
            segments.append((first, second))
    path = list(segments.pop())
    while segments:
        segment = next(s for s in segments if path[-1] in s)
        segments.remove(segment)
        path.append(segment[1] if segment[0] == path[-1] else segment[0])
    assert path[0] == path[-1]
    return np.array(path[:-1])


def triangulations(vertices: list[int]) -> Iterator[list[tuple[int, int, int]]]:
    if len(vertices) < 3:
        yield []
    for n in range(1, len(vertices) - 1):
        for left, right in product(triangulations(vertices[: n + 1]), triangulations(vertices[n:])):
            yield [(vertices[0], vertices[n], vertices[-1]), *left, *right]


def triangle_area(loop: NDArray[np.float64], triangles: list[tuple[int, int, int]]) -> float:
    return sum(float(np.linalg.norm(np.cross(loop[b] - loop[a], loop[c] - loop[a]))) / 2 for a, b, c in triangles)


def test_neighbour_codes_name_the_voxels_around_a_corner() -> None:
    mask = blob((3, 4, 5), seed=1, smooth=0.0, share=0.5)
    padded = np.pad(mask, 1)
    codes = neighbour_codes(mask)
    assert codes.shape == (4, 5, 6)
    for i, j, k in np.ndindex(codes.shape):
        voxels = padded[i : i + 2, j : j + 2, k : k + 2].ravel()
        assert codes[i, j, k] == sum(1 << bit for bit in range(8) if voxels[bit])


# --- surface Dice


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(2, 14)] * 3),
    seed=st.integers(0, 10**6),
    smooth=st.sampled_from([0.0, 0.6, 1.5, 3.0]),
    shares=st.tuples(*[st.floats(0.05, 0.9)] * 2),
    spacing=st.sampled_from(SPACINGS),
    tolerance=st.sampled_from([0.0, 0.5, 0.7, 1.0, 1.37, 2.0, 3.1, 9.0]),
)
def test_surface_dice_equals_the_reference_and_distance_transforms(
    shape: Point, seed: int, smooth: float, shares: tuple[float, float], spacing: Spacing, tolerance: float
) -> None:
    prediction, reference = (blob(shape, seed + n, smooth, share) for n, share in enumerate(shares))
    nsd = surface_dice(prediction, reference, spacing=spacing, tolerance=tolerance)
    if nsd is None or not (prediction.any() and reference.any()):
        assert nsd == (0.0 if prediction.any() or reference.any() else None)
        return
    assert nsd == pytest.approx(dense_nsd(prediction, reference, spacing, tolerance), abs=1e-12)
    assert nsd == pytest.approx(monai_nsd(prediction, reference, spacing, tolerance), abs=2e-6)


def test_surface_dice_by_hand() -> None:
    a, b, c = spacing = (0.8, 1.5, 3.0)
    one, two = (
        box((3, 3, 4), (1, 1, 1), (2, 2, 2)),
        box((3, 3, 4), (1, 1, 1), (2, 2, 3)),
    )  # the second is longer along k
    tip = math.hypot(b * c, a * c, a * b) / 8  # mm2 of surface at each of the 4 corners of an end
    side = math.hypot(b * c, a * c) / 2  # and at each of the 4 corners in the middle of the longer one
    expected = (12 * tip + 4 * side) / (16 * tip + 4 * side)  # 4 tips of the longer one are c mm away
    assert surface_dice(one, two, spacing=spacing, tolerance=0.0) == pytest.approx(expected, rel=1e-12)
    assert surface_dice(one, two, spacing=spacing, tolerance=2.99) == pytest.approx(expected, rel=1e-12)
    assert surface_dice(one, two, spacing=spacing, tolerance=3.0) == 1.0


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_ball_shifted_by_a_known_distance_agrees_from_that_tolerance_on(spacing: Spacing, axis: int) -> None:
    shape = (48, 48, 48)
    reference = ball(shape, (22.0, 22.0, 22.0), 12.0 * min(spacing), spacing)
    prediction = np.roll(reference, 2, axis)
    shift = 2.0 * spacing[axis]
    assert surface_dice(prediction, reference, spacing=spacing, tolerance=shift) == 1.0
    just_below = surface_dice(prediction, reference, spacing=spacing, tolerance=0.49 * shift)
    assert just_below is not None
    assert just_below < 1.0


def test_voxels_that_are_longer_along_one_axis_make_a_shift_along_it_count_more() -> None:
    reference = box((20, 20, 20), (6, 6, 6), (14, 14, 14))
    along_i, along_k = np.roll(reference, 1, 0), np.roll(reference, 1, 2)
    assert surface_dice(along_i, reference, spacing=(1, 1, 1), tolerance=1.0) == 1.0
    assert surface_dice(along_k, reference, spacing=(1, 1, 1), tolerance=1.0) == 1.0
    assert surface_dice(along_i, reference, spacing=(1, 1, 3), tolerance=1.0) == 1.0
    along_thick = surface_dice(along_k, reference, spacing=(1, 1, 3), tolerance=1.0)
    assert along_thick is not None
    assert along_thick < 0.9


@pytest.mark.parametrize("spacing", [(1.0000001, 1, 1), (0.99999994, 1, 1), (1.0 + 4e-16, 1, 1)])
def test_rounding_of_the_spacing_does_not_decide_a_tie(spacing: Spacing) -> None:
    reference = box((8, 6, 6), (2, 2, 2), (5, 4, 4))
    assert surface_dice(np.roll(reference, 1, 0), reference, spacing=spacing, tolerance=1.0) == 1.0


def test_a_spacing_that_is_truly_larger_is_outside_the_tolerance() -> None:
    reference = box((8, 6, 6), (2, 2, 2), (5, 4, 4))
    nsd = surface_dice(np.roll(reference, 1, 0), reference, spacing=(1.00001, 1, 1), tolerance=1.0)
    assert nsd is not None
    assert nsd < 1.0


@pytest.mark.parametrize("tolerance", [0.0, 0.7, 2.0])
def test_the_border_of_the_image_is_surface(tolerance: float) -> None:
    spacing = (0.7, 1.2, 2.0)
    filled, part = np.ones((5, 6, 7), dtype=np.bool_), box((5, 6, 7), (0, 0, 0), (4, 6, 5))
    nsd = surface_dice(part, filled, spacing=spacing, tolerance=tolerance)
    roomy = [np.pad(mask, ((2, 9), (4, 1), (3, 5))) for mask in (part, filled)]
    assert nsd == surface_dice(roomy[0], roomy[1], spacing=spacing, tolerance=tolerance)
    assert nsd == pytest.approx(monai_nsd(part, filled, spacing, tolerance), abs=2e-6)
    assert surface_dice(filled, filled, spacing=spacing, tolerance=0.0) == 1.0


def test_surface_dice_is_symmetric() -> None:
    one, two = blob((9, 12, 11), 3, 1.0, 0.4), blob((9, 12, 11), 4, 1.5, 0.2)
    there = surface_dice(one, two, spacing=(1.0, 0.7, 2.0), tolerance=1.0)
    back = surface_dice(two, one, spacing=(1.0, 0.7, 2.0), tolerance=1.0)
    assert there == pytest.approx(back, rel=1e-12)


# --- Dice, empty masks


@given(seed=st.integers(0, 10**6), shares=st.tuples(*[st.floats(0.0, 1.0)] * 2))
def test_dice_equals_counting_voxel_by_voxel(seed: int, shares: tuple[float, float]) -> None:
    rng = np.random.default_rng(seed)
    one, two = (rng.random((3, 4, 2)) < share for share in shares)
    in_one, in_two = ({tuple(index) for index in np.argwhere(mask).tolist()} for mask in (one, two))
    count = len(in_one) + len(in_two)
    assert dice(one, two) == (2 * len(in_one & in_two) / count if count else None)


def test_empty_masks_are_left_out_or_score_zero() -> None:
    empty, some = np.zeros((3, 3, 3), dtype=np.bool_), box((3, 3, 3), (1, 1, 1), (2, 3, 3))
    expected = {(0, 0): None, (0, 1): 0.0, (1, 0): 0.0, (1, 1): 1.0}
    for (p, r), score in expected.items():
        prediction, reference = (some if filled else empty for filled in (p, r))
        assert dice(prediction, reference) == score
        assert surface_dice(prediction, reference, spacing=(1, 1, 1), tolerance=100.0) == score


# --- cases and summaries


def label_maps() -> tuple[Labels, Labels]:
    prediction, reference = np.zeros((2, 8, 8, 8), dtype=np.uint8)
    prediction[1:4, 1:4, 1:4] = 1
    reference[2:5, 1:4, 1:4] = 1
    prediction[6, 6, 6] = 2
    reference[6, 2, 2] = 7  # nobody asks for 7
    return prediction, reference


def test_a_case_is_scored_label_by_label_with_each_label_its_tolerance() -> None:
    prediction, reference = label_maps()
    scores = score_case(prediction, reference, labels=(2, 3, 1), spacing=(2, 1, 1), tolerances=(9.0, 9.0, 1.5))
    expected = dense_nsd(prediction == 1, reference == 1, (2, 1, 1), 1.5)
    assert 0 < expected < 1
    assert scores.dice == {2: 0.0, 3: None, 1: pytest.approx(2 / 3)}
    assert scores.nsd == {2: 0.0, 3: None, 1: pytest.approx(expected, rel=1e-12)}
    wide = score_case(prediction, reference, labels=[1], spacing=(2, 1, 1), tolerances=[2.0])
    assert wide.as_dict() == {"1": {"dice": pytest.approx(2 / 3), "nsd": 1.0}}


def test_the_summary_averages_cases_then_labels_and_counts_what_it_leaves_out() -> None:
    cases = {
        "a": CaseScores({1: 0.5, 2: 1.0, 3: None}, {1: 0.25, 2: 0.5, 3: None}),
        "b": CaseScores({1: 1.0, 2: None, 3: None}, {1: 0.75, 2: None, 3: None}),
        "c": CaseScores({1: 0.0, 2: None, 3: None}, {1: 0.5, 2: None, 3: None}),
    }
    summary = summarise(cases)
    assert summary.as_dict() == {
        "cases": 3,
        "labels": {
            "1": {"dice": 0.5, "nsd": 0.5, "left_out": 0},
            "2": {"dice": 1.0, "nsd": 0.5, "left_out": 2},
            "3": {"dice": None, "nsd": None, "left_out": 3},
        },
        "mean": {"dice": 0.75, "nsd": 0.5},  # over labels 1 and 2; over all scores at once it would be 0.625
    }
    assert json.loads(json.dumps(summary.as_dict(), allow_nan=False)) == summary.as_dict()


def test_a_summary_in_which_no_label_has_a_score_has_no_mean() -> None:
    summary = summarise({"a": CaseScores({1: None}, {1: None})})
    assert (summary.mean_dice, summary.mean_nsd, summary.left_out) == (None, None, {1: 1})


def test_volume_is_voxels_times_their_size() -> None:
    affine = np.diag([-0.5, 2.0, 4.0, 1.0])
    turn = np.array([[0.8, -0.6, 0, 9], [0.6, 0.8, 0, -3], [0, 0, 1, 5], [0, 0, 0, 1]])
    grid = Grid((8, 8, 8), turn @ affine)
    labels, _ = label_maps()
    assert volume_ml(labels, 1, grid) == pytest.approx(27 * 4.0 / 1000)
    assert volume_ml(labels, 5, grid) == 0.0
    with pytest.raises(DatasetError, match="shape"):
        volume_ml(labels[:4], 1, grid)


# --- refusals


def refused(**changes: Any) -> DatasetError:
    prediction, reference = label_maps()
    arguments: dict[str, Any] = {"prediction": prediction, "reference": reference, "labels": [1], "tolerances": [1.0]}
    arguments |= {"spacing": (1.0, 1.0, 1.0)} | changes
    with pytest.raises(DatasetError) as caught:
        score_case(arguments.pop("prediction"), arguments.pop("reference"), **arguments)
    return caught.value


def test_maps_on_different_grids_are_refused_with_both_shapes() -> None:
    error = refused(reference=np.zeros((8, 8, 9), dtype=np.uint8))
    assert error.code == "case-invalid"
    assert "(8, 8, 8) and (8, 8, 9)" in error.message


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction": np.zeros((8, 8, 8), dtype=np.float32)},
        {"reference": np.zeros((1, 8, 8, 8), dtype=np.uint8)},
        {"spacing": (1.0, 0.0, 1.0)},
        {"spacing": (1.0, math.nan, 1.0)},
    ],
)
def test_what_is_no_case_is_refused(changes: dict[str, Any]) -> None:
    assert refused(**changes).code == "case-invalid"


@pytest.mark.parametrize("tolerances", [[], [1.0, 2.0], [-0.1], [math.nan], [math.inf]])
def test_tolerances_that_are_no_tolerances_are_refused(tolerances: list[float]) -> None:
    assert refused(tolerances=tolerances).code == "recipe-invalid"


def test_masks_that_are_not_boolean_or_do_not_match_are_refused() -> None:
    mask, labels = np.ones((2, 2, 2), dtype=np.bool_), np.ones((2, 2, 2), dtype=np.uint8)
    with pytest.raises(DatasetError, match="uint8"):
        dice(labels, mask)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match="uint8"):
        surface_dice(mask, labels, spacing=(1, 1, 1), tolerance=1.0)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match="one grid"):
        dice(mask, mask[:1])


def test_cases_scored_on_different_labels_or_no_cases_are_refused() -> None:
    one, other = CaseScores({1: 1.0}, {1: 1.0}), CaseScores({2: 1.0}, {2: 1.0})
    for cases in ({}, {"a": one, "b": other}):
        with pytest.raises(DatasetError) as caught:
            summarise(cases)
        assert caught.value.code == "dataset-invalid"
