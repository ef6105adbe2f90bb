"""Statistics taken piece by piece are those of the whole, to numpy's own digits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from dints_deploy.catalog.preparation import ZScore
from dints_deploy.runtime.intensity import Pieces, mean_and_std, normalise, percentiles, scaling

EXAMPLES = settings(max_examples=60, deadline=None)
VALUES = arrays(np.float32, st.integers(1, 60), elements=st.floats(-3e4, 3e4, width=32))


def in_pieces(values: NDArray[np.float32], count: int) -> Pieces:
    def pieces() -> Iterable[Any]:
        return iter(np.array_split(values, count))

    return pieces


@EXAMPLES
@given(VALUES, st.integers(1, 5), st.tuples(st.floats(0, 100), st.floats(0, 100)))
def test_percentiles_are_numpys_without_sorting_the_whole(
    values: NDArray[np.float32], count: int, shares: tuple[float, float]
) -> None:
    found = percentiles(in_pieces(values, count), shares)
    expected = np.percentile(values.astype(np.float64), shares)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shares", [(0.5, 99.5), (0, 100), (2, 98)])
def test_percentiles_of_a_scan_are_numpys_to_the_last_bit(shares: tuple[float, float]) -> None:
    values = np.random.default_rng(0).gamma(3, 200, 100_003).astype(np.float32) - 300
    found = percentiles(in_pieces(values, 4), shares)
    np.testing.assert_array_equal(found, np.percentile(values, shares).astype(np.float32))


@EXAMPLES
@given(VALUES, st.integers(1, 5))
def test_mean_and_deviation_are_numpys_in_double_precision(values: NDArray[np.float32], count: int) -> None:
    mean, std = mean_and_std(in_pieces(values, count)())
    np.testing.assert_allclose((mean, std), (values.mean(dtype=float), values.std(dtype=float)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("nonzero", [False, True])
def test_a_scan_in_pieces_is_normalised_as_in_one(nonzero: bool) -> None:
    values = np.random.default_rng(1).gamma(9, 40, (12, 10, 8)).astype(np.float32)
    values[:4] = 0
    scheme = ZScore(scheme="zscore", clip_percentiles=(0.5, 99.5), nonzero=nonzero)
    found = scaling(scheme, in_pieces(values, 5))(values)
    np.testing.assert_allclose(found, normalise(values, scheme), rtol=1e-6, atol=1e-6)
    assert not nonzero or (found[:4] == 0).all()
