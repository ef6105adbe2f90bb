"""How a scan becomes a network's input: the part of an entry that training and inference share to the letter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from dints_deploy.catalog.strict import Strict

Triple = tuple[float, float, float]
Sizes = tuple[PositiveInt, PositiveInt, PositiveInt]
Spacing = tuple[PositiveFloat, PositiveFloat, PositiveFloat]


class ZScore(Strict):
    """Subtract the mean and divide by the standard deviation of the volume.

    Attributes:
        clip_percentiles: clip to these percentiles of the volume first.
        nonzero: statistics over voxels that are not zero, zeros stay zero (skull-stripped images).
    """

    scheme: Literal["zscore"]
    clip_percentiles: tuple[float, float] | None = None
    nonzero: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> ZScore:
        if self.clip_percentiles is not None and not 0 <= self.clip_percentiles[0] < self.clip_percentiles[1] <= 100:
            raise ValueError("expected 0 <= lower < upper <= 100 in clip_percentiles")
        return self


class Window(Strict):
    """Clip to lower..upper (HU for CT), then map to 0..1, or to (x - mean) / std where those are given."""

    scheme: Literal["window"]
    lower: float
    upper: float
    mean: float | None = None
    std: PositiveFloat | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Window:
        if self.lower >= self.upper:
            raise ValueError("expected lower < upper")
        if (self.mean is None) != (self.std is None):
            raise ValueError("expected mean and std together, or neither")
        return self


class Identity(Strict):
    """Leave the values as they are."""

    scheme: Literal["identity"]


Intensity = Annotated[ZScore | Window | Identity, Field(discriminator="scheme")]


class SeriesRule(Strict):
    """Which DICOM series may serve as this channel; each given list must match (patterns: fnmatch, case ignored)."""

    description: tuple[str, ...] = ()
    body_part: tuple[str, ...] = ()
    exclude_description: tuple[str, ...] = ()
    contrast: Literal["any", "required", "excluded"] = "any"


class Channel(Strict):
    """One input channel of a network.

    Attributes:
        name: as used by `--channel NAME=FILE`.
        modality: DICOM Modality (0008,0060): CT, MR, PT ...
        intensity: how its values are normalised.
        fill: value around the scan, after normalisation: zero, or the smallest value of the channel.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,31}$")
    modality: str = Field(pattern=r"^[A-Z]{2}$")
    series: SeriesRule = SeriesRule()
    intensity: Intensity
    fill: Literal["zero", "minimum"] = "zero"


class Preparation(Strict):
    """The whole way from a scan to network input.

    Attributes:
        channels: in the network's order.
        spacing: i, j, k in mm after resampling; None keeps the scan's own.
        window: voxels of one network input along i, j, k.
    """

    channels: tuple[Channel, ...] = Field(min_length=1)
    spacing: Spacing | None = None
    window: Sizes

    @model_validator(mode="after")
    def _distinct(self) -> Preparation:
        if len({c.name for c in self.channels}) != len(self.channels):
            raise ValueError("expected distinct channel names")
        return self
