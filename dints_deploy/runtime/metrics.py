"""How well a segmentation agrees with a reference: Dice, surface Dice (NSD), volume; per case and over cases.

A label that neither mask has is left out (None) and counted; a label that only one of them has scores 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dints_deploy.errors import DatasetError
from dints_deploy.imaging.volume import Grid
from dints_deploy.runtime.surfels import neighbour_codes, surfel_areas

Mask = NDArray[np.bool_]
"""(I, J, K), True inside."""

Labels = NDArray[np.integer[Any]]
"""(I, J, K), one label id per voxel."""

Score = float | None
"""Between 0 and 1; None where neither mask has the label."""

TIE: Final = 1e-6
"""Share of the tolerance by which a distance may exceed it and still count as equal.

A header's affine is single precision: voxels "1 mm" apart come out as 0.99999994 or 1.0000001 mm, and a score at a
tolerance of 1 mm must not turn on that.
"""


@dataclass(frozen=True)
class CaseScores:
    """The scores of one case.

    Attributes:
        dice: Dice by label.
        nsd: surface Dice by label, the same labels.
    """

    dice: Mapping[int, Score]
    nsd: Mapping[int, Score]

    def as_dict(self) -> dict[str, dict[str, Score]]:
        """Return `{label: {dice, nsd}}`, ready for JSON."""
        return {str(label): {"dice": dice, "nsd": self.nsd[label]} for label, dice in self.dice.items()}


@dataclass(frozen=True)
class Summary:
    """The scores of a set of cases.

    Attributes:
        cases: how many cases there are.
        dice: mean Dice over the cases by label; None where every case is left out.
        nsd: mean surface Dice over the cases by label.
        left_out: cases by label in which neither mask has it; they are in no mean.
        mean_dice: mean of `dice` over the labels that have one.
        mean_nsd: mean of `nsd` over the labels that have one.
    """

    cases: int
    dice: Mapping[int, Score]
    nsd: Mapping[int, Score]
    left_out: Mapping[int, int]
    mean_dice: Score
    mean_nsd: Score

    def as_dict(self) -> dict[str, Any]:
        """Return `{cases, labels: {label: {dice, nsd, left_out}}, mean: {dice, nsd}}`, ready for JSON."""
        labels = {
            str(label): {"dice": self.dice[label], "nsd": self.nsd[label], "left_out": self.left_out[label]}
            for label in self.dice
        }
        return {"cases": self.cases, "labels": labels, "mean": {"dice": self.mean_dice, "nsd": self.mean_nsd}}


def score_case(
    prediction: Labels,
    reference: Labels,
    *,
    labels: Sequence[int],
    spacing: tuple[float, float, float],
    tolerances: Sequence[float],
) -> CaseScores:
    """Score every label of a label map against the reference on the same grid.

    Args:
        prediction: label map (I, J, K).
        reference: label map (I, J, K).
        labels: the label ids to score; other ids in the maps count as background.
        spacing: distance of neighbouring voxels along i, j, k in mm.
        tolerances: the tolerance of each label's surface Dice in mm, in the order of `labels`.

    Raises:
        DatasetError: `case-invalid` when the maps are no label maps of one shape or the spacing is not positive;
            `recipe-invalid` when a tolerance is missing, negative or not finite.
    """
    _check_arrays(prediction, reference, kinds="iu", noun="integer label maps")
    if len(labels) != len(tolerances):
        found = f"{len(tolerances)} tolerances for {len(labels)} labels"
        raise DatasetError("recipe-invalid", f"expected one tolerance per label, found {found}: give each label one")
    dice_by_label: dict[int, Score] = {}
    nsd_by_label: dict[int, Score] = {}
    for label, tolerance in zip(labels, tolerances, strict=True):
        masks = prediction == label, reference == label
        dice_by_label[label] = dice(*masks)
        nsd_by_label[label] = surface_dice(*masks, spacing=spacing, tolerance=tolerance)
    return CaseScores(dice_by_label, nsd_by_label)


def summarise(cases: Mapping[str, CaseScores]) -> Summary:
    """Average the scores over the cases of each label, then over the labels.

    Args:
        cases: scores by case id, all of the same labels.

    Raises:
        DatasetError: `dataset-invalid` when there is no case, or the cases are scored on different labels.
    """
    if not cases:
        raise DatasetError("dataset-invalid", "expected at least one scored case, found none: choose cases to score")
    first, *others = cases.items()
    labels = list(first[1].dice)
    for name, scores in others:
        if set(scores.dice) != set(labels):
            found = f"{sorted(labels)} in {first[0]} and {sorted(scores.dice)} in {name}"
            raise DatasetError("dataset-invalid", f"expected the same labels in all cases, found {found}: score again")
    dice_by_label = {label: _mean([scores.dice[label] for scores in cases.values()]) for label in labels}
    nsd_by_label = {label: _mean([scores.nsd[label] for scores in cases.values()]) for label in labels}
    return Summary(
        cases=len(cases),
        dice=dice_by_label,
        nsd=nsd_by_label,
        left_out={label: sum(scores.dice[label] is None for scores in cases.values()) for label in labels},
        mean_dice=_mean(list(dice_by_label.values())),
        mean_nsd=_mean(list(nsd_by_label.values())),
    )


def dice(prediction: Mask, reference: Mask) -> Score:
    """Return 2 |P and R| / (|P| + |R|) of two masks of one shape; None when both are empty.

    Raises:
        DatasetError: `case-invalid` when the arrays are not boolean or of different shapes.
    """
    _check_arrays(prediction, reference, kinds="b", noun="boolean masks")
    voxels = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    return 2.0 * int(np.count_nonzero(prediction & reference)) / voxels if voxels else None


def surface_dice(prediction: Mask, reference: Mask, *, spacing: tuple[float, float, float], tolerance: float) -> Score:
    """Return the share of both surfaces' area that lies within a tolerance of the other surface (NSD).

    The surfaces are the surface elements of `runtime.surfels`; distances are between their corner points. The border
    of the image is surface where a mask touches it. None when both masks are empty, 0 when one is.
    Source: Nikolov et al. 2021, doi 10.2196/26151, and its code, DeepMind's surface-distance; distances come from a
    k-d tree over the surface's points: the same numbers as a distance transform's, without a field over the volume.

    Args:
        prediction: (I, J, K).
        reference: (I, J, K).
        spacing: distance of neighbouring voxels along i, j, k in mm.
        tolerance: largest distance that counts as agreement, in mm.

    Raises:
        DatasetError: `case-invalid` when the arrays are no masks of one shape or the spacing is not positive;
            `recipe-invalid` when the tolerance is negative or not finite.
    """
    _check_arrays(prediction, reference, kinds="b", noun="boolean masks")
    _check_millimetres(spacing, tolerance)
    if not prediction.any() or not reference.any():
        return 0.0 if prediction.any() or reference.any() else None
    box = _filled_box(prediction | reference)
    predicted = neighbour_codes(prediction[box])
    referred = neighbour_codes(reference[box])
    limit = tolerance * (1.0 + TIE)
    within = _within(predicted, referred, spacing=spacing, limit=limit)
    within += _within(referred, predicted, spacing=spacing, limit=limit)
    areas = surfel_areas(spacing)
    return float(within @ areas) / float((_histogram(predicted) + _histogram(referred)) @ areas)


def volume_ml(labels: Labels, label: int, grid: Grid) -> float:
    """Return the volume of a label in millilitres.

    Args:
        labels: label map (I, J, K).
        label: the label id.
        grid: the grid of the label map.

    Raises:
        DatasetError: `case-invalid` when the label map does not have the grid's shape.
    """
    if labels.shape != grid.shape:
        raise DatasetError("case-invalid", f"expected a label map of shape {grid.shape}, found {labels.shape}")
    return int(np.count_nonzero(labels == label)) * grid.voxel_ml


def _within(
    codes: NDArray[np.uint8], others: NDArray[np.uint8], *, spacing: tuple[float, float, float], limit: float
) -> NDArray[np.intp]:
    """Count by code (256,) the surfels of `codes` that are at most `limit` mm from one of `others`.

    Counts are integers, so that full agreement is 1.0 to the last bit and no score exceeds it.
    """
    from scipy.spatial import KDTree

    surface, other_surface = _is_surface(codes), _is_surface(others)
    shared = codes[surface & other_surface]  # (points,), at distance zero
    apart = surface & ~other_surface
    tree = KDTree(np.argwhere(other_surface) * spacing, balanced_tree=False)
    distances, _ = tree.query(np.argwhere(apart) * spacing, distance_upper_bound=limit)
    near = codes[apart][np.isfinite(distances)]  # what lies beyond the bound is reported as infinite
    return _histogram(shared) + _histogram(near)


def _histogram(codes: NDArray[np.uint8]) -> NDArray[np.intp]:
    return np.bincount(codes[_is_surface(codes)], minlength=256)


def _is_surface(codes: NDArray[np.uint8]) -> Mask:
    surface: Mask = (codes != 0) & (codes != 255)
    return surface


def _filled_box(mask: Mask) -> tuple[slice, slice, slice]:
    """Return the smallest box that holds a mask that is not empty."""
    i, j, k = (np.flatnonzero(mask.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1)))
    return slice(int(i[0]), int(i[-1]) + 1), slice(int(j[0]), int(j[-1]) + 1), slice(int(k[0]), int(k[-1]) + 1)


def _mean(scores: Sequence[Score]) -> Score:
    present = [score for score in scores if score is not None]
    return fmean(present) if present else None


def _check_arrays(prediction: NDArray[Any], reference: NDArray[Any], *, kinds: str, noun: str) -> None:
    for array in (prediction, reference):
        if array.dtype.kind not in kinds or array.ndim != 3:
            found = f"{array.dtype} of shape {array.shape}"
            raise DatasetError("case-invalid", f"expected two {noun} (I, J, K), found {found}: convert it first")
    if prediction.shape != reference.shape:
        found = f"{prediction.shape} and {reference.shape}"
        raise DatasetError("case-invalid", f"expected both {noun} on one grid, found shapes {found}: resample one")


def _check_millimetres(spacing: tuple[float, float, float], tolerance: float) -> None:
    if not all(math.isfinite(s) and s > 0 for s in spacing):
        raise DatasetError(
            "case-invalid", f"expected three positive spacings in mm, found {spacing}: repair the header"
        )
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise DatasetError("recipe-invalid", f"expected a tolerance of 0 mm or more, found {tolerance}: correct it")
