"""Paired bootstrap: how sure a mean difference between two networks is, given the cases they were measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

RESAMPLES: Final = 20_000
LEVEL: Final = 0.95

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean difference and its percentile interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Return `better`, `worse`, or `no difference` where the interval holds zero."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference"


def paired_interval(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> Interval:
    """Return the mean of ours - theirs with its 95 % interval over resampled cases.

    Args:
        ours: a score per case. theirs: the same cases, in the same order.
        seed: of the resampling.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"expected the same cases on both sides, found {len(ours)} and {len(theirs)}")
    differences: Floats = np.array(ours, dtype=np.float64) - np.array(theirs, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(len(differences), size=(RESAMPLES, len(differences)))
    means = differences[rows].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(differences.mean()), float(low), float(high))
