"""From a data set to plane headers: one for a single-frame image, one per frame for an enhanced multi-frame image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from pydicom.dataset import Dataset

from dints_deploy.dicom.attributes import Attributes
from dints_deploy.dicom.bounded import DEFAULT_LIMITS, UNDEFINED_LENGTH, Limits, RawHeader, too_many_voxels
from dints_deploy.dicom.decoder import PLUGINS
from dints_deploy.dicom.findings import escaped
from dints_deploy.dicom.header import NATIVE, PixelLayout, SliceHeader
from dints_deploy.errors import ScanRefused

SLICE_CLASSES: Final = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.2.1": "Enhanced CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "Legacy Converted Enhanced CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.4.1": "Enhanced MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "Legacy Converted Enhanced MR",
    "1.2.840.10008.5.1.4.1.1.128": "PET",
    "1.2.840.10008.5.1.4.1.1.128.1": "Legacy Converted Enhanced PET",
    "1.2.840.10008.5.1.4.1.1.130": "Enhanced PET",
    "1.2.840.10008.5.1.4.1.1.13.1.1": "X-Ray 3D Angiographic",
    "1.2.840.10008.5.1.4.1.1.13.1.2": "X-Ray 3D Craniofacial",
}
"""SOP classes whose planes have a place in the patient (PS3.4 B.5)."""

CLASS_KEYS: Final = ("SOPClassUID", "MediaStorageSOPClassUID")
INSTANCE_KEYS: Final = ("SOPInstanceUID", "MediaStorageSOPInstanceUID")
"""An attribute, and where the file meta information repeats it (PS3.10 7.1): some anonymisers empty the first only."""

PLANE_GROUPS: Final = (
    "PixelMeasuresSequence", "PlanePositionSequence", "PlaneOrientationSequence",
    "PixelValueTransformationSequence", "FrameContentSequence", "MRImageFrameTypeSequence", "CTImageFrameTypeSequence",
    "PETFrameTypeSequence", "MREchoSequence", "MRDiffusionSequence", "CardiacSynchronizationSequence",
)  # fmt: skip
"""Functional group macros (PS3.3 C.7.6.16.2) whose attributes a plane needs."""

VOLUME_KEYS: Final = (
    "AcquisitionNumber", "TemporalPositionIdentifier", "TemporalPositionIndex", "EchoNumbers", "EchoTime",
    "EffectiveEchoTime", "InversionTime", "FlipAngle", "DiffusionBValue", "TriggerTime",
    "NominalPercentageOfCardiacPhase", "StackID",
)  # fmt: skip
"""Attributes by which one series holds several volumes at the same place."""


def parse(path: Path, raw: RawHeader, *, limits: Limits = DEFAULT_LIMITS) -> tuple[SliceHeader, ...]:
    """Return the planes of a file; none for an object that is not a stack of slices.

    Raises:
        ScanRefused: as `check_layout`; or `dicom-attribute` where frames lack their functional groups.
    """
    whole = Attributes([raw.dataset, raw.meta])
    if whole.first_text(*CLASS_KEYS) not in SLICE_CLASSES:
        return ()
    layout = check_layout(_layout(whole, raw, limits), limits=limits)
    shared, per_frame = _functional_groups(whole, layout.NumberOfFrames)
    frames = range(layout.NumberOfFrames)
    rest = [*shared, raw.dataset, raw.meta]
    sets = [[*per_frame[frame], *rest] if per_frame else rest for frame in frames]
    planes = tuple(_plane(path, frame, layout, Attributes(sets[frame])) for frame in frames)
    return tuple(replace(plane, invalid=(*whole.invalid, *plane.invalid)) for plane in planes)


def check_layout(layout: PixelLayout, *, limits: Limits = DEFAULT_LIMITS) -> PixelLayout:
    """Return `layout` if the file can hold what it claims.

    Raises:
        ScanRefused: `dicom-attribute`, `dicom-too-large`, `dicom-truncated`, `dicom-syntax`, `dicom-pixels`.
    """
    if not layout.vr or layout.available == 0:
        raise ScanRefused("dicom-truncated", "expected pixel data, found the end of the file: send it again")
    _check_syntax(layout)
    _check_claims(layout, limits)
    expected = layout.frame_bytes * layout.NumberOfFrames
    if layout.length < 0:  # encapsulated: the frames are found, and bounded, when they are decoded
        return layout
    if layout.length < expected:
        found = f"the pixel element has {layout.length}"
        raise ScanRefused("dicom-pixels", f"expected {expected} bytes of pixels, {found}: send the file again")
    if 0 <= layout.available < expected:
        found = f"found {layout.available} before the end of the file"
        raise ScanRefused("dicom-truncated", f"expected {expected} bytes of pixels, {found}: send the file again")
    return layout


def _check_syntax(layout: PixelLayout) -> None:
    """Refuse what nothing decodes, and pixels that are not stored the way the transfer syntax says (PS3.5 A)."""
    syntax, encapsulated = layout.TransferSyntaxUID, layout.length < 0
    if syntax not in NATIVE and syntax not in PLUGINS:
        found = f"found {escaped(syntax[:64])}"
        raise ScanRefused("dicom-syntax", f"expected a transfer syntax of still images, {found}: convert the series")
    if encapsulated == (syntax in NATIVE):
        raise ScanRefused(
            "dicom-pixels", "expected pixels as the transfer syntax says, found others: repair the header"
        )


def _check_claims(layout: PixelLayout, limits: Limits) -> None:
    needed = {"Rows": layout.Rows, "Columns": layout.Columns, "NumberOfFrames": layout.NumberOfFrames}
    for keyword, value in needed.items():
        highest = limits.frames if keyword == "NumberOfFrames" else limits.rows_columns
        if value < 1:
            raise ScanRefused("dicom-attribute", f"expected {keyword} of at least 1, found none: repair the header")
        if value > highest:
            raise ScanRefused("dicom-too-large", f"expected {keyword} of at most {highest}, found {value}: not a slice")
    bits = (layout.BitsAllocated, layout.BitsStored, layout.HighBit)
    if bits[0] not in (8, 16, 32) or not 1 <= bits[1] <= bits[0] or bits[2] != bits[1] - 1:
        raise ScanRefused(
            "dicom-attribute",
            f"expected 8, 16 or 32 bits allocated, the lowest of them stored, found allocated {bits[0]}, stored "
            f"{bits[1]}, high bit {bits[2]}: repair the header",
        )
    total = layout.Rows * layout.Columns * layout.NumberOfFrames * 4
    if total > limits.stack_bytes:
        raise too_many_voxels(total, limits)


def _layout(whole: Attributes, raw: RawHeader, limits: Limits) -> PixelLayout:
    stored = whole.integer("BitsStored") or 0
    high_bit = whole.integer("HighBit")
    return PixelLayout(
        TransferSyntaxUID=raw.TransferSyntaxUID,
        Rows=whole.integer("Rows") or 0,
        Columns=whole.integer("Columns") or 0,
        NumberOfFrames=1 if whole.value("NumberOfFrames") is None else whole.integer("NumberOfFrames") or 0,
        SamplesPerPixel=whole.integer("SamplesPerPixel", low=1, high=4) or 1,
        BitsAllocated=whole.integer("BitsAllocated") or 0,
        BitsStored=stored,
        HighBit=stored - 1 if high_bit is None else high_bit,
        PixelRepresentation=whole.integer("PixelRepresentation", high=1) or 0,
        PhotometricInterpretation=whole.text("PhotometricInterpretation").upper(),
        vr=raw.pixel_vr if raw.pixel_tag == 0x7FE00010 else "",
        offset=raw.pixel_offset,
        length=-1 if raw.pixel_length == UNDEFINED_LENGTH else raw.pixel_length,
        available=raw.available,
    )


def _functional_groups(whole: Attributes, frames: int) -> tuple[list[Dataset], list[list[Dataset]]]:
    """Return the macros' items shared by all frames, and those of each frame (PS3.3 C.7.6.16.1)."""
    per_frame = whole.items("PerFrameFunctionalGroupsSequence")
    shared = whole.items("SharedFunctionalGroupsSequence")
    if not per_frame and not shared:
        return [], []
    if len(per_frame) != frames:
        raise ScanRefused(
            "dicom-attribute",
            f"expected functional groups for {frames} frames, found them for {len(per_frame)}: repair the header",
        )
    return (_macros(shared[0]) if shared else []), [_macros(item) for item in per_frame]


def _macros(groups: Dataset) -> list[Dataset]:
    """Return the first items of the macros that a plane needs."""
    attributes = Attributes([groups])
    return [item for keyword in PLANE_GROUPS for item in attributes.items(keyword)[:1]]


def _plane(path: Path, frame: int, layout: PixelLayout, read: Attributes) -> SliceHeader:
    keys = [(keyword, read.text(keyword)) for keyword in VOLUME_KEYS]
    image_type = read.texts("FrameType") or read.texts("ImageType")
    plane = SliceHeader(
        path=path,
        frame=frame,
        layout=layout,
        SOPInstanceUID=read.first_text(*INSTANCE_KEYS),
        SOPClassUID=read.first_text(*CLASS_KEYS),
        Modality=read.text("Modality"),
        InstanceNumber=read.integer("InstanceNumber", low=-(2**31), high=2**31),
        FrameOfReferenceUID=read.text("FrameOfReferenceUID"),
        ImageType=image_type,
        ImageOrientationPatient=read.numbers("ImageOrientationPatient", count=6),
        ImagePositionPatient=read.numbers("ImagePositionPatient", count=3),
        PixelSpacing=read.numbers("PixelSpacing", count=2),
        SliceThickness=read.number("SliceThickness"),
        SpacingBetweenSlices=read.number("SpacingBetweenSlices"),
        GantryDetectorTilt=read.number("GantryDetectorTilt"),
        RescaleSlope=read.number("RescaleSlope"),
        RescaleIntercept=read.number("RescaleIntercept"),
        RescaleType=read.text("RescaleType").upper(),
        modality_lut=bool(read.items("ModalityLUTSequence")),
        PixelPaddingValue=read.integer("PixelPaddingValue", low=-(2**31), high=2**32),
        PixelPaddingRangeLimit=read.integer("PixelPaddingRangeLimit", low=-(2**31), high=2**32),
        lossy=read.text("LossyImageCompression") == "01",
        volume_of=(*(key for key in keys if key[1]), ("ImageType", "/".join(image_type))),
    )
    return replace(plane, invalid=tuple(read.invalid))
