"""A database with a clock that tests set, and objects for it, without threads and ports."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dints_deploy.config.appliance import Retention
from dints_deploy.config.delivery import Route
from dints_deploy.dicom.instance import Instance
from dints_deploy.service.clock import Boot
from dints_deploy.service.deliver import Receipt
from dints_deploy.service.intake import DurableIntake, Room
from dints_deploy.service.model import Accepted, Received, RouteMatch, StudyFacts, Verdict
from dints_deploy.service.retention import make_folders
from dints_deploy.service.store import Store, open_store
from dints_deploy.service.studies import Rules, judge_due

CT = "1.2.840.10008.5.1.4.1.1.2"
SEG = "1.2.840.10008.5.1.4.1.1.66.4"


@dataclass
class Time:
    """Seconds since a boot, as a test says."""

    seconds: float = 1000.0
    name: str = "boot-1"

    def boot(self) -> Boot:
        return Boot(self.name, lambda: self.seconds)


@dataclass
class Bench:
    """A data folder with its database, intake and rules."""

    folder: Path
    time: Time = field(default_factory=Time)
    room: Room = field(default_factory=Room)
    routes: tuple[str, ...] = ("all",)

    def __post_init__(self) -> None:
        make_folders(self.folder)
        self.store: Store = open_store(self.folder, boot=self.time.boot())
        self.intake = DurableIntake(self.store, self.folder, self.room)

    def reopen(self) -> None:
        """Close the database and open it again, as a restart does."""
        self.store.close()
        self.store = open_store(self.folder, boot=self.time.boot())
        self.intake = DurableIntake(self.store, self.folder, self.room)

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in self.store._connection.execute(query, values)]

    def take(
        self, number: int, *, study: str = "1.2.3", data: bytes = b"", door: str = "DINTS", **more: Any
    ) -> Accepted:
        """Take an object, the `number`-th slice of a study; `data` makes it another one."""
        return self.intake.accept(self.received(number, study=study, data=data, door=door, **more))

    def received(
        self, number: int, *, study: str = "1.2.3", data: bytes = b"", door: str = "DINTS", **more: Any
    ) -> Received:
        content = data or f"{study}.{number}".encode()
        path = self.folder / "incoming" / f"{secrets.token_hex(8)}.part"
        path.write_bytes(content)
        fields: dict[str, Any] = {"calling": "MR1", "association": "a1", "sop_class": CT} | more
        instance = Instance(
            SOPClassUID=fields.pop("sop_class"),
            SOPInstanceUID=f"{study}.1.{number}",
            StudyInstanceUID=study,
            SeriesInstanceUID=f"{study}.1",
            TransferSyntaxUID="1.2.840.10008.1.2.1",
            Modality="CT",
            InstanceNumber=number,
            ImageOrientationPatient=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
            ImagePositionPatient=(0.0, 0.0, float(number)),
            frames=1,
        )
        digest = hashlib.sha256(content).hexdigest()
        return Received("dicom", door, path, digest, len(content), instance=instance, **fields)

    def rules(self, *, doors: dict[str, Sequence[str]] | None = None, **changes: Any) -> Rules:
        """Return rules by which everything is complete and every route takes it, where its door leads to it."""

        def choose(facts: StudyFacts) -> list[RouteMatch]:
            led = {name for door in facts.doors for name in (doors or {}).get(door, self.routes)}
            return [RouteMatch(name, name in led, "") for name in self.routes]

        fields: dict[str, Any] = {
            "judge": lambda evidence, now_s: Verdict(True, "said so"),
            "ask": lambda calling, study: {},
            "facts_of": lambda study, doors, calling: StudyFacts("dicom", tuple(doors), tuple(calling), ()),
            "choose": choose,
            "routes": {name: route(name) for name in self.routes},
        }
        return Rules(**fields | changes)

    def judge(self, rules: Rules | None = None, *, after_s: float = 1.0) -> float | None:
        """Let time pass and judge what is due."""
        self.time.seconds += after_s
        return judge_due(self.store, self.folder, rules or self.rules())

    def jobs(self) -> list[tuple[Any, ...]]:
        """Return revision, route and state of every job, in order."""
        return self.rows("SELECT revision, route, state FROM job ORDER BY study_id, revision, route")

    def actions(self) -> list[str]:
        """Return the actions of the audit trail."""
        return [row[0] for row in self.rows("SELECT json_extract(line, '$.action') FROM event ORDER BY seq")]


def taken(destination: str, files: Sequence[Path], job: str) -> Receipt:
    """Take every result: a destination that always works."""
    return Receipt(destination, tuple(file.name for file in files))


def retention(**days: float | None) -> Retention:
    """Return a policy that keeps everything but what is told."""
    fields = {"objects_days": None, "results_days": None, "quarantine_days": None} | days
    return Retention.model_validate(fields)


def route(name: str = "all", *destinations: str, **changes: Any) -> Route:
    """Return a route to an entry `tiny`."""
    fields = {"name": name, "entry": "tiny", "outputs": ["dicom-seg"], "destinations": destinations or ("pacs",)}
    return Route.model_validate(fields | changes)
