"""What the headers say about the images themselves, wherever they lie: kind of image, pixel values, completeness."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from dints_deploy.dicom.findings import Finding, finding
from dints_deploy.dicom.header import SliceHeader

GREY: Final = ("MONOCHROME1", "MONOCHROME2")
HOUNSFIELD_CLASSES: Final = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
"""CT: rescale slope and intercept are required (PS3.3 C.8.2.1.1.2, C.8.15.3.10)."""

HOUNSFIELD_TYPES: Final = ("", "HU", "HU_MOD", "US")
"""Rescale types (PS3.3 C.11.1.1.2) of CT that are, or where nothing is specified mean, Hounsfield units."""

LARGEST_VALUE: Final = 1e12
"""Slopes and intercepts beyond this are no physical values, and overflow float32."""


def check_content(slices: Sequence[SliceHeader]) -> Iterator[Finding]:
    """Yield what is remarkable about the headers of `slices`, wherever the planes lie."""
    for code, message, concerns in CHECKS:
        if concerned := _where(slices, concerns):
            yield finding(code, message, concerned)
    if len({rescale(header) for header in slices}) > 1:
        yield finding("dicom-rescale-varies", "each slice is rescaled by its own slope and intercept", _all(slices))
    if len({(h.layout.PhotometricInterpretation, h.layout.SamplesPerPixel) for h in slices}) > 1:
        message = "expected one photometric interpretation, found several: keep one kind of image"
        yield finding("dicom-mixed-pixels", message, _all(slices))
    if len({_stored(header) for header in slices}) > 1:
        yield finding("dicom-mixed-bits", "slices differ in bits or sign: each is decoded by its own", _all(slices))
    yield from _invalid(slices)


def rescale(header: SliceHeader) -> tuple[float, float]:
    """Return slope and intercept (PS3.3 C.11.1.1.2); one and zero where the header has neither."""
    slope, intercept = header.RescaleSlope, header.RescaleIntercept
    return (1.0 if slope is None else slope, 0.0 if intercept is None else intercept)


def _where(slices: Sequence[SliceHeader], concerns: Callable[[SliceHeader], bool]) -> tuple[int, ...]:
    return tuple(index for index, header in enumerate(slices) if concerns(header))


def _all(slices: Iterable[SliceHeader]) -> tuple[int, ...]:
    return tuple(range(len(tuple(slices))))


def _stored(header: SliceHeader) -> tuple[int, int, int]:
    return header.layout.BitsAllocated, header.layout.BitsStored, header.layout.PixelRepresentation


def _invalid(slices: Sequence[SliceHeader]) -> Iterator[Finding]:
    """Yield one finding for each attribute that is there and makes no sense."""
    for keyword in sorted({keyword for header in slices for keyword in header.invalid} - OPTIONAL):
        concerned = tuple(index for index, header in enumerate(slices) if keyword in header.invalid)
        message = f"expected a meaningful {keyword}, found another value: repair the header"
        yield finding("dicom-attribute", message, concerned)


def _is_grey(header: SliceHeader) -> bool:
    return header.layout.PhotometricInterpretation in GREY and header.layout.SamplesPerPixel == 1


def _rescales_badly(header: SliceHeader) -> bool:
    slope, intercept = rescale(header)
    return slope == 0 or abs(slope) > LARGEST_VALUE or abs(intercept) > LARGEST_VALUE or _lacks_hounsfield(header)


def _lacks_hounsfield(header: SliceHeader) -> bool:
    missing = header.RescaleSlope is None or header.RescaleIntercept is None
    return missing and (header.SOPClassUID in HOUNSFIELD_CLASSES or header.RescaleSlope is not header.RescaleIntercept)


def _is_no_hounsfield(header: SliceHeader) -> bool:
    """Say whether a CT holds another quantity: an iodine or effective atomic number map, an electron density."""
    return header.SOPClassUID in HOUNSFIELD_CLASSES and header.RescaleType not in HOUNSFIELD_TYPES


def _is_too_long(header: SliceHeader) -> bool:
    """Say whether native pixel data is longer than its frames and one byte of padding (PS3.5 8.1.1)."""
    layout = header.layout
    return layout.length > layout.frame_bytes * layout.NumberOfFrames + 1


OPTIONAL: Final = frozenset({"InstanceNumber", "SliceThickness", "SpacingBetweenSlices", "GantryDetectorTilt"})
"""Attributes that only serve notes: without a meaningful value they are as if absent."""

CHECKS: Final[tuple[tuple[str, str, Callable[[SliceHeader], bool]], ...]] = (
    (
        "dicom-localizer",
        "expected slices of a volume, found a localizer: choose another series",
        lambda header: "LOCALIZER" in header.ImageType,
    ),
    (
        "dicom-mosaic",
        "expected one slice in each image, found mosaics of many: export the series unmosaiced",
        lambda header: "MOSAIC" in header.ImageType,
    ),
    (
        "dicom-photometric",
        "expected grey values (MONOCHROME2), found colour, a palette or several samples: choose another series",
        lambda header: not _is_grey(header),
    ),
    (
        "dicom-monochrome1",
        "expected MONOCHROME2, found inverted grey values (MONOCHROME1): accept them only if the entry was trained so",
        lambda header: header.layout.PhotometricInterpretation == "MONOCHROME1",
    ),
    (
        "dicom-rescale",
        "expected a rescale slope other than zero and an intercept, found none or impossible ones: repair the header",
        _rescales_badly,
    ),
    (
        "dicom-rescale-type",
        "expected Hounsfield units, found a CT of another quantity: choose the series of the images themselves",
        _is_no_hounsfield,
    ),
    (
        "dicom-modality-lut",
        "expected rescale slope and intercept, found a modality look-up table: export the series without one",
        lambda header: header.modality_lut,
    ),
    (
        "dicom-excess-pixels",
        "expected as many bytes of pixels as rows, columns and frames say, found more: check rows and columns",
        _is_too_long,
    ),
    (
        "dicom-lossy",
        "the pixels went through lossy compression",
        lambda header: header.lossy,
    ),
    (
        "dicom-padding",
        "pixels outside the field of view have a padding value, which is kept",
        lambda header: header.PixelPaddingValue is not None,
    ),
)  # fmt: skip
"""Code, message, and whether it concerns a slice."""
