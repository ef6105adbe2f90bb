"""What an entry was not made for is refused by name: by its geometry, its modality, its channels and its voxels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dints_deploy.catalog.entry import Entry
from dints_deploy.errors import ScanRefused, UsageError
from dints_deploy.imaging.nifti import read_nifti
from dints_deploy.imaging.volume import Volume
from dints_deploy.runtime.accepts import accepting, check_accepts
from dints_deploy.runtime.voxels import LABEL_LIKE_VALUES, check_voxels
from tests.phantoms import ORIENTATIONS, Triple, affine, entry, noise

LIMITS: dict[str, Any] = {
    "modality": ["MR", "CT"],
    "extent_min": [10, 20, 30],
    "extent_max": [40, 50, 60],
    "spacing_min": [0.5, 0.5, 0.5],
    "spacing_max": [2, 3, 4],
    "shape_min": [10, 11, 12],
    "about": "a crop, not a whole head",
}
CROP = entry(name="crop", accepts=LIMITS)


def scan(shape: tuple[int, int, int], spacing: Triple, codes: str = "RAS") -> Volume:
    """Return a scan of these sizes left-right, posterior-anterior and inferior-superior, stored as `codes`."""
    order = ["RLAPSI".index(code) // 2 for code in codes]
    i, j, k = (shape[axis] for axis in order)
    x, y, z = (spacing[axis] for axis in order)
    return noise((i, j, k), affine(codes, (x, y, z), angles=(0.1, -0.1, 0.2)))


def code_of(volume: Volume, spec: Entry = CROP, **options: Any) -> str:
    try:
        check_accepts(volume, spec, **options)
    except ScanRefused as refusal:
        return refusal.code
    return "accepted"


CASES: list[tuple[tuple[int, int, int], Triple, str]] = [
    ((20, 30, 40), (1, 1, 1), "accepted"),
    ((9, 30, 40), (2, 1, 1), "scan-shape"),
    ((20, 10, 40), (1, 3, 1), "scan-shape"),
    ((20, 30, 11), (1, 1, 4), "scan-shape"),
    ((30, 30, 40), (0.4, 1, 1), "scan-spacing"),
    ((15, 30, 40), (2.1, 1, 1), "scan-spacing"),
    ((20, 12, 40), (1, 3.2, 1), "scan-spacing"),
    ((20, 30, 12), (1, 1, 4.1), "scan-spacing"),
    ((41, 30, 40), (1, 1, 1), "scan-extent"),
    ((20, 51, 40), (1, 1, 1), "scan-extent"),
    ((20, 30, 61), (1, 1, 1), "scan-extent"),
    ((12, 30, 40), (0.8, 1, 1), "scan-extent"),
    ((20, 19, 40), (1, 1, 1), "scan-extent"),
    ((20, 30, 29), (1, 1, 1), "scan-extent"),
    ((180, 220, 180), (1, 1, 1), "scan-extent"),  # a whole head
]


@pytest.mark.parametrize(("shape", "spacing", "code"), CASES)
def test_sizes_outside_the_limits_are_refused_along_the_patients_axes_in_any_orientation(
    shape: tuple[int, int, int], spacing: Triple, code: str
) -> None:
    orientations = ORIENTATIONS if np.prod(shape) < 1e5 else ORIENTATIONS[:1]
    assert {code_of(scan(shape, spacing, codes)) for codes in orientations} == {code}


def test_a_size_at_the_limit_is_accepted_with_the_rounding_of_headers() -> None:
    assert code_of(scan((20, 25, 40), (2.0009, 2.0009, 1))) == "accepted"  # 40.018 and 50.0225 mm
    assert code_of(scan((19, 30, 40), (2.003, 1, 1))) == "scan-spacing"
    assert code_of(scan((20, 25, 40), (1, 2.003, 1))) == "scan-extent"  # 50.075 mm


def test_the_refusal_names_axis_limits_what_was_found_and_what_the_scan_should_be() -> None:
    with pytest.raises(ScanRefused) as refusal:
        check_accepts(scan((20, 70, 40), (1, 1, 1)), CROP)
    assert refusal.value.message == (
        "expected 20 to 50 mm of extent posterior-anterior for crop (a crop, not a whole head), found 70: "
        "choose another scan or entry"
    )


def test_another_modality_is_refused_and_an_unknown_one_is_not() -> None:
    good = scan((20, 30, 40), (1, 1, 1))
    assert code_of(good, modality="PT") == "scan-modality"
    assert code_of(good, modality="CT") == "accepted"
    assert code_of(good, modality=None) == "accepted"


# --- the only entry that accepts ------------------------------------------------------------------------------------


def test_the_only_entry_that_accepts_a_scan_is_chosen() -> None:
    head = entry(name="head", accepts=LIMITS | {"extent_min": [100] * 3, "extent_max": [300] * 3})
    two = entry(name="two", channels=[*channels("a", "b")], accepts=LIMITS)
    assert accepting(scan((20, 30, 40), (1, 1, 1)), [head, CROP, two]).name == "crop"
    assert accepting(scan((150, 150, 150), (1, 1, 1)), [head, CROP, two]).name == "head"
    pair = noise((20, 30, 40), affine(), channels=2)
    assert accepting(pair, [head, CROP, two]).name == "two"


def channels(*names: str) -> list[dict[str, Any]]:
    return [{"name": name, "modality": "MR", "intensity": {"scheme": "identity"}} for name in names]


def test_several_candidates_are_a_usage_error_and_none_is_a_refusal_that_lists_the_reasons() -> None:
    twin = entry(name="twin", accepts=LIMITS)
    good, bad = scan((20, 30, 40), (1, 1, 1)), scan((41, 30, 40), (1, 1, 1))
    with pytest.raises(UsageError, match="found crop, twin: give --model") as several:
        accepting(good, [CROP, twin])
    with pytest.raises(ScanRefused, match=r"found none \(crop: expected .*; twin: expected .*found 41") as none:
        accepting(bad, [CROP, twin])
    with pytest.raises(UsageError, match="the zoo is empty") as empty:
        accepting(good, [])
    assert {e.value.code for e in (several, empty)} == {"entry-ambiguous"}
    assert none.value.code == "scan-no-entry"


def test_with_one_entry_its_own_refusal_is_told() -> None:
    with pytest.raises(ScanRefused) as refusal:
        accepting(scan((41, 30, 40), (1, 1, 1)), [CROP])
    assert refusal.value.code == "scan-extent"
    with pytest.raises(ScanRefused) as refusal:
        accepting(noise((20, 30, 40), affine(), channels=3), [CROP])
    assert refusal.value.code == "scan-channels"


# --- voxels ---------------------------------------------------------------------------------------------------------


def voxels_code(data: NDArray[Any]) -> str:
    try:
        check_voxels(Volume(data if data.ndim == 4 else data[np.newaxis], affine()))
    except ScanRefused as refusal:
        return refusal.code
    return "accepted"


GOOD = noise((12, 12, 12), affine()).data


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_voxel_that_is_not_finite_is_refused_with_its_count(value: float) -> None:
    data = np.concatenate([GOOD, GOOD])
    data[1, 3, 4, 5] = value
    assert voxels_code(data) == "scan-nonfinite"
    with pytest.raises(ScanRefused, match="found 1 NaN or infinite"):
        check_voxels(Volume(data, affine()))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_one_channel_that_is_constant_is_refused_by_its_number(dtype: type[np.generic]) -> None:
    data = np.concatenate([GOOD, np.full_like(GOOD, 7)]).astype(dtype)
    with pytest.raises(ScanRefused, match="channel 1") as refusal:
        check_voxels(Volume(data, affine()))
    assert refusal.value.code == "scan-constant"


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float32, np.float64])
@pytest.mark.parametrize(
    ("values", "code"),
    [
        (2, "scan-looks-like-labels"),
        (LABEL_LIKE_VALUES, "scan-looks-like-labels"),
        (LABEL_LIKE_VALUES + 1, "accepted"),
    ],
)
def test_few_whole_numbers_are_a_label_map_whatever_their_type(values: int, code: str, dtype: type[np.generic]) -> None:
    data = np.random.default_rng(0).integers(0, values, (20, 20, 20)).astype(dtype)
    assert len(np.unique(data)) == values
    assert voxels_code(data) == code


def test_masks_of_true_and_false_are_labels() -> None:
    assert voxels_code(GOOD > 100) == "scan-looks-like-labels"


def test_few_fractions_are_not_labels() -> None:
    assert voxels_code(np.random.default_rng(0).integers(0, 5, (20, 20, 20)) / 8) == "accepted"


def test_the_values_that_a_sample_misses_count_too() -> None:
    """The quick look takes every n-th voxel: here those are all zero, or all whole."""
    data = np.zeros(64**3, np.float32)
    data[1::2] = np.arange(64**3 // 2) % 300
    assert voxels_code(data.reshape(64, 64, 64)) == "accepted"
    data[1::2] = np.arange(64**3 // 2) % 4 / 8
    assert voxels_code(data.reshape(64, 64, 64)) == "accepted"
    data[1::2] = np.arange(64**3 // 2) % 4
    assert voxels_code(data.reshape(64, 64, 64)) == "scan-looks-like-labels"


def test_every_real_scan_is_far_from_looking_like_labels_and_every_real_label_map_does(data: Path) -> None:
    images = sorted(data.glob("*/imagesTr/*.nii.gz"))
    labels = sorted(data.glob("*/labelsTr/*.nii.gz"))
    assert len(images) == len(labels) >= 6
    for path in images:
        image = read_nifti(path).data
        assert voxels_code(image) == "accepted"
        assert len(np.unique(image)) > 10 * LABEL_LIKE_VALUES
    for path in labels:
        assert voxels_code(read_nifti(path).data) == "scan-looks-like-labels"
