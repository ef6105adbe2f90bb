"""How the daemon is at one moment, for health and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dints_deploy.service.intake import DurableIntake
from dints_deploy.service.model import Snapshot
from dints_deploy.service.store import Store
from dints_deploy.service.tally import Tally


def take_snapshot(
    store: Store, intake: DurableIntake, tally: Tally, *, problems: Sequence[str], workers: Mapping[str, str]
) -> Snapshot:
    """Return how the daemon is.

    Args:
        problems: of its parts; a full disk is added.
        workers: device -> the job it does, or nothing.
    """
    oldest = store.row("oldest_queued")
    queued_s = None if oldest is None else oldest[0]
    stages, refusals, failures = tally.read()
    outcomes, taken_bytes = intake.counts()
    full = intake.full()
    deliveries = {(row["destination"], row["state"]): row["number"] for row in store.rows("all_delivery_states")}
    return Snapshot(
        problems=(*problems, *([f"intake stopped: {full}"] if full else [])),
        studies={row["state"]: row["number"] for row in store.rows("study_states")},
        jobs={row["state"]: row["number"] for row in store.rows("job_states")},
        deliveries=deliveries,
        oldest_queued_s=0.0 if queued_s is None else max(0.0, store.clock.now() - queued_s),
        intake=outcomes,
        intake_bytes=taken_bytes,
        refusals=refusals,
        failures=failures,
        stages=stages,
        free_bytes=intake.free_bytes(),
        workers=workers,
    )
