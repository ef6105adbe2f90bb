"""Findings about a series: a code, how grave it is, which slices it concerns, and what a policy may do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Final

from dints_deploy.errors import UsageError


class Severity(StrEnum):
    """How grave a finding is before any policy."""

    NOTE = "note"
    """Worth knowing, changes nothing."""
    WARNING = "warning"
    """The volume is right, but something is unusual."""
    REFUSAL = "refusal"
    """No volume, unless a policy says otherwise."""


class Action(StrEnum):
    """What is done about a finding."""

    ACCEPT = "accept"
    """Go on with the geometry as it is."""
    REGULARISE = "regularise"
    """Resample to a regular grid, and bring masks back to every source slice."""
    REFUSE = "refuse"
    """Raise with the finding's code."""


@dataclass(frozen=True)
class Kind:
    """What may be done about one kind of finding.

    Attributes:
        severity: how grave it is by itself.
        default: the action without a policy.
        allowed: the actions that a policy may name; stretching a volume silently is never one of them.
    """

    severity: Severity
    default: Action
    allowed: frozenset[Action]


_NOTE = Kind(Severity.NOTE, Action.ACCEPT, frozenset({Action.ACCEPT, Action.REFUSE}))
_WARNING = Kind(Severity.WARNING, Action.ACCEPT, frozenset({Action.ACCEPT, Action.REFUSE}))
_FATAL = Kind(Severity.REFUSAL, Action.REFUSE, frozenset({Action.REFUSE}))
_ACCEPTABLE = Kind(Severity.REFUSAL, Action.REFUSE, frozenset({Action.ACCEPT, Action.REFUSE}))
_REGULAR = Kind(Severity.REFUSAL, Action.REFUSE, frozenset({Action.REGULARISE, Action.REFUSE}))
_TILT = Kind(Severity.REFUSAL, Action.REFUSE, frozenset(Action))

KINDS: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        # a file that is, or may be, part of the series
        "dicom-not-a-file": _NOTE,
        "dicom-not-dicom": _NOTE,
        "scan-empty": _NOTE,
        "dicom-corrupt": _ACCEPTABLE,
        "dicom-truncated": _ACCEPTABLE,
        "dicom-too-large": _ACCEPTABLE,
        "dicom-pixels": _ACCEPTABLE,
        "dicom-syntax": _FATAL,
        "dicom-attribute": _FATAL,
        "scan-missing": _ACCEPTABLE,
        "dicom-copied-file": _NOTE,
        "dicom-duplicate-uid": _FATAL,
        # the series as a whole
        "dicom-no-uid": _WARNING,
        "dicom-no-images": _FATAL,
        "dicom-sop-class": _FATAL,
        "dicom-localizer": _FATAL,
        "dicom-mosaic": _FATAL,
        "dicom-several-volumes": _FATAL,
        "dicom-lossy": _WARNING,
        # one plane
        "dicom-orientation": _FATAL,
        "dicom-spacing": _FATAL,
        "dicom-position": _FATAL,
        "dicom-non-square": _NOTE,
        # the planes together
        "dicom-mixed-frame": _FATAL,
        "dicom-mixed-matrix": _FATAL,
        "dicom-mixed-orientation": _FATAL,
        "dicom-mixed-spacing": _FATAL,
        "dicom-mixed-pixels": _FATAL,
        "dicom-mixed-bits": _NOTE,
        "dicom-too-few-slices": _ACCEPTABLE,
        "dicom-duplicate-position": _FATAL,
        "dicom-missing-slice": _REGULAR,
        "dicom-uneven-steps": _REGULAR,
        "dicom-tilt": _TILT,
        "dicom-skew": _FATAL,
        "dicom-tilt-tag": _NOTE,
        "dicom-slice-gap": _NOTE,
        "dicom-instance-gap": _NOTE,
        # values
        "dicom-photometric": _FATAL,
        "dicom-monochrome1": _ACCEPTABLE,
        "dicom-rescale": _FATAL,
        "dicom-rescale-type": _ACCEPTABLE,
        "dicom-rescale-varies": _NOTE,
        "dicom-modality-lut": _FATAL,
        "dicom-padding": _NOTE,
        "dicom-excess-pixels": _ACCEPTABLE,
    }
)
"""Every finding about a series or its files, each also a reason code of `errors.REASONS`."""


@dataclass(frozen=True)
class Finding:
    """Something noticed about a series or a file.

    Attributes:
        code: a reason code.
        severity: how grave it is.
        message: one sentence without patient identifiers: expected, found, what to do.
        slices: the planes concerned, as positions in the order along the normal (or of the series where there is none).
        path: the file concerned; never part of the message, as names of files may identify a patient.
    """

    code: str
    severity: Severity
    message: str
    slices: tuple[int, ...] = ()
    path: Path | None = None

    def __str__(self) -> str:
        return f"{self.severity}: {self.message} [{self.code}]"


def finding(code: str, message: str, slices: tuple[int, ...] = ()) -> Finding:
    """Return a finding of a kind in `KINDS` with that kind's severity."""
    return Finding(code, KINDS[code].severity, message, slices)


@dataclass(frozen=True)
class Policy:
    """What an entry does about each finding; a code that is not named has its default action.

    Attributes:
        actions: code -> action.
        minimum_slices: fewer planes than this are `dicom-too-few-slices`.

    Raises:
        UsageError: `usage` for an unknown code, or for an action that a finding does not allow.
    """

    actions: Mapping[str, Action] = field(default_factory=dict)
    minimum_slices: int = 3

    def __post_init__(self) -> None:
        actions = {code: Action(action) for code, action in self.actions.items()}
        for code, action in actions.items():
            if code not in KINDS:
                raise UsageError("usage", f"expected a DICOM finding, found {code!r}: one of {', '.join(KINDS)}")
            if action not in KINDS[code].allowed:
                allowed = ", ".join(sorted(KINDS[code].allowed))
                raise UsageError("usage", f"expected one of {allowed} for {code}, found {action}: change the policy")
        object.__setattr__(self, "actions", MappingProxyType(actions))

    def action(self, code: str) -> Action:
        """Return what to do about a finding."""
        return self.actions.get(code, KINDS[code].default)


STRICT = Policy()
"""Refuse whatever is not a regular stack."""

REGULARISING = Policy(
    {
        "dicom-tilt": Action.REGULARISE,
        "dicom-uneven-steps": Action.REGULARISE,
        "dicom-missing-slice": Action.REGULARISE,
    }
)
"""Resample tilted and uneven stacks to a regular grid; refuse the rest."""


def escaped(text: str) -> str:
    """Return text from a file with everything that a terminal could take as a command made visible."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)
