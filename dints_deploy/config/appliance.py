"""The whole of `appliance.toml`: data_dir, intake, routes, delivery, and how to run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from dints_deploy.catalog.strict import Strict
from dints_deploy.config.delivery import Destination, DicomDestination, Route
from dints_deploy.config.fields import TLS, AbsolutePath, Port, distinct, is_loopback, known
from dints_deploy.config.intake import Completeness, Folder, Listener, Title


class Worker(Strict):
    """How studies are processed: one process for each device.

    Attributes:
        memory_bytes: of one worker process; None for no limit.
        job_seconds: after which a job counts as hung.
        attempts: before a job goes to quarantine.
    """

    devices: tuple[str, ...] = Field(default=("cpu",), min_length=1)
    engine: Literal["auto", "openvino", "onnx", "tensorrt"] = "auto"
    precision: str = "fp32"
    threads: PositiveInt | None = None
    memory_bytes: PositiveInt | None = None
    job_seconds: PositiveFloat = 1800.0
    attempts: PositiveInt = 5
    retry_seconds: PositiveFloat = 30.0


class Retention(Strict):
    """How long finished work is kept, in days; None for ever."""

    objects_days: PositiveFloat | None = 7.0
    results_days: PositiveFloat | None = 30.0
    quarantine_days: PositiveFloat | None = None


class Disk(Strict):
    """When intake stops: below `free_bytes` of room on the data folder's disk, or beyond `quota_bytes` of objects."""

    free_bytes: int = Field(default=5 << 30, ge=0)
    quota_bytes: PositiveInt | None = None


class Http(Strict):
    """Health and metrics. Anything but this machine's own address needs a token and TLS."""

    address: str = "127.0.0.1"
    port: Port = 9113
    token_file: AbsolutePath | None = None
    tls: TLS | None = None

    @model_validator(mode="after")
    def _guarded(self) -> Http:
        if not is_loopback(self.address) and (self.token_file is None or self.tls is None):
            raise ValueError(f"expected token_file and tls, as {self.address} can be reached from outside")
        if self.tls is not None and self.tls.certificate is None:
            raise ValueError("tls: expected a certificate and a key")
        return self


class Log(Strict):
    """Structured log lines, to standard error, or to a file."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    file: AbsolutePath | None = None


class Config(Strict):
    """The whole of `appliance.toml`.

    Attributes:
        data_dir: everything that the daemon keeps.
        audit_anchor: where the head of the audit trail is written too: best on another machine or disk.
    """

    schema_version: Literal[1]
    data_dir: AbsolutePath
    audit_anchor: AbsolutePath | None = None
    listeners: tuple[Listener, ...] = ()
    folders: tuple[Folder, ...] = ()
    completeness: Completeness = Completeness()
    routes: tuple[Route, ...] = Field(min_length=1)
    destinations: tuple[Destination, ...] = Field(min_length=1)
    worker: Worker = Worker()
    retention: Retention = Retention()
    disk: Disk = Disk()
    http: Http | None = Http()
    log: Log = Log()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if not self.listeners and not self.folders:
            raise ValueError("expected listeners or folders: nothing would come in")
        routes = distinct("routes", (route.name for route in self.routes))
        destinations = distinct("destinations", (destination.name for destination in self.destinations))
        titles = [title for listener in self.listeners for title in listener.titles]
        names = distinct("listeners: titles", (title.ae_title for title in titles))
        distinct("listeners: ports", (str(listener.port) for listener in self.listeners))
        for named in (*(title.routes for title in titles), *(folder.routes for folder in self.folders)):
            known("routes", named, routes)
        for route in self.routes:
            known(f"routes.{route.name}.destinations", route.destinations, destinations)
        for one in self.destinations:
            if isinstance(one, DicomDestination) and one.commitment:
                known(f"destinations.{one.name}.calling_ae_title", (one.calling_ae_title,), names)
                _can_report(one, next(title for title in titles if title.ae_title == one.calling_ae_title))
        for folder in self.folders:
            if folder.path.is_relative_to(self.data_dir) or self.data_dir.is_relative_to(folder.path):
                raise ValueError("folders: expected a watched folder apart from data_dir")
        return self


def _can_report(destination: DicomDestination, title: Title) -> None:
    """Refuse a PACS that is asked for commitments and may not call the title to which it reports them."""
    if not {"*", destination.ae_title} & set(title.callers):
        found = f"{destination.ae_title}, which reports commitments there"
        raise ValueError(f"listeners: callers of {title.ae_title}: expected {found}: add it")
