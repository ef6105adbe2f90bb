"""The states of studies, jobs and deliveries, and every transition that is allowed, as tables.

    study      receiving <-> complete
    job        queued <-> running -> delivering -> done | refused
    delivery   pending -> sent | failed | cancelled

A job may be superseded at any time, when its study grows; quarantine is left only by an operator's retry. The database
checks every change of state against these tables by triggers, so that no program can make another one.
"""

from __future__ import annotations

from typing import Final

STUDY_STATES: Final[dict[str, str]] = {
    "receiving": "something arrived since it was last judged complete",
    "complete": "its current revision is sealed; jobs exist for its routes",
}

JOB_STATES: Final[dict[str, str]] = {
    "queued": "waits for a worker, or for its next attempt",
    "running": "a worker holds its lease",
    "delivering": "its files are durable and on their way to the destinations",
    "done": "every destination has the result",
    "refused": "the scan was refused; the refusal was delivered where the route asks for it",
    "quarantined": "it waits for an operator, with a reason code",
    "superseded": "its study has a newer revision",
}

DELIVERY_STATES: Final[dict[str, str]] = {
    "pending": "not yet taken by the destination",
    "sent": "the destination has it",
    "failed": "no later attempt can help: it waits for an operator",
    "cancelled": "its job was superseded or quarantined before it was sent",
}

STUDY_TRANSITIONS: Final[frozenset[tuple[str, str]]] = frozenset({("receiving", "complete"), ("complete", "receiving")})

JOB_TRANSITIONS: Final[frozenset[tuple[str, str]]] = frozenset(
    {
        ("queued", "running"),  # claimed
        ("running", "queued"),  # failed for now, interrupted, released
        ("running", "delivering"),  # files durable
        ("running", "refused"),  # nothing to deliver
        ("running", "quarantined"),
        ("delivering", "done"),
        ("delivering", "refused"),  # the refusal is delivered
        ("delivering", "quarantined"),  # a delivery failed for good
        ("queued", "quarantined"),  # by an operator
        ("quarantined", "queued"),  # by an operator: run again
        ("quarantined", "delivering"),  # by an operator: deliver again
        ("refused", "queued"),  # by an operator
        ("queued", "superseded"),
        ("running", "superseded"),
        ("delivering", "superseded"),
        ("done", "superseded"),
        ("refused", "superseded"),
        ("quarantined", "superseded"),
    }
)

DELIVERY_TRANSITIONS: Final[frozenset[tuple[str, str]]] = frozenset(
    {
        ("pending", "sent"),
        ("pending", "failed"),
        ("pending", "cancelled"),
        ("failed", "pending"),  # by an operator
        ("failed", "cancelled"),
        ("cancelled", "pending"),  # by an operator
        ("cancelled", "sent"),  # it was on its way
        ("sent", "pending"),  # by an operator: the job runs again
    }
)

TABLES: Final = {
    "study": (STUDY_STATES, STUDY_TRANSITIONS),
    "job": (JOB_STATES, JOB_TRANSITIONS),
    "delivery": (DELIVERY_STATES, DELIVERY_TRANSITIONS),
}

FINAL: Final = frozenset({"done", "refused", "superseded"})
"""Job states that nothing follows by itself and nobody needs to look at."""


def trigger(table: str) -> str:
    """Return the SQL of a trigger that refuses every transition that is not in the table."""
    _, transitions = TABLES[table]
    allowed = " OR ".join(f"(OLD.state = '{a}' AND NEW.state = '{b}')" for a, b in sorted(transitions))
    return f"""CREATE TEMP TRIGGER {table}_transition BEFORE UPDATE OF state ON main.{table}
WHEN NEW.state <> OLD.state AND NOT ({allowed})
BEGIN SELECT RAISE(ABORT, '{table}: transition is not allowed'); END"""
