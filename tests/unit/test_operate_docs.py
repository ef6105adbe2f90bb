"""The runbook has every reason code, metric and state with the code's own words, and something to do about it."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from dints_deploy.errors import REASONS
from dints_deploy.service.health import metrics
from dints_deploy.service.model import Snapshot
from dints_deploy.service.states import DELIVERY_STATES, JOB_STATES

PAGE = (Path(__file__).parents[2] / "docs" / "operate.md").read_text(encoding="utf-8")


def rows(heading: str) -> dict[str, list[str]]:
    """Return the rows of the table below a heading or header line: first cell -> the other cells."""
    below = PAGE.split(heading, 1)[1].split("\n\n#", 1)[0] + "\n"
    table = re.search(r"(?:^\|.*\n)+", below[below.index("|---") :], re.MULTILINE)
    assert table is not None
    cells = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in table[0].splitlines()[1:]]
    return {row[0].strip().strip("`"): [cell.strip() for cell in row[1:]] for row in cells}


def test_every_reason_code_has_its_meaning_and_what_to_do() -> None:
    table = rows("## Reason codes")
    assert {code: cells[0] for code, cells in table.items()} == REASONS
    assert [code for code, cells in table.items() if len(cells[1]) < 7] == []


def test_every_metric_is_described_with_its_labels() -> None:
    full = Snapshot(
        studies={"s": 1},
        jobs={"s": 1},
        deliveries={("d", "s"): 1},
        intake={"new": 1},
        refusals={"c": 1},
        failures={"c": 1},
        stages={"wait": (1, 1.0)},
    )
    table = rows("## Metrics")
    found = {}
    for family in text_string_to_metric_families(metrics(full).decode()):
        name = family.name + ("_total" if family.type == "counter" else "")
        found[name] = [", ".join(f"`{label}`" for label in family.samples[0].labels), family.documentation]
    assert {name: cells[:2] for name, cells in table.items()} == found


def test_states_are_those_of_the_daemon() -> None:
    assert {state: cells[0] for state, cells in rows("| state of a job |").items()} == JOB_STATES
    assert {state: cells[0] for state, cells in rows("| state of a delivery |").items()} == DELIVERY_STATES
