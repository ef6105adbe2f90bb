"""Patches are a pure function of seed and index, and a label stays where its image goes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import kstest
from torch import Tensor
from torch.nn import functional

from dints_deploy.catalog.entry import AXES, Axis
from dints_deploy.catalog.preparation import Channel
from dints_search.augment import Augmenter
from dints_search.dataset import Patches, TrainingCase
from dints_search.recipe import Augmentation
from dints_search.retrain import batches
from dints_search.warp import sample, sampling_grids, warp_labels

OFF: dict[str, Any] = {
    "rotation": 0, "scaling": 0, "translation": 0, "elastic": 0, "noise": 0, "blur": 0, "brightness": 0, "contrast": 0,
    "low_resolution": 0, "gamma_of_negative": 0, "gamma": 0, "mirror": [],
}  # fmt: skip
NOTHING = Augmentation(**OFF)
THRESHOLD = 0.5
WINDOW = (16, 16, 16)


def only(**on: Any) -> Augmentation:
    """Return settings with nothing on but what is named."""
    return Augmentation(**(OFF | on))


def phantom(seed: int = 0, size: tuple[int, ...] = (40, 38, 42)) -> tuple[Tensor, Tensor]:
    """Return a smooth image (1, I, J, K) that fades to 0 at its border, and where it is above THRESHOLD."""
    image = gaussian_filter(np.random.default_rng(seed).normal(size=size), 4.0)
    image /= image.std()
    for axis, n in enumerate(size):
        fade = np.clip((np.minimum(np.arange(n), n - 1 - np.arange(n)) - 2) / 6, 0, 1)
        image *= np.expand_dims(fade**2 * (3 - 2 * fade), [other for other in range(3) if other != axis])
    label = (image > THRESHOLD).astype(np.uint8)
    return torch.from_numpy(image.astype(np.float32)[np.newaxis]), torch.from_numpy(label[np.newaxis])


def cases(count: int = 3, size: tuple[int, ...] = (20, 19, 22)) -> list[TrainingCase]:
    """Return cases whose image tells the voxel: its case, and its place in the case."""
    places = np.arange(np.prod(size), dtype=np.float32).reshape(size)
    label = np.zeros(size, np.uint8)
    label[14, 9, 12] = 1
    return [TrainingCase(f"case{n}", (places + n * 100_000)[np.newaxis], label) for n in range(count)]


def patches(settings: Augmentation = NOTHING, *, seed: int = 5, foreground: float = 0.5, length: int = 12) -> Patches:
    return Patches(
        cases(), window=WINDOW, foreground=foreground, augmenter=Augmenter(settings), seed=seed, length=length
    )


Pair = tuple[Tensor, Tensor]

EVERYTHING = Augmentation(rotation=0.5, scaling=0.5, translation=0.5, elastic=0.5, noise=0.5, blur=0.5)


def same(a: Pair, b: Pair) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def change(settings: Augmentation, pair: Pair, seed: int) -> Pair:
    """Return one image (C, I, J, K) and its label, augmented as a batch of one."""
    image, label = Augmenter(settings)(pair[0][None], pair[1][None], seeds=[seed])
    return image[0], label[0]


def item(source: Patches, index: int) -> Pair:
    """Return an augmented patch."""
    image, label, seed = source[index]
    return change(source.augmenter.settings, (image, label), seed)


def test_a_patch_depends_on_its_seed_and_index_alone() -> None:
    expected = [item(patches(EVERYTHING), n) for n in range(12)]
    again = patches(EVERYTHING)
    torch.manual_seed(1)
    np.random.seed(1)
    backwards = [item(again, n) for n in reversed(range(12))][::-1]
    assert all(same(a, b) for a, b in zip(expected, backwards, strict=True))
    assert not any(same(expected[a], expected[b]) for a in range(12) for b in range(a))
    other = patches(EVERYTHING, seed=6)
    assert not any(same(expected[n], item(other, n)) for n in range(12))


def test_drawing_a_patch_leaves_the_global_random_state_alone() -> None:
    state, numpy_state = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"]
    assert item(patches(Augmentation(elastic=1.0, noise=1.0)), 0)[0].shape == (1, *WINDOW)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], numpy_state)


def test_batches_are_the_same_for_any_size_any_number_of_workers_and_any_place_to_start() -> None:
    source = patches(EVERYTHING)
    items = [item(source, n) for n in range(12)]
    for size, workers, first in [(2, 0, 0), (2, 1, 0), (2, 0, 4), (2, 1, 4), (4, 1, 1), (3, 0, 0)]:
        found = list(batches(source, size, first=first, workers=workers))
        assert [len(image) for image, _ in found] == [size] * (12 // size - first)
        pairs = [pair for image, label in found for pair in zip(image, label, strict=True)]
        assert all(same(a, b) for a, b in zip(pairs, items[first * size :], strict=True))


def test_every_epoch_visits_every_case_once_in_an_order_of_its_own() -> None:
    source = patches(length=60)
    visited = [int(source[n][0].min()) // 100_000 for n in range(60)]
    epochs = [tuple(visited[n : n + 3]) for n in range(0, 60, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs)
    assert len(set(epochs)) > 3


def test_without_augmentation_a_patch_is_cut_from_the_scan_and_its_label_with_it() -> None:
    whole = cases()[0]
    starts = set()
    for index in range(30):
        image, label, _ = patches(length=30)[index]
        assert (image.dtype, label.dtype) == (torch.float32, torch.int64)
        start = np.unravel_index(int(image[0, 0, 0, 0]) % 100_000, (20, 19, 22))
        box = tuple(slice(a, a + w) for a, w in zip(start, WINDOW, strict=True))
        assert np.array_equal(image[0] % 100_000, whole.image[0][box])
        assert np.array_equal(label[0], whole.label[box])
        starts.add(start)
    assert len(starts) > 5


def test_a_foreground_patch_has_a_labelled_voxel_in_its_middle_as_far_as_the_scan_goes() -> None:
    for index in range(12):
        _, label, _ = patches(foreground=1.0)[index]
        # the voxel (14, 9, 12) would start a patch at (6, 1, 4); a scan of 20 x 19 x 22 has room for at most (4, 3, 6)
        assert label[0, 10, 8, 8] == 1
    assert {int(patches(foreground=0.0, length=40)[n][1].argmax()) for n in range(40)} != {0}
    assert len({int(patches(foreground=0.0, length=40)[n][1].argmax()) for n in range(40)}) > 10


def test_with_everything_off_nothing_changes() -> None:
    image, label = phantom()
    changed = change(NOTHING, (image, label), 1)
    assert torch.equal(changed[0], image)
    assert torch.equal(changed[1], label)


SPATIAL = {
    "rotation": only(rotation=1, rotation_range=(0.6, 0.6, 0.6)),
    "scaling": only(scaling=1),
    "translation": only(translation=1, translation_range=(5, 4, 3)),
    "elastic": only(elastic=1),
    "all": only(rotation=1, scaling=1, translation=1, elastic=1, mirror=["i", "j", "k"]),
}


@pytest.mark.parametrize("name", SPATIAL)
def test_a_label_stays_on_its_image(name: str) -> None:
    wrong, left_behind = [], []
    for seed in range(6):
        image, label = phantom(seed)
        moved, moved_label = change(SPATIAL[name], (image, label), seed)
        assert moved.shape == image.shape
        assert int(moved_label.max()) == 1
        # near the threshold a voxel may fall to either side: both are interpolated
        clear = (moved - THRESHOLD).abs() > 0.3
        astray = (moved_label > 0) != (moved > THRESHOLD)
        assert clear.float().mean() > 0.6
        assert astray[clear].float().mean() < 1e-3
        wrong.append(float(astray.float().mean()))
        left_behind.append(float(((label > 0) != (moved > THRESHOLD)).float().mean()))
    assert np.mean(wrong) < 0.03
    assert np.mean(wrong) < 0.7 * np.mean(left_behind)  # it moved: a label that stays behind would be seen


def test_only_the_named_axes_are_mirrored_and_each_of_them_sometimes() -> None:
    image, label = phantom()
    allowed = [(), (1,), (3,), (1, 3)]
    found = set()
    for seed in range(24):
        moved, moved_label = change(only(mirror=["i", "k"]), (image, label), seed)
        [flips] = [flips for flips in allowed if torch.equal(moved, torch.flip(image, flips))]
        assert torch.equal(moved_label, torch.flip(label, flips))
        found.add(flips)
    assert found == set(allowed)


INTENSITY = {
    "noise": only(noise=1),
    "blur": only(blur=1),
    "low resolution": only(low_resolution=1),
    "brightness": only(brightness=1),
    "contrast": only(contrast=1),
    "gamma of negative": only(gamma_of_negative=1),
    "gamma": only(gamma=1),
}


@pytest.mark.parametrize("name", INTENSITY)
def test_a_change_of_intensity_changes_the_image_and_never_the_label(name: str) -> None:
    image, label = phantom()
    before = image.clone()
    changed, same_label = change(INTENSITY[name], (image, label), 3)
    assert torch.equal(same_label, label)
    assert changed.shape == image.shape
    assert changed.dtype == torch.float32
    assert torch.isfinite(changed).all()
    assert 1e-3 < (changed - image).abs().mean() < 1.0
    correlation = np.corrcoef(changed.flatten(), image.flatten())[0, 1]
    assert correlation > 0.9  # the same scan, seen worse
    assert torch.equal(image, before)


WIDE = (0.3, 2.0)
"""A range that no other setting's default covers, and that its inverse does not fit."""


def two_channels() -> Tensor:
    """Return an image (2, I, J, K) whose channels have a mean and a scale of their own."""
    (one, _), (two, _) = (phantom(seed, (20, 18, 22)) for seed in (0, 1))
    return torch.cat([40 * one + 100, two - 3])


def white(*size: int) -> Tensor:
    """Return an image without any two neighbours alike."""
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def before_and_after(settings: Augmentation, image: Tensor, seeds: int = 12) -> list[Pair]:
    """Return each channel of an image (C, I, J, K) as it was and as each seed changes it, in float64."""
    label = torch.zeros(1, *image.shape[1:]).long()
    changed = [change(settings, (image, label), seed)[0].double() for seed in range(seeds)]
    return [pair for each in changed for pair in zip(image.double(), each, strict=True)]


def assert_drawn(found: list[float], low: float, high: float) -> None:
    """Assert that numbers lie within a range, in its lower and its upper third too, no two of them alike."""
    third = (high - low) / 3
    assert low <= min(found) < low + third
    assert high - third < max(found) <= high
    assert len({round(number, 5) for number in found}) == len(found)


def assert_close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert float((a - b).abs().max()) < tolerance


def test_brightness_multiplies_each_channel_by_a_number_drawn_from_its_range() -> None:
    factors = []
    for before, after in before_and_after(only(brightness=1, brightness_range=WIDE), two_channels()):
        factors.append(float((after * before).sum() / before.square().sum()))
        assert_close(after, before * factors[-1], 1e-4)
    assert_drawn(factors, *WIDE)


def test_contrast_stretches_each_channel_about_its_mean_and_never_beyond_its_extremes() -> None:
    factors = []
    for before, after in before_and_after(only(contrast=1, contrast_range=WIDE), two_channels()):
        low, high = before.min(), before.max()
        assert low <= after.min()
        assert after.max() <= high
        free = (after > low) & (after < high)
        was, now = (values - before.mean() for values in (before, after))
        factors.append(float((now * was)[free].sum() / was[free].square().sum()))
        assert_close(after, (was * factors[-1] + before.mean()).clamp(low, high), 1e-4)
    assert_drawn(factors, *WIDE)


@pytest.mark.parametrize(("name", "sign"), [("gamma", 1), ("gamma_of_negative", -1)])
def test_gamma_raises_a_channel_or_its_negative_to_a_power_and_keeps_its_mean_and_deviation(
    name: str, sign: int
) -> None:
    powers = []
    for before, after in before_and_after(only(**{name: 1}, gamma_range=WIDE), two_channels()):
        assert float(after.mean()) == pytest.approx(float(before.mean()), abs=1e-4)
        assert float(after.std()) == pytest.approx(float(before.std()), abs=1e-4)
        # a range of powers has 1 inside, so none can be asked for: it is read off the voxel in the middle of the range
        was, now = ((v - v.min()) / (v.max() - v.min()) for v in (before * sign, after * sign))
        middle = (was - 0.5).abs().argmin()
        powers.append(float(now.flatten()[middle].log() / was.flatten()[middle].log()))
        assert_close(now, was ** powers[-1], 1e-5)
    assert_drawn(powers, *WIDE)


@pytest.mark.parametrize(("sigma", "radius"), [(0.3, 1), (0.4, 1), (0.7, 2), (1.0, 3), (1.7, 5)])
def test_blur_is_a_gaussian_cut_off_at_three_sigma_and_repeats_what_lies_at_the_border(
    sigma: float, radius: int
) -> None:
    for before, after in before_and_after(only(blur=1, blur_sigma=(sigma, sigma)), white(2, 14, 11, 9), 1):
        expected = gaussian_filter(before.numpy(), sigma, mode="nearest", radius=radius)
        assert_close(after, torch.from_numpy(expected), 1e-5)


def test_blur_draws_a_sigma_for_each_channel() -> None:
    image = white(1, 16, 16, 16).expand(2, -1, -1, -1)
    most, least = (float(gaussian_filter(image[0], sigma, mode="nearest").std()) for sigma in (0.5, 1.5))
    pairs = before_and_after(only(blur=1, blur_sigma=(0.5, 1.5)), image)
    assert_drawn([float(after.std()) for _, after in pairs], least, most)


def test_noise_is_normal_around_zero_with_a_deviation_drawn_up_to_the_largest() -> None:
    image = torch.tensor([5.0, -1.0]).view(2, 1, 1, 1).expand(-1, 32, 32, 32)
    deviations = []
    for seed in range(12):
        changed, _ = change(only(noise=1, noise_std=0.3), (image, torch.zeros(1, 32, 32, 32).long()), seed)
        noise = (changed - image).double().numpy()
        deviations.append(float(np.sqrt((noise**2).mean())))
        standard = noise / deviations[-1]
        assert kstest(standard.ravel(), "norm").pvalue > 1e-3
        neighbours = (standard[0] * standard[1], standard[:, 1:] * standard[:, :-1])
        assert all(abs(product.mean()) < 0.03 for product in neighbours)  # no voxel tells another's noise
    assert_drawn(deviations, 0.0, 0.3)


@pytest.mark.parametrize(("zoom", "small"), [(0.5, (12, 10, 8)), (0.7, (17, 14, 12)), (1.0, (24, 20, 17))])
def test_a_low_resolution_keeps_the_nearest_voxels_and_joins_them_linearly(zoom: float, small: tuple[int, ...]) -> None:
    image = white(2, 24, 20, 17)
    kept = functional.interpolate(image[None].double(), small, mode="nearest-exact")
    expected = functional.interpolate(kept, image.shape[1:], mode="trilinear")[0]
    pairs = before_and_after(only(low_resolution=1, low_resolution_range=(zoom, zoom)), image, 1)
    assert_close(torch.stack([after for _, after in pairs]), expected, 1e-5)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_an_edge_at_half_the_resolution_is_a_ramp(axis: int) -> None:
    line = torch.tensor([0.0] * 8 + [1.0] * 8)
    image = line.expand(1, 16, 16, 16).movedim(-1, axis)
    [(_, after)] = before_and_after(only(low_resolution=1, low_resolution_range=(0.5, 0.5)), image, 1)
    ramp = torch.tensor([0.0] * 7 + [0.25, 0.75] + [1.0] * 7)  # strictly between its neighbours
    assert_close(after.movedim(axis - 1, -1), ramp.expand(16, 16, 16), 1e-6)


@pytest.mark.parametrize("flat", AXES)
def test_slices_along_a_flat_axis_stay_as_sharp_as_they_were(flat: Axis) -> None:
    settings = only(low_resolution=1, low_resolution_range=(0.5, 0.5), flat=flat)
    for axis, name in enumerate(AXES):
        image = white(16).expand(1, 16, 16, 16).movedim(-1, axis + 1)  # changes along one axis
        [(before, after)] = before_and_after(settings, image, 1)
        assert bool((after - before).abs().max() < 1e-6) == (name == flat)


def test_a_shift_moves_whole_voxels() -> None:
    image, label = phantom()
    moved, moved_label = change(only(translation=1, translation_range=(6, 6, 6)), (image, label), 4)
    kept = [float(v) for v in torch.unique(moved) if v != 0]
    assert set(kept) <= {float(v) for v in torch.unique(image)}
    assert not torch.equal(moved, image)
    assert torch.equal(moved_label > 0, moved > THRESHOLD)


def test_a_label_is_interpolated_and_not_taken_from_the_nearest_voxel() -> None:
    image, _ = phantom(2, (24, 24, 24))
    label = ((image > THRESHOLD).long() + (image < -THRESHOLD).long() * 2)  # fmt: skip
    labels = torch.stack([label, label.flip(1), (label == 2).long(), torch.zeros_like(label)])
    rngs = [np.random.default_rng(seed) for seed in range(4)]
    chosen, grids = sampling_grids((24, 24, 24), only(rotation=1, scaling=1), rngs, torch.device("cpu"))
    assert chosen == [0, 1, 2, 3]
    shares = torch.cat([sample((labels == value).float(), grids) for value in range(3)], dim=1)
    shares[:, 0] += 1 - shares.sum(1)  # around the scan is background
    assert (warp_labels(labels, grids)[:, 0] == shares.argmax(1)).float().mean() > 0.9999


def test_a_batch_is_changed_as_its_items_are_and_left_as_it_was() -> None:
    everything = Augmentation(**dict.fromkeys((name for name, on in OFF.items() if on == 0), 0.5), mirror=["i", "k"])
    pairs = [phantom(seed, (20, 18, 22)) for seed in range(12)]
    image, label = (torch.stack(part) for part in zip(*pairs, strict=True))
    label = label.long()
    before = image.clone(), label.clone()
    together = Augmenter(everything)(image, label, seeds=range(12))
    alone = [change(everything, (image[n], label[n]), n) for n in range(12)]
    assert torch.equal(together[0], torch.stack([pair[0] for pair in alone]))
    assert torch.equal(together[1], torch.stack([pair[1] for pair in alone]))
    assert same((image, label), before)


def test_what_moves_into_a_patch_is_what_lies_around_a_scan() -> None:
    channels = [Channel(name=f, modality="CT", intensity={"scheme": "identity"}, fill=f) for f in ("zero", "minimum")]
    image = torch.full((1, 2, 16, 16, 16), 5.0)
    image[:, :, 8, 8, 8] = -3.0
    settings = only(scaling=1, scaling_range=(0.5, 1.0), translation=1, translation_range=(8, 8, 8))
    moved, _ = Augmenter(settings, channels)(image, torch.zeros(1, 1, 16, 16, 16).long(), seeds=[8])
    corners = [float(moved[0, c, i, j, k]) for c in range(2) for i in (0, -1) for j in (0, -1) for k in (0, -1)]
    assert 0.0 in corners[:8]
    assert -3.0 in corners[8:]
    assert not {0.0} & set(corners[8:])
