"""What happens after a failure: a pure decision from what failed and how often; no clock, no database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

JOB_CEILING_S: Final = 3600.0
INTERRUPTION_CEILING_S: Final = 60.0
DELIVERY_CEILING_S: Final = 600.0
"""Longest time between two attempts. Deliveries have no other limit: a PACS may be away for a weekend."""

INTERRUPTIONS_FREE: Final = 2
"""Ends of the daemon that put nothing on the job that was running; after more, it may be the cause."""

INTERRUPTIONS_PER_ATTEMPT: Final = 4
"""An end of the daemon speaks less clearly against the job that was running than a failure of its own."""

ANOTHER_TIME: Final = frozenset(
    {
        "engine-failed",
        "engine-memory",
        "memory-limit",
        "worker-crashed",
        "worker-hung",
        "worker-memory",
        "worker-failed",
    }
)
"""Reason codes of jobs that another attempt can help. All others would come again: quarantine at once."""

NOT_THE_JOBS: Final = frozenset({"disk-full", "output-unwritable", "worker-start"})
"""Reason codes that say nothing about the job: it is tried again until the machine is put in order."""


@dataclass(frozen=True)
class Policy:
    """How often, and how soon.

    Attributes:
        attempts: failures before a job goes to quarantine.
        first_s: time to the second attempt; it doubles from then on.
    """

    attempts: int
    first_s: float


@dataclass(frozen=True)
class Decision:
    """What to do: `again` after `wait_s`, or `quarantine`."""

    act: Literal["again", "quarantine"]
    wait_s: float = 0.0


def after_failure(code: str, failures: int, policy: Policy) -> Decision:
    """Decide about a job that failed for the `failures`-th time, now with `code`."""
    if code in NOT_THE_JOBS:
        return Decision("again", _backoff(failures, policy.first_s, DELIVERY_CEILING_S))
    if code not in ANOTHER_TIME or failures >= policy.attempts:
        return Decision("quarantine")
    return Decision("again", _backoff(failures, policy.first_s, JOB_CEILING_S))


def after_interruption(interruptions: int, policy: Policy) -> Decision:
    """Decide about a job that was running each time the daemon ended, `interruptions` times now."""
    if interruptions >= policy.attempts * INTERRUPTIONS_PER_ATTEMPT:
        return Decision("quarantine")
    if interruptions <= INTERRUPTIONS_FREE:
        return Decision("again")
    return Decision("again", _backoff(interruptions - INTERRUPTIONS_FREE, policy.first_s, INTERRUPTION_CEILING_S))


def after_refusal(failures: int, policy: Policy, *, retryable: bool) -> Decision:
    """Decide about a delivery that failed for the `failures`-th time."""
    if not retryable:
        return Decision("quarantine")
    return Decision("again", _backoff(failures, policy.first_s, DELIVERY_CEILING_S))


def _backoff(failures: int, first_s: float, ceiling_s: float) -> float:
    """Return the time to wait: doubling, up to the ceiling."""
    return min(ceiling_s, first_s * 2.0 ** min(failures - 1, 32))
