"""The processor's pace in float32, measured by a product of two large matrices in numpy."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

MATRIX_EDGE = 4096
ROUNDS = 3


def matrix_seconds(edge: int) -> Callable[[], float]:
    """Return a function that times one float32 product of two square matrices."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(edge, edge)).astype(np.float32) for _ in range(2))

    def run() -> float:
        begin = time.perf_counter()
        _ = a @ b
        return time.perf_counter() - begin

    return run


def peak_gmac_per_second() -> float:
    """Return the best of a few products, in 1e9 multiplications per second."""
    product = matrix_seconds(MATRIX_EDGE)
    return MATRIX_EDGE**3 / min(product() for _ in range(ROUNDS)) / 1e9
