"""What one object says about its place in a study, read from its header: for intake, completeness and routing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dints_deploy.dicom.attributes import Attributes
from dints_deploy.dicom.bounded import DEFAULT_LIMITS, UNDEFINED_LENGTH, Limits, open_regular, quiet, read_header
from dints_deploy.dicom.parse import CLASS_KEYS, INSTANCE_KEYS
from dints_deploy.dicom.series import DICOMDIR_CLASS
from dints_deploy.errors import ScanRefused

COUNT_KEYS: Final = ("NumberOfSeriesRelatedInstances", "ImagesInAcquisition", "NumberOfSlices")
"""Attributes that say how many instances a series has, the surest first (PS3.4 C.3.4, PS3.3 C.7.6.1, C.8.9.4)."""

SEQUENCE_DELIMITER: Final = b"\xfe\xff\xdd\xe0\0\0\0\0"
"""Ends encapsulated pixel data (PS3.5 A.4); what may follow it is padding."""

TAIL_BYTES: Final = 1 << 20
"""How far from the end the delimiter is looked for."""


@dataclass(frozen=True)
class Instance:
    """One object as its header describes it. Attribute names are DICOM keywords where they are verbatim.

    Attributes:
        frames: image planes in the object; 0 where it is no image.
        expected: how many instances the series has at least, as the header says; None where it does not.
    """

    SOPClassUID: str
    SOPInstanceUID: str
    StudyInstanceUID: str
    SeriesInstanceUID: str
    TransferSyntaxUID: str
    Modality: str = ""
    InstanceNumber: int | None = None
    ImageOrientationPatient: tuple[float, ...] | None = None
    ImagePositionPatient: tuple[float, ...] | None = None
    frames: int = 0
    expected: int | None = None


def identify(path: Path, *, limits: Limits = DEFAULT_LIMITS) -> Instance:
    """Read what an object says about itself, without its pixels.

    Raises:
        ScanRefused: as `read_header`; `dicom-no-uid` where the object names no instance, series or study.
    """
    with quiet():
        raw = read_header(path, limits=limits)
        read = Attributes([raw.dataset, raw.meta])
        uids = {key: read.text(key) for key in ("StudyInstanceUID", "SeriesInstanceUID")}
        uids |= {"SOPInstanceUID": read.first_text(*INSTANCE_KEYS), "SOPClassUID": read.first_text(*CLASS_KEYS)}
        if uids["SOPClassUID"] == DICOMDIR_CLASS:
            raise ScanRefused("dicom-not-dicom", "expected an object of a study, found a DICOMDIR, an index of others")
        if missing := sorted(key for key, uid in uids.items() if not uid):
            raise ScanRefused("dicom-no-uid", f"expected {' and '.join(missing)}, found none: send the object again")
        return Instance(
            **uids,
            TransferSyntaxUID=raw.TransferSyntaxUID,
            Modality=read.text("Modality").upper(),
            InstanceNumber=read.integer("InstanceNumber", low=-(2**31), high=2**31),
            ImageOrientationPatient=read.numbers("ImageOrientationPatient", count=6),
            ImagePositionPatient=read.numbers("ImagePositionPatient", count=3),
            frames=(read.integer("NumberOfFrames", low=1) or 1) if raw.pixel_tag else 0,
            expected=next((n for n in (read.integer(key, low=1) for key in COUNT_KEYS) if n is not None), None),
        )


def check_whole(path: Path, *, limits: Limits = DEFAULT_LIMITS) -> None:
    """Refuse a file that ends before its pixels do: it may still be on its way.

    Raises:
        ScanRefused: `dicom-truncated`; as `read_header`.
    """
    with quiet():
        raw = read_header(path, limits=limits)
    if raw.pixel_length == UNDEFINED_LENGTH:
        with open_regular(path) as file:
            file.seek(max(raw.pixel_offset if raw.available >= 0 else 0, path.stat().st_size - TAIL_BYTES))
            ended = raw.available < 0 or SEQUENCE_DELIMITER in file.read()
    else:
        ended = raw.available < 0 or raw.available >= raw.pixel_length
    if not ended:
        raise ScanRefused("dicom-truncated", "expected whole pixel data, found the end of the file: copy it again")
