"""Which studies are processed and how (routes), and where results go (destinations)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from dints_deploy.catalog.preparation import Sizes, Triple
from dints_deploy.catalog.strict import Strict
from dints_deploy.config.fields import TLS, AbsolutePath, AETitle, Name, Port, is_loopback


class SeriesCondition(Strict):
    """What one series must be like: each list that is given must match (patterns: fnmatch, case ignored).

    Attributes:
        spacing_max: mm along columns, rows and slices.
        shape_min: voxels along columns, rows and slices.
    """

    modality: tuple[str, ...] = ()
    description: tuple[str, ...] = ()
    exclude_description: tuple[str, ...] = ()
    body_part: tuple[str, ...] = ()
    spacing_max: Triple | None = None
    shape_min: Sizes | None = None
    extent_max: Triple | None = None


class Route(Strict):
    """Which studies go to which entry, what is made of them, and where it goes.

    Attributes:
        calling: patterns of the sender's AE title; empty for every one, and for folders.
        series: conditions that must each be met by a series of the study.
        outputs: as `segment --to`.
        priority: higher is first.
        send_refusals: whether a study that is refused gets an SR that says why.
    """

    name: Name
    entry: Name
    calling: tuple[str, ...] = ()
    series: tuple[SeriesCondition, ...] = ()
    outputs: tuple[str, ...] = Field(default=("dicom-seg", "dicom-sr"), min_length=1)
    destinations: tuple[Name, ...] = Field(min_length=1)
    priority: int = Field(default=0, ge=-9, le=9)
    send_refusals: bool = False


class FolderDestination(Strict):
    """A folder that results are written to, each under a folder of its job."""

    kind: Literal["folder"]
    name: Name
    path: AbsolutePath


class DicomDestination(Strict):
    """A PACS that results are sent to by C-STORE.

    Attributes:
        calling_ae_title: ours; with `commitment` it must be a title of a listener that the PACS may call to report.
        commitment: ask for storage commitment (PS3.4 J), and count a result as delivered only when it is given.
    """

    kind: Literal["dicom"]
    name: Name
    host: str = Field(min_length=1)
    port: Port
    ae_title: AETitle
    calling_ae_title: AETitle
    tls: TLS | None = None
    commitment: bool = False
    timeout_seconds: PositiveFloat = 30.0
    commitment_seconds: PositiveFloat = 60.0


class StowDestination(Strict):
    """A DICOMweb server that results are sent to by STOW-RS (PS3.18 10.5).

    Attributes:
        url: of the service; "/studies" is added. Plain http only for this machine itself.
        token_file: holds a bearer token.
        authority: who signed the server's certificate; the system's authorities by default.
    """

    kind: Literal["stow"]
    name: Name
    url: str = Field(pattern=r"^https?://[^\s?#@]+$")
    token_file: AbsolutePath | None = None
    tls: TLS | None = None
    timeout_seconds: PositiveFloat = 30.0

    @model_validator(mode="after")
    def _encrypted(self) -> StowDestination:
        host = self.url.partition("://")[2].partition("/")[0]
        if self.url.startswith("http://") and not is_loopback(_without_port(host)):
            raise ValueError("url: expected https, as the server is not this machine")
        return self


Destination = Annotated[FolderDestination | DicomDestination | StowDestination, Field(discriminator="kind")]


def _without_port(host: str) -> str:
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
