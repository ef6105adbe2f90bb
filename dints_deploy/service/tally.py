"""Count what the daemon does, for its metrics."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict


class Tally:
    """Counters since the start; used by every thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages: defaultdict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        self._refusals: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()

    def took(self, stage: str, seconds: float) -> None:
        """Add the time of a stage."""
        with self._lock:
            count, total = self._stages[stage]
            self._stages[stage] = (count + 1, total + seconds)

    def refused(self, code: str) -> None:
        """Count a study that was refused."""
        with self._lock:
            self._refusals[code] += 1

    def failed(self, code: str) -> None:
        """Count an attempt that failed."""
        with self._lock:
            self._failures[code] += 1

    def read(self) -> tuple[dict[str, tuple[int, float]], dict[str, int], dict[str, int]]:
        """Return the stages, refusals and failures."""
        with self._lock:
            return dict(self._stages), dict(self._refusals), dict(self._failures)
