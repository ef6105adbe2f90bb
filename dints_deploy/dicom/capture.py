"""Write pictures of a result as Secondary Capture (PS3.3 A.8.1): key slices with the mask drawn on them.

The slices are shown as the source has them, rows down and columns to the right, pixels in true proportion; letters at
the left and upper border say which side of the patient is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset

from dints_deploy.dicom.header import SliceHeader
from dints_deploy.dicom.objects import building, encoded, stamp, write_checked
from dints_deploy.dicom.result import DicomResult
from dints_deploy.dicom.selfcheck import check_values

SC_CLASS: Final = "1.2.840.10008.5.1.4.1.1.7"

KEY_SLICES: Final = 6
ACROSS: Final = 3
"""Pictures in a row."""

TILE: Final = 320
"""Pixels of the longer side of a picture."""

GAP: Final = 8
LINE: Final = 22
DISPLAY_PERCENTILES: Final = (1.0, 99.0)
FILL: Final = 0.3
"""Opacity of the inside of a structure; its border is drawn in full colour."""

BACKGROUND: Final = (18, 18, 20)
TEXT: Final = (235, 235, 235)
WARNING: Final = (255, 190, 90)
LETTERS: Final = (("L", "R"), ("P", "A"), ("H", "F"))
"""Ends of the patient's x, y and z axis in LPS (PS3.3 C.7.6.1.1.1)."""


def write_sc(result: DicomResult, path: Path) -> Path:
    """Write the pictures as one colour image and read it back before it gets its name.

    Raises:
        OutputError: `output-object`, `output-selfcheck`, `output-unwritable`, `disk-full`.
        ScanRefused: the source cannot be decoded any more.
    """
    sheet = render(result)
    with building("secondary capture"):
        picture = build_sc(result, sheet)
        data = encoded(picture)
    return write_checked(path, data, lambda written: check_values(written, picture, "secondary capture"))


def build_sc(result: DicomResult, sheet: NDArray[np.uint8]) -> Dataset:
    """Return the Secondary Capture of a picture (rows, columns, 3)."""
    picture = Dataset()
    picture.SOPClassUID = SC_CLASS
    picture.Modality = "OT"
    picture.ConversionType = "WSD"
    picture.ImageType = ["DERIVED", "SECONDARY"]
    picture.PatientOrientation = []
    picture.Laterality = ""  # of a body part that may be paired: unknown (PS3.3 C.7.3.1, type 2C)
    picture.ContentDate, picture.ContentTime = result.when.strftime("%Y%m%d"), result.when.strftime("%H%M%S")
    picture.BurnedInAnnotation = "NO"  # nothing that identifies the patient is drawn (PS3.3 C.7.6.1.1)
    picture.ImageComments = result.entry.research_use
    picture.DerivationDescription = f"{result.provenance.entry} {result.provenance.version} on key slices"
    picture.SourceImageSequence = [_source(result.planes[place].header) for place in key_slices(result)]
    picture.SamplesPerPixel, picture.PhotometricInterpretation, picture.PlanarConfiguration = 3, "RGB", 0
    picture.Rows, picture.Columns = sheet.shape[:2]
    picture.BitsAllocated = picture.BitsStored = 8
    picture.HighBit, picture.PixelRepresentation = 7, 0
    data = sheet.tobytes()
    picture.add_new("PixelData", "OB", data + b"\0" * (len(data) % 2))
    return stamp(picture, result, "sc", f"Pictures {result.entry.name}")


def _source(header: SliceHeader) -> Dataset:
    """Name the image that a picture shows (PS3.3 C.7.6.1.1.4)."""
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    if header.layout.NumberOfFrames > 1:
        item.ReferencedFrameNumber = header.frame + 1
    return item


def render(result: DicomResult) -> NDArray[np.uint8]:
    """Return the sheet (rows, columns, 3): key slices, legend with volumes, the research-use line."""
    places = key_slices(result)
    slices = result.volume.source_values(places)  # (places, rows, columns)
    low, high = np.percentile(slices, DISPLAY_PERCENTILES)
    tiles = [_tile(result, place, values, (low, high)) for place, values in zip(places, slices, strict=True)]
    width = max(tile.width for tile in tiles)
    height = max(tile.height for tile in tiles) + LINE
    lines = len(result.entry.labels) + 2
    across, down = min(ACROSS, len(tiles)), -(-len(tiles) // ACROSS)
    size = max(640, across * (width + GAP) + GAP), down * (height + GAP) + GAP + lines * LINE + GAP
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, (place, tile) in enumerate(zip(places, tiles, strict=True)):
        x, y = GAP + number % ACROSS * (width + GAP), GAP + number // ACROSS * (height + GAP)
        draw.text((x, y), f"slice {place + 1} of {len(result.planes)}", fill=TEXT, font=_font(14))
        sheet.paste(tile, (x, y + LINE))
    _legend(draw, down * (height + GAP) + GAP, result)
    return np.asarray(sheet)


def key_slices(result: DicomResult) -> list[int]:
    """Return the planes to show: the fullest, and others spread evenly over those with a structure; all when empty."""
    areas = np.count_nonzero(result.segments, axis=(1, 2))
    candidates = np.flatnonzero(areas) if areas.any() else np.arange(len(areas))
    spread = np.rint(np.linspace(0, len(candidates) - 1, min(KEY_SLICES, len(candidates)))).astype(int)
    chosen = candidates[spread]
    fullest = int(areas.argmax())
    if areas.any() and fullest not in chosen:
        chosen[np.abs(chosen - fullest).argmin()] = fullest
    return sorted(int(place) for place in chosen)


def _tile(result: DicomResult, index: int, values: NDArray[np.float32], window: tuple[float, float]) -> Image.Image:
    low, high = window
    plane, segments = result.planes[index], result.segments[index]
    height, width = values.shape[0] * plane.between_rows, values.shape[1] * plane.between_columns
    scale = TILE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    grey = (np.clip((values - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)
    shown = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR), dtype=np.float32)
    colour = np.repeat(shown[..., np.newaxis], 3, axis=2)  # (rows, columns, 3)
    drawn = np.asarray(Image.fromarray(segments.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    for number, label in enumerate(result.entry.labels, start=1):
        inside = drawn == number
        colour[inside] = (1 - FILL) * colour[inside] + FILL * np.array(label.colour)
        colour[_border(inside)] = label.colour
    tile = Image.fromarray(colour.astype(np.uint8))
    draw = ImageDraw.Draw(tile)
    places = (((4, tile.height // 2 - 8), plane.row), ((tile.width // 2 - 4, 3), plane.column))
    for place, direction in places:
        letter = side(direction, start=True)
        draw.text(place, letter, fill=TEXT, font=_font(13), stroke_width=2, stroke_fill=BACKGROUND)
    return tile


def side(direction: Sequence[float], *, start: bool) -> str:
    """Return the letter of the patient's side that a direction (LPS) comes from, or goes to."""
    axis = int(np.abs(direction).argmax())
    towards_first = (direction[axis] > 0) is not start
    return LETTERS[axis][0 if towards_first else 1]


def _border(inside: NDArray[Any]) -> NDArray[np.bool_]:
    """Return the pixels of a region that touch its outside along rows or columns."""
    padded = np.pad(inside, 1)
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    border: NDArray[np.bool_] = inside & ~core
    return border


def _legend(draw: ImageDraw.ImageDraw, y: int, result: DicomResult) -> None:
    for number, label in enumerate(result.entry.labels, start=1):
        found = f"{result.volumes_ml[label.id]:.2f} mL" if number in result.present else "not found"
        draw.rectangle((GAP, y + 3, GAP + 14, y + 17), fill=label.colour)
        draw.text((GAP + 24, y), f"{label.name}: {found}", fill=TEXT, font=_font(14))
        y += LINE
    draw.text((GAP, y), f"{result.provenance.entry} {result.provenance.version}", fill=TEXT, font=_font(13))
    draw.text((GAP, y + LINE), result.entry.research_use, fill=WARNING, font=_font(14))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
