"""What the daemon's parts tell each other: frozen records and the few protocols between them.

Times that end in `_s` are seconds of the appliance's own clock (`service.clock`): it never jumps, whatever the wall
clock does. Wall-clock times are ISO 8601 text in UTC, for people and for DICOM objects only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from dints_deploy.dicom.instance import Instance


@dataclass(frozen=True)
class Received:
    """One object that an edge has written to `incoming/`, not yet durable.

    Attributes:
        door: where it came in: our AE title, or the path of the watched folder.
        path: a file of its own under `data_dir/incoming`, which `accept` takes over.
        sha256, size_bytes: of the file.
        instance: what its header says; None for NIfTI.
        name: file name of a NIfTI file, which may hold a patient's name: never logged, cleaned before it is a path.
        calling: the sender's AE title; empty for folders.
        address: of the sender; empty for folders.
        association: the DICOM association that brought it; None for folders.
    """

    source: Literal["dicom", "folder"]
    door: str
    path: Path
    sha256: str
    size_bytes: int
    instance: Instance | None = None
    name: str = ""
    calling: str = ""
    address: str = ""
    association: str | None = None


@dataclass(frozen=True)
class Accepted:
    """What became of an object that is now durable.

    Attributes:
        outcome: `new`; `duplicate`, the same bytes were there and nothing changed; `conflict`, another object of the
            same SOPInstanceUID was there first: both are kept, the first one counts.
        study: short name of the study for messages and logs.
    """

    outcome: Literal["new", "duplicate", "conflict"]
    study: str


class Intake(Protocol):
    """Where the edges hand over what came in. Called from any thread."""

    def check_room(self, size_bytes: int = 0) -> None:
        """Return where an object of at least that size would be taken at present: asked before it is written.

        Raises:
            IntakeRefused: `intake-disk`.
        """

    def accept(self, received: Received) -> Accepted:
        """Return once file and row are durable; concurrent callers share one transaction.

        Raises:
            IntakeRefused: `intake-disk`. OutputError: `disk-full`, `output-unwritable`. Nothing is kept of the object,
                its file in `incoming/` is removed.
        """

    def association_closed(self, association: str, *, clean: bool) -> None:
        """Note that an association is over; clean where the peer released it."""


@dataclass(frozen=True)
class Evidence:
    """What is known about a study that comes in, for the judgement whether it is complete.

    Attributes:
        instances: all that count, of earlier revisions too; empty for NIfTI.
        last_arrival_s: of the newest instance.
        open_associations: that brought instances and are still open.
        aborted_associations: that brought instances since the last revision and did not end cleanly.
        calling: AE titles that sent it.
        counts: SeriesInstanceUID -> number of instances that the sender said; None while it was not asked.
        revision: number of the last sealed revision; 0 for a new study.
    """

    instances: tuple[Instance, ...]
    last_arrival_s: float
    open_associations: int = 0
    aborted_associations: int = 0
    calling: tuple[str, ...] = ()
    counts: Mapping[str, int] | None = None
    revision: int = 0


@dataclass(frozen=True)
class Verdict:
    """Whether a study is complete.

    Attributes:
        complete: it is; otherwise it is judged again at `again_s`, or when something arrives.
        reason: one sentence that is stored: which evidence decided, or what is waited for.
        again_s: when to look again if nothing arrives.
        ask: the sender should be asked for its counts (C-FIND) before the next judgement.
    """

    complete: bool
    reason: str
    again_s: float = 0.0
    ask: bool = False


@dataclass(frozen=True)
class SeriesFacts:
    """What a route's conditions can be about: one series. DICOM keywords where they are verbatim.

    Attributes:
        spacing, shape, extent: along columns, rows and slices, in mm, voxels and mm; None where the series is no
            volume.
    """

    label: str
    Modality: str
    SeriesDescription: str
    BodyPartExamined: str
    spacing: tuple[float, float, float] | None = None
    shape: tuple[int, int, int] | None = None
    extent: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class StudyFacts:
    """What routes are chosen by.

    Attributes:
        doors: our AE titles and watched folders through which it came.
        calling: AE titles that sent it.
        series: of the study; empty for NIfTI.
    """

    kind: Literal["dicom", "nifti"]
    doors: tuple[str, ...]
    calling: tuple[str, ...]
    series: tuple[SeriesFacts, ...]


@dataclass(frozen=True)
class RouteMatch:
    """Whether a route takes a study, and the sentence that says why."""

    route: str
    taken: bool
    reason: str


@dataclass(frozen=True)
class Snapshot:
    """How the daemon is, for health and metrics; holds no patient data.

    Attributes:
        problems: why the daemon is not ready; empty when it is.
        studies, jobs, deliveries: how many in each state; deliveries by (destination, state).
        oldest_queued_s: age of the oldest job that waits for a worker; 0 where none does.
        intake: objects since the start by outcome (`new`, `duplicate`, `conflict`, `refused`).
        intake_bytes: taken since the start.
        refusals: reason code -> studies refused since the start.
        failures: reason code -> attempts (of jobs and deliveries) that failed since the start.
        stages: stage (`intake`, `wait`, `read` ...) -> (times, seconds) since the start.
    """

    problems: tuple[str, ...] = ()
    studies: Mapping[str, int] = field(default_factory=dict)
    jobs: Mapping[str, int] = field(default_factory=dict)
    deliveries: Mapping[tuple[str, str], int] = field(default_factory=dict)
    oldest_queued_s: float = 0.0
    intake: Mapping[str, int] = field(default_factory=dict)
    intake_bytes: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    stages: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    free_bytes: int = 0
    workers: Mapping[str, str] = field(default_factory=dict)
