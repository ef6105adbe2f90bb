"""What a zoo entry is: the strict model of `entry.toml` and the files beside it.

zoo/<entry>/  entry.toml  genotype.json  model.onnx (one per member)  parity.json  parity_inputs.npz  metrics.json
              card.md  SHA256SUMS
An entry without members is a recipe entry: a published genotype that nobody has trained here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from dints_deploy.catalog.preparation import Channel, Preparation, Sizes, Spacing, Triple
from dints_deploy.catalog.strict import Strict

RESEARCH_USE: Final = "Research use only. Not a medical device; not for diagnosis or treatment."
"""The line that stands wherever a result is shown."""

NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9.-]{0,63}$"

Axis = Literal["i", "j", "k"]
AXES: Final[tuple[Axis, Axis, Axis]] = ("i", "j", "k")
Colour = tuple[
    Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)]
]


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or path in ("", "."):
        raise ValueError("expected a relative path inside the entry")
    return path


EntryPath = Annotated[str, AfterValidator(_inside)]
"""A path relative to the entry's folder that does not leave it."""


class Code(Strict):
    """A coded concept (PS3.3 section 8): value, scheme designator, meaning."""

    value: str = Field(min_length=1, max_length=16)
    scheme: str = Field(min_length=1, max_length=16)
    meaning: str = Field(min_length=1, max_length=64)


class Label(Strict):
    """One structure: its value in the label map, its stable id, its names and codes."""

    value: PositiveInt
    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    name: str = Field(min_length=1, max_length=64)
    colour: Colour
    category: Code
    type: Code
    modifier: Code | None = None
    nsd_tolerance: PositiveFloat
    """mm, for the normalised surface Dice."""


class Region(Strict):
    """For sigmoid networks: output channel n is this union of labels, written as `value`; later regions overwrite."""

    name: str
    labels: tuple[PositiveInt, ...] = Field(min_length=1)
    value: PositiveInt


class Member(Strict):
    """One trained network of the entry; several are averaged (fold ensemble)."""

    onnx: EntryPath
    fold: int | None = None
    seed: int | None = None


class Accepts(Strict):
    """What scans the entry is for; anything else is refused by name. Lengths in mm."""

    modality: tuple[str, ...] = Field(min_length=1)
    extent_min: Triple
    extent_max: Triple
    spacing_min: Spacing
    spacing_max: Spacing
    shape_min: Sizes = (1, 1, 1)
    about: str = ""
    """What the scan must show, in words, for the message of a refusal."""

    @model_validator(mode="after")
    def _ordered(self) -> Accepts:
        pairs = (("extent", self.extent_min, self.extent_max), ("spacing", self.spacing_min, self.spacing_max))
        for name, low, high in pairs:
            if any(a > b for a, b in zip(low, high, strict=True)):
                raise ValueError(f"expected {name}_min <= {name}_max on every axis")
        return self


GeometryAction = Literal["accept", "regularise", "refuse"]


class GeometryPolicy(Strict):
    """What to do with a DICOM series whose slices are not a regular, upright stack."""

    tilt: GeometryAction = "refuse"
    """`accept` keeps the sheared grid: the network sees the anatomy sheared as it was scanned."""
    uneven: Literal["regularise", "refuse"] = "refuse"
    """Uneven steps and missing slices; accepting them would stretch the volume."""
    minimum_slices: PositiveInt = 3
    findings: dict[str, GeometryAction] = Field(default_factory=dict)
    """Code of any other finding -> action, where the gate leaves a choice (docs/dicom.md)."""


class Postprocess(Strict):
    """What happens to the label map on the scan's own grid, in this order."""

    keep_largest: tuple[PositiveInt, ...] = ()
    """Labels of which only the largest connected part stays (26 neighbours)."""
    min_volume_ml: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Label id -> volume below which the label is removed."""


class Training(Strict):
    """What the members were trained on, so that nobody measures them on it."""

    task: str
    fold: int | None = None
    cases: dict[str, str] = Field(default_factory=dict)
    """Case id -> SHA-256 of the image file."""
    commit: str = ""
    """Commit of the code that trained it."""


class ReducedLimits(Strict):
    """How far fp16, bf16 or int8 may be from the reference: labels count, logits are rounded on purpose.

    Attributes:
        min_label_agreement: share of equal labels on the entry's real windows.
        min_dice: of each label between the two label maps there.
        min_hostile_label_agreement: share of equal labels on air, a constant and clipped metal, which are far from
            anything that precision was chosen for, and where a constant makes normalisation amplify rounding.
        max_dice_drop: of the mean Dice against the readers' labels, of each label, where labelled cases are given.
    """

    min_label_agreement: PositiveFloat = 0.999
    min_dice: PositiveFloat = 0.99
    min_hostile_label_agreement: PositiveFloat = 0.95
    max_dice_drop: NonNegativeFloat = 0.005


class ParityLimits(Strict):
    """How far an engine may be from the reference before it is refused: in fp32, and in `reduced` precision."""

    max_abs_logit: PositiveFloat = 1e-3
    min_label_agreement: PositiveFloat = 0.9999
    reduced: ReducedLimits = ReducedLimits()


class Entry(Strict):
    """A zoo entry as `entry.toml` says it; docs/zoo-entry.md explains it.

    Attributes:
        overlap: share of a window that neighbouring windows share, per axis.
        tta: axes mirrored for test-time augmentation; the logits of all combinations are averaged.
    """

    schema_version: Literal[1]
    name: str = Field(pattern=NAME_PATTERN)
    version: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    title: str = Field(min_length=1)
    intended_use: str = Field(min_length=1)
    not_for: str = ""
    licence: str = Field(min_length=1)
    research_use: str = RESEARCH_USE
    genotype: EntryPath | None = None
    members: tuple[Member, ...] = ()
    channels: tuple[Channel, ...] = Field(min_length=1)
    labels: tuple[Label, ...] = Field(min_length=1)
    activation: Literal["softmax", "sigmoid"] = "softmax"
    regions: tuple[Region, ...] = ()
    spacing: Spacing | None = None
    window: Sizes
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    tta: tuple[Axis, ...] = ()
    accepts: Accepts
    geometry: GeometryPolicy = GeometryPolicy()
    postprocess: Postprocess = Postprocess()
    parity: ParityLimits = ParityLimits()
    training: Training | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Entry:
        check_distinct(self.channels, self.labels, self.tta)
        check_postprocess(self.postprocess, self.labels)
        if len({member.onnx for member in self.members}) != len(self.members):
            raise ValueError("expected distinct files of members")
        values = {label.value for label in self.labels}
        if self.activation == "softmax":
            if self.regions:
                raise ValueError("regions need activation = 'sigmoid'")
            check_softmax(self.labels)
        elif not self.regions:
            raise ValueError("activation = 'sigmoid' needs regions, in the order of the network's channels")
        for region in self.regions:
            if region.value not in values or not set(region.labels) <= values:
                raise ValueError(f"region {region.name!r} names a value that is no label")
        return self

    @property
    def preparation(self) -> Preparation:
        """Return how a scan becomes this entry's network input."""
        return Preparation(channels=self.channels, spacing=self.spacing, window=self.window)

    @property
    def outputs(self) -> int:
        """Return the number of logit channels of the network (background included for softmax)."""
        return len(self.labels) + 1 if self.activation == "softmax" else len(self.regions)


def check_distinct(channels: Sequence[Channel], labels: Sequence[Label], tta: Sequence[Axis]) -> None:
    """Refuse what stands twice; raise `ValueError`. A recipe keeps this rule and the next two as well."""
    if len({channel.name for channel in channels}) != len(channels):
        raise ValueError("expected distinct channel names")
    if min(len({label.value for label in labels}), len({label.id for label in labels})) != len(labels):
        raise ValueError("expected distinct values and ids of labels")
    if len(set(tta)) != len(tta):
        raise ValueError("expected distinct axes in tta")


def check_postprocess(rules: Postprocess, labels: Sequence[Label]) -> None:
    """Refuse rules about a label that is not there; raise `ValueError`."""
    values, ids = {label.value for label in labels}, {label.id for label in labels}
    if not set(rules.keep_largest) <= values or not set(rules.min_volume_ml) <= ids:
        raise ValueError("postprocess names a label that is not there")


def check_softmax(labels: Sequence[Label]) -> None:
    """Refuse label values that are not the channels of a softmax network; raise `ValueError`."""
    if sorted(label.value for label in labels) != list(range(1, len(labels) + 1)):
        raise ValueError("expected label values 1..n for a softmax network")
