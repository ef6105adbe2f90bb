"""Check a written object against the zoo and its source: does it say the truth about where it comes from?

Every check is a line of data; nothing in it identifies a patient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataset import Dataset

from dints_deploy.catalog.catalog import LoadedEntry, load_entry
from dints_deploy.dicom.bounded import INVALID_FILE, open_regular, quiet
from dints_deploy.dicom.decoders import Decoders
from dints_deploy.dicom.gate import examine
from dints_deploy.dicom.header import Plane
from dints_deploy.dicom.pixels import decode
from dints_deploy.dicom.provenance import (
    Provenance,
    content_digest,
    mask_digest,
    planes_digest,
    read_content_digest,
    read_provenance,
)
from dints_deploy.dicom.readback import (
    LABELMAP_CLASS,
    SEG_CLASSES,
    header_affine,
    inside,
    rtstruct_polygons,
    seg_planes,
)
from dints_deploy.dicom.selfcheck import SAME_PLACE_MM, apart, corner_mm
from dints_deploy.dicom.series import Series, opened
from dints_deploy.dicom.uid import derived_uid
from dints_deploy.errors import DintsError, ScanRefused

KINDS: Final = {
    SEG_CLASSES[0]: ("seg", "BINARY"),
    LABELMAP_CLASS: ("seg", "LABELMAP"),
    "1.2.840.10008.5.1.4.1.1.88.34": ("sr", ""),
    "1.2.840.10008.5.1.4.1.1.88.22": ("refusal", ""),
    "1.2.840.10008.5.1.4.1.1.481.3": ("rtstruct", ""),
    "1.2.840.10008.5.1.4.1.1.7": ("sc", ""),
}
"""SOP class -> kind of object and option, as its UIDs are derived from them."""

Planes = dict[tuple[str, int], Plane]


@dataclass(frozen=True)
class Check:
    """One thing that was checked: its name, whether it holds, and what was found."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Verification:
    """What is known about a written object.

    Attributes:
        kind: seg, sr, rtstruct, sc or refusal; empty for another object.
        provenance: what it says about itself.
        checks: in the order they were made; with a source there are more.
    """

    kind: str
    provenance: Provenance | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Return whether all checks hold."""
        return all(check.passed for check in self.checks)


def verify_result(
    path: Path, *, source: Path | Sequence[Path] | None = None, zoo: Callable[[str], LoadedEntry] = load_entry
) -> Verification:
    """Check provenance against the zoo, UIDs and mask against the provenance, and all of it against the source.

    Args:
        path: an object that dints-deploy wrote.
        source: folder, zip or files of the series that it came from.
        zoo: name -> verified entry.

    Raises:
        ScanRefused: `scan-missing`, `dicom-not-a-file` or `dicom-corrupt` where `path` cannot be read as DICOM.
    """
    with quiet():
        written = _read(path)
        kind, option = KINDS.get(str(written.get("SOPClassUID")), ("", ""))
        provenance = read_provenance(written)
        if provenance is None or not kind:
            return Verification(kind, provenance, (Check("provenance", False, "not an object of dints-deploy"),))
        checks = [Check("provenance", True, f"{provenance.entry} {provenance.version}")]
        checks += _against_zoo(provenance, zoo)
        checks += _guarded("content", lambda: _content(written))
        if kind != "refusal":
            checks += _guarded("object", lambda: _against_itself(written, kind, option, provenance))
        if source is not None:
            checks += _guarded("source", lambda: _against_source(written, kind, provenance, source))
    return Verification(kind, provenance, tuple(checks))


def _read(path: Path) -> Dataset:
    try:
        with open_regular(path) as file:
            return dcmread(file)
    except INVALID_FILE as error:
        kind = type(error).__name__
        raise ScanRefused("dicom-corrupt", f"expected a DICOM object, found damage ({kind}): fetch it again") from None


def _guarded(name: str, checks: Callable[[], Iterator[Check]]) -> list[Check]:
    """Return the checks; an object or source that cannot be read is a failed check."""
    done: list[Check] = []
    try:
        done += checks()
    except DintsError as error:
        done.append(Check(name, False, str(error)))
    except INVALID_FILE as error:
        done.append(Check(name, False, f"not readable ({type(error).__name__})"))
    return done


def _against_zoo(provenance: Provenance, zoo: Callable[[str], LoadedEntry]) -> Iterator[Check]:
    """Yield whether the zoo's entry is the one that the object names."""
    if not provenance.weights and not provenance.genotype:
        return
    try:
        entry = zoo(provenance.entry)
    except DintsError as error:
        yield Check("entry", False, str(error))
        return
    spec = entry.spec
    yield Check("entry", spec.version == provenance.version, f"the zoo has version {spec.version}")
    weights = tuple(entry.digests[member.onnx] for member in spec.members)
    yield _same("weights", weights, provenance.weights)
    yield _same("genotype", entry.digests.get(spec.genotype or "", ""), provenance.genotype)


def _content(written: Dataset) -> Iterator[Check]:
    """Yield whether the object says what it was written to say."""
    yield _same("content", content_digest(written), read_content_digest(written))


def _against_itself(written: Dataset, kind: str, option: str, provenance: Provenance) -> Iterator[Check]:
    """Yield whether UIDs and mask are those of the provenance."""
    options = (option,) if option else ()
    for keyword, part in (("SOPInstanceUID", "instance"), ("SeriesInstanceUID", "series")):
        expected = derived_uid(provenance.identity, kind, part, *options)
        yield _same(keyword, expected, str(written.get(keyword)))
    if kind == "seg":
        planes = [(*name, frame.segments) for name, frame in seg_planes(written).items()]
        yield _same("mask", mask_digest(planes), provenance.mask)


def _against_source(
    written: Dataset, kind: str, provenance: Provenance, source: Path | Sequence[Path]
) -> Iterator[Check]:
    """Yield whether the source is the one that was read, and the object lies on its planes."""
    references = _references(written)
    with Decoders() as decoders, opened(source, decoders=decoders) as study:
        found = {one.label: len(references & {header.SOPInstanceUID for header in one.slices}) for one in study.series}
        label, hits = Counter(found).most_common(1)[0] if found else ("", 0)
        yield Check("source", hits > 0, f"{hits} images that the object refers to are there")
        if not hits:
            return
        planes = _planes(next(one for one in study.series if one.label == label))
        named: Planes = {(plane.header.SOPInstanceUID, plane.header.frame): plane for plane in planes}
        if kind == "refusal":
            return
        digests = [planes_digest(planes, decode([plane.header for plane in planes], decoders=decoders))]
        if len(provenance.input) > 1:
            others = [_planes(one) for one in study.series if one.slices and one.label != label]
            for other in filter(None, others):
                digests.append(planes_digest(other, decode([plane.header for plane in other], decoders=decoders)))
        yield Check("input", set(provenance.input) <= set(digests), f"digest {digests[0][:12]}")
        if kind == "seg":
            yield _seg_geometry(written, named)
        if kind == "rtstruct":
            yield from _rtstruct_geometry(written, named, provenance)


def _planes(series: Series) -> tuple[Plane, ...]:
    return examine(series.slices).planes


def _seg_geometry(written: Dataset, named: Planes) -> Check:
    """Return whether every plane lies where its source does: its first pixel, and its last."""
    worst, corner = 0.0, 0.0
    planes = seg_planes(written)
    for name, frame in planes.items():
        if name not in named:
            return Check("geometry", False, "a frame refers to an image that is not there")
        source = header_affine(named[name].header)
        worst = max(worst, apart(frame.affine, source, frame.segments.shape))
        corner = max(corner, corner_mm(frame.affine, source, frame.segments.shape))
    return Check("geometry", worst <= 1, f"{len(planes)} planes, corners at most {corner:.4f} mm from their source's")


def _rtstruct_geometry(written: Dataset, named: Planes, provenance: Provenance) -> Iterator[Check]:
    masks: dict[tuple[str, int], NDArray[np.uint16]] = {}
    off = 0.0
    for number, name, corners in rtstruct_polygons(written):
        layout = named[name].header.layout
        to_plane = np.linalg.inv(header_affine(named[name].header))
        local = corners @ to_plane[:3, :3].T + to_plane[:3, 3]
        off = max(off, float(np.abs(local[:, 2]).max()))
        mask = masks.setdefault(name, np.zeros((layout.Rows, layout.Columns), dtype=np.uint16))
        mask[inside(local[:, :2], (layout.Rows, layout.Columns))] = number
    yield Check("geometry", off <= SAME_PLACE_MM, f"contours at most {off:.4f} mm from their planes")
    yield _same("mask", mask_digest([(*name, mask) for name, mask in masks.items()]), provenance.mask)


def _references(written: Any) -> set[str]:
    """Return every instance that an object refers to."""
    found: set[str] = set()
    pending: list[Any] = [written]
    while pending:
        one = pending.pop()
        if uid := one.get("ReferencedSOPInstanceUID"):
            found.add(str(uid))
        sequences = [tag for tag in list(one.keys()) if dictionary_has_tag(tag) and dictionary_VR(tag) == "SQ"]
        pending += [item for tag in sequences for item in one[tag].value]
    return found


def _same(name: str, expected: str | tuple[str, ...], found: str | tuple[str, ...]) -> Check:
    if expected == found:
        return Check(name, True, "as expected")
    shown = " ".join(found)[:12] if isinstance(found, tuple) else found[:12]
    return Check(name, False, f"found another: {shown or 'none'}")
