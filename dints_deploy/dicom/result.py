"""A mask on its way into DICOM objects: on the source's own planes, with everything that an object says about it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from dints_deploy.catalog.entry import Entry
from dints_deploy.dicom.attributes import Attributes
from dints_deploy.dicom.bounded import quiet, read_header
from dints_deploy.dicom.header import Plane
from dints_deploy.dicom.instance import Instance
from dints_deploy.dicom.provenance import Provenance, input_digest, mask_digest, provenance_of
from dints_deploy.dicom.read import DicomVolume
from dints_deploy.dicom.uid import derived_uid
from dints_deploy.errors import OutputError
from dints_deploy.imaging.volume import Volume

ZONE: Final = re.compile(r"([+-])(0\d|1[0-4])([0-5]\d)")
"""Hours and minutes from UTC."""

SegmentationType = Literal["BINARY", "LABELMAP"]


@dataclass(frozen=True, eq=False)
class DicomResult:
    """Everything that the written objects say. Build it with `dicom_result`.

    Attributes:
        volume: the source, channel 0 of the entry.
        labels: (1, I, J, K) label values on the volume's grid.
        segments: (planes, rows, columns) segment numbers on the source's planes, in the order of `volume.planes`;
            segment n is the entry's n-th label, 0 is background (PS3.3 C.8.20.2: numbers run from 1 by 1).
        entry: names, codes and colours of the labels.
        volumes_ml: label id -> millilitres.
        provenance: what made the mask.
        header: data set of the first source file up to its pixels: patient and study.
        when: date and time in the objects, in the source's zone; an argument, so that two runs write the same bytes.
        segmentation_type: of the SEG (PS3.3 C.8.20.2.3).
        supersedes: the objects of an earlier result of the same study that this one replaces.
    """

    volume: DicomVolume
    labels: Volume
    segments: NDArray[Any]
    entry: Entry
    volumes_ml: Mapping[str, float]
    provenance: Provenance
    header: Dataset
    when: datetime
    segmentation_type: SegmentationType = "BINARY"
    supersedes: tuple[Instance, ...] = ()

    @cached_property
    def empty(self) -> bool:
        """Return whether nothing was found: no SEG and no RTSTRUCT can say that (a SEG has at least one frame)."""
        return not self.segments.any()

    @cached_property
    def present(self) -> frozenset[int]:
        """Return the segment numbers that have at least one pixel on a source plane."""
        return frozenset(_values_in(self.segments)) - {0}

    @property
    def planes(self) -> tuple[Plane, ...]:
        """Return the source's planes in order along the normal."""
        return self.volume.planes

    @property
    def study(self) -> str:
        """Return the source's StudyInstanceUID, or one derived from its instances where an anonymiser took it away."""
        return self.volume.series.StudyInstanceUID or self._derived("study")

    @property
    def series(self) -> str:
        """Return the source's SeriesInstanceUID, or one derived from its instances."""
        return self.volume.series.SeriesInstanceUID or self._derived("series")

    @property
    def frame_of_reference(self) -> str:
        """Return the source's FrameOfReferenceUID, or one derived from its instances."""
        return self.planes[0].header.FrameOfReferenceUID or self._derived("frame of reference")

    def _derived(self, what: str) -> str:
        return derived_uid(what, min(plane.header.SOPInstanceUID for plane in self.planes))

    def uid(self, *parts: str) -> str:
        """Return the UID of a part of this result, such as ("seg",) or ("seg", "series")."""
        return derived_uid(self.provenance.identity, *parts)


def dicom_result(
    volumes: Sequence[DicomVolume],
    labels: Volume,
    entry: Entry,
    record: Mapping[str, Any],
    *,
    volumes_ml: Mapping[str, float],
    when: datetime,
    segmentation_type: SegmentationType = "BINARY",
    supersedes: tuple[Instance, ...] = (),
) -> DicomResult:
    """Bring a label map back to the planes of its source and describe it.

    Args:
        volumes: the source of each channel, in the entry's order; objects are written in the geometry of the first.
        labels: (1, I, J, K) on the grid of the first volume.
        record: of `runtime.report.describe`.
        volumes_ml: label id -> millilitres, as measured on `labels`.
        when: date and time of the objects.
        supersedes: the objects of the result that this one replaces.

    Raises:
        OutputError: `output-object` where the source lacks the SOPInstanceUIDs that objects refer to, or the mask has
            values that are no labels.
    """
    source = volumes[0]
    if not all(plane.header.SOPInstanceUID for plane in source.planes):
        raise OutputError("output-object", "expected SOPInstanceUIDs in the source, found none: write NIfTI instead")
    segments = np.stack(source.to_source(_segment_numbers(labels, entry)))  # (planes, rows, columns)
    inputs = [input_digest(volume) for volume in volumes]
    provenance = provenance_of(record, input_sha256=inputs, mask_sha256=mask_digest(_named(source, segments)))
    with quiet():
        header = read_header(source.planes[0].header.path).dataset
    when = in_zone_of(header, when)
    fields = (source, labels, segments, entry, volumes_ml, provenance, header, when)
    return DicomResult(*fields, segmentation_type, supersedes)


def in_zone_of(header: Dataset, when: datetime) -> datetime:
    """Return a time in the zone that the source names for all its times (PS3.3 C.12.1.1.8), which objects copy.

    Where it names none, or `when` knows no zone itself, the time stays as it is.
    """
    offset = ZONE.fullmatch(Attributes([header]).text("TimezoneOffsetFromUTC"))
    if offset is None or when.tzinfo is None:
        return when
    minutes = int(offset[2]) * 60 + int(offset[3])
    return when.astimezone(timezone(timedelta(minutes=-minutes if offset[1] == "-" else minutes)))


def _segment_numbers(labels: Volume, entry: Entry) -> NDArray[Any]:
    """Return (I, J, K) segment numbers of label values."""
    present = _values_in(labels.data)
    numbers = np.zeros(max(present) + 1, dtype=np.uint8 if len(entry.labels) < 256 else np.uint16)
    if unknown := set(present) - {label.value for label in entry.labels} - {0}:
        found = f"found {sorted(unknown)}: report it"
        raise OutputError("output-object", f"expected the entry's labels in the mask, {found}")
    for number, label in enumerate(entry.labels, start=1):
        if label.value < len(numbers):
            numbers[label.value] = number
    mapped: NDArray[Any] = numbers.take(labels.data[0])
    return mapped


def _values_in(data: NDArray[Any]) -> list[int]:
    """Return the whole numbers that occur, in order; without a copy of the array as wide integers."""
    found = np.zeros(int(data.max()) + 1, dtype=bool)
    for part in data:
        found[part] = True
    return [int(value) for value in np.flatnonzero(found)]


def _named(volume: DicomVolume, segments: NDArray[Any]) -> list[tuple[str, int, NDArray[Any]]]:
    headers = [plane.header for plane in volume.planes]
    return [(header.SOPInstanceUID, header.frame, plane) for header, plane in zip(headers, segments, strict=True)]
