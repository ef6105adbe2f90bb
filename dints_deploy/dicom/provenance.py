"""What made a result, as text inside the objects: model, weights, engine, input and mask, each by its digest.

It stands in every object as a Contributing Equipment (PS3.3 C.12.1) whose Contribution Description has one `key=value`
on each line, and it is what all UIDs of the result are derived from. A last line, `content=`, is the digest of what the
object itself says, so that a changed volume, name or code shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from dints_deploy.dicom.header import Plane
from dints_deploy.dicom.read import DicomVolume
from dints_deploy.dicom.readback import rtstruct_polygons

SOFTWARE: Final = "dints-deploy"
PURPOSE: Final = ("109102", "DCM", "Processing Equipment")
"""CID 7005: the equipment that turned images into derived objects."""

DESCRIPTION_BYTES: Final = 1024
"""Longest short text (PS3.5 6.2, ST); longer provenance goes on in a further item."""

CONTENT: Final = "content"
SAID: Final = ("ContentSequence", "SegmentSequence", "StructureSetROISequence", "RTROIObservationsSequence")
"""Sequences that hold what an object says in words, codes and numbers."""

SEVERAL: Final = ("weights", "input")
SEPARATOR: Final = " "
"""Fields that hold several digests, and what stands between them."""


@dataclass(frozen=True)
class Provenance:
    """Where a result comes from. Digests are SHA-256 in hexadecimal; empty where there is none.

    Attributes:
        entry: name of the zoo entry.
        version: of the entry.
        genotype: digest of the entry's genotype file.
        weights: digests of the members' ONNX files, in the entry's order.
        engine: name and version of what ran them.
        precision: that it ran at.
        input: `input_digest` of each channel, in the entry's order.
        mask: digest of `mask_digest`.
        software: version of dints-deploy.
    """

    entry: str
    version: str
    genotype: str = ""
    weights: tuple[str, ...] = ()
    engine: str = ""
    precision: str = ""
    input: tuple[str, ...] = ()
    mask: str = ""
    software: str = ""

    @property
    def identity(self) -> str:
        """Return the text that names exactly this result."""
        return "\n".join(f"{key}={value}" for key, value in self.parameters().items())

    def parameters(self) -> dict[str, str]:
        """Return the fields that have a value, as text."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {key: SEPARATOR.join(value) if key in SEVERAL else value for key, value in values.items() if value}


def provenance_of(record: Mapping[str, Any], *, input_sha256: Sequence[str], mask_sha256: str) -> Provenance:
    """Return the provenance that a record of `runtime.report.describe` tells."""
    model, engine = record["model"], record["engine"]
    return Provenance(
        entry=model["entry"],
        version=model["version"],
        genotype=model["genotype_sha256"] or "",
        weights=tuple(model["weights_sha256"]),
        engine=f"{engine['name']} {engine['version']}",
        precision=engine["precision"],
        input=tuple(input_sha256),
        mask=mask_sha256,
        software=record["software"][SOFTWARE],
    )


def equipment(provenance: Provenance, *, content: str) -> list[Dataset]:
    """Return the Contributing Equipment items that hold `provenance`, each of at most `DESCRIPTION_BYTES`.

    Args:
        content: `content_digest` of the object.
    """
    texts = [""]
    for line in [*provenance.identity.split("\n"), f"{CONTENT}={content}"]:
        joined = f"{texts[-1]}\n{line}".strip()
        if len(joined.encode()) <= DESCRIPTION_BYTES:
            texts[-1] = joined
        else:
            texts += _pieces(line)
    return [_item(text, provenance) for text in texts if text]


def read_provenance(dataset: Dataset) -> Provenance | None:
    """Return the provenance inside an object, or None where it has none of ours."""
    lines = _stated(dataset)
    known = {item.name for item in fields(Provenance)}
    values: dict[str, str] = {}
    for key, value in lines:
        if key in known:
            values[key] = f"{values[key]}{SEPARATOR}{value}" if key in values else value
    if "entry" not in values or "version" not in values:
        return None
    several = {key: tuple(values.pop(key, "").split()) for key in SEVERAL}
    return Provenance(**values, **several)  # type: ignore[arg-type]


def read_content_digest(dataset: Dataset) -> str:
    """Return the digest that an object states of its own content, empty where it states none."""
    return dict(_stated(dataset)).get(CONTENT, "")


def content_digest(dataset: Dataset) -> str:
    """Return the digest of what an object says: report, segments, structures with contours, picture (not the mask)."""
    said = Dataset()
    for keyword in SAID:
        if keyword in dataset:
            said[keyword] = dataset[keyword]
    digest = hashlib.sha256(json.dumps(said.to_json_dict(), sort_keys=True).encode())
    if "ROIContourSequence" in dataset:
        for number, (uid, frame), corners in rtstruct_polygons(dataset):
            digest.update(f"{number} {uid} {frame} {corners.shape}".encode())
            digest.update(np.ascontiguousarray(corners, dtype="<f8").data)
    if "SegmentSequence" not in dataset and "PixelData" in dataset:
        digest.update(dataset.get("PixelData") or b"")
    return digest.hexdigest()


def input_digest(volume: DicomVolume) -> str:
    """Return the digest of a source: instance, frame, geometry and modality values of its planes in order.

    It does not depend on the files' transfer syntax or other attributes, nor on what was regularised: a series fetched
    from an archive again has the same digest.
    """
    return planes_digest(volume.planes, volume.source_values())


def planes_digest(planes: Sequence[Plane], values: NDArray[np.float32]) -> str:
    """Return the digest of source planes with their modality values (planes, rows, columns)."""
    digest = hashlib.sha256()
    for plane, pixels in zip(planes, values, strict=True):
        header = plane.header
        place = (header.ImagePositionPatient, header.ImageOrientationPatient, header.PixelSpacing)
        digest.update(f"{header.SOPInstanceUID} {header.frame} {place} {pixels.shape}".encode())
        digest.update(np.ascontiguousarray(pixels, dtype="<f4").data)
    return digest.hexdigest()


def mask_digest(planes: Iterable[tuple[str, int, NDArray[Any]]]) -> str:
    """Return the digest of segment numbers on source planes, (SOPInstanceUID, frame from 0, (rows, columns)) each.

    Planes without a segment do not count, nor does the order: the digest can be taken from a written SEG alone.
    """
    digest = hashlib.sha256()
    for uid, frame, plane in sorted(planes, key=lambda item: item[:2]):
        if plane.any():
            digest.update(f"{uid} {frame} {plane.shape}".encode())
            digest.update(np.ascontiguousarray(plane, dtype="<u2").data)
    return digest.hexdigest()


def _stated(dataset: Dataset) -> list[tuple[str, str]]:
    """Return the keys and values in the equipment items that we wrote."""
    lines: list[tuple[str, str]] = []
    for item in dataset.get("ContributingEquipmentSequence") or []:
        if item.get("ManufacturerModelName") == SOFTWARE:
            pairs = (line.strip().partition("=") for line in str(item.get("ContributionDescription", "")).splitlines())
            lines += [(key, value) for key, _, value in pairs]
    return lines


def _pieces(line: str) -> list[str]:
    """Return a line that may be too long for one item as lines with the same key, broken between words."""
    key, _, value = line.partition("=")
    texts = [""]
    for word in value.split(SEPARATOR):
        joined = f"{texts[-1]}{SEPARATOR}{word}".strip()
        if len(f"{key}={joined}".encode()) <= DESCRIPTION_BYTES:
            texts[-1] = joined
        else:
            texts.append(word)
    return [f"{key}={text}" for text in texts]


def _item(text: str, provenance: Provenance) -> Dataset:
    purpose, item = Dataset(), Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator, purpose.CodeMeaning = PURPOSE
    item.PurposeOfReferenceCodeSequence = [purpose]
    item.Manufacturer = SOFTWARE
    item.ManufacturerModelName = SOFTWARE
    item.SoftwareVersions = provenance.software
    item.ContributionDescription = text
    return item
