"""Pictures of a result: three planes through the middle of the structures, radiological view, with legend.

Columns are image, image with prediction and, where there is one, image with the reader's label. The patient's right is
on the left of an axial or coronal picture, anterior is on the left of a sagittal one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dints_deploy.catalog.entry import RESEARCH_USE, Entry
from dints_deploy.imaging.geometry import orient
from dints_deploy.imaging.volume import Volume

TILE: Final = 300
"""Pixels of the longer side of one picture."""
GAP: Final = 12
HEADER: Final = 30
OPACITY: Final = 0.45
DISPLAY_PERCENTILES: Final = (1.0, 99.0)
BACKGROUND: Final = (18, 18, 20)
TEXT: Final = (235, 235, 235)
FAINT: Final = (200, 200, 205)


@dataclass(frozen=True)
class Plane:
    """How one plane is cut from RAS voxels: the fixed axis, and which axes run right and down, both reversed."""

    name: str
    fixed: int
    right: int
    down: int
    sides: tuple[str, str]


PLANES: Final = (
    Plane("axial", fixed=2, right=0, down=1, sides=("R", "L")),
    Plane("coronal", fixed=1, right=0, down=2, sides=("R", "L")),
    Plane("sagittal", fixed=0, right=1, down=2, sides=("A", "P")),
)


def render(scan: Volume, columns: Sequence[tuple[str, Volume | None]], entry: Entry, caption: str) -> Image.Image:
    """Draw all planes as one picture.

    Args:
        scan: channel 0 is shown.
        columns: (title, label map on the scan's grid, or None for the image alone).
        entry: gives the structures' names and colours.
        caption: a line below the pictures; the research-use line follows it.
    """
    shown = next((labels for _, labels in columns if labels is not None), None)
    tiles = [[picture(scan, labels, entry, plane, middle_of=shown) for _, labels in columns] for plane in PLANES]
    width = max(sum(t.width for t in row) + GAP * (len(row) + 1) for row in tiles)
    width = max(width, 640)
    footer = 26 * (len(entry.labels) + 2) + GAP
    height = HEADER + sum(max(t.height for t in row) + HEADER for row in tiles) + footer
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    y = GAP // 2
    for plane, row in zip(PLANES, tiles, strict=True):
        x = GAP
        for (title, _), tile in zip(columns, row, strict=True):
            draw.text((x, y), f"{plane.name} - {title}", fill=TEXT, font=_font(15))
            sheet.paste(tile, (x, y + HEADER - 6))
            x += tile.width + GAP
        y += max(t.height for t in row) + HEADER
    _legend(draw, y + GAP, entry, caption)
    return sheet


def _legend(draw: ImageDraw.ImageDraw, y: int, entry: Entry, caption: str) -> None:
    for label in entry.labels:
        draw.rectangle((GAP, y + 3, GAP + 14, y + 17), fill=label.colour)
        draw.text((GAP + 24, y), label.name, fill=TEXT, font=_font(15))
        y += 26
    draw.text((GAP, y), caption, fill=FAINT, font=_font(13))
    draw.text((GAP, y + 26), RESEARCH_USE, fill=(255, 190, 90), font=_font(14))


def picture(
    scan: Volume, labels: Volume | None, entry: Entry, plane: Plane, *, middle_of: Volume | None
) -> Image.Image:
    """Draw one plane in true proportions, through the most labelled slice of `middle_of` (or the scan's middle)."""
    image, _ = orient(Volume(scan.data[:1], scan.affine))
    mask = None if labels is None else orient(labels)[0].data[0]
    at = _middle(image.shape, None if middle_of is None else orient(middle_of)[0].data[0], plane.fixed)
    grey = _cut(image.data[0].astype(np.float32), plane, at)
    low, high = np.percentile(image.data[0], DISPLAY_PERCENTILES)
    grey = np.clip((grey - low) / max(float(high - low), 1e-12), 0, 1) * 255
    colour = np.repeat(grey[..., np.newaxis], 3, axis=2)
    if mask is not None:
        cut = _cut(mask, plane, at)
        for label in entry.labels:
            inside = cut == label.value
            colour[inside] = (1 - OPACITY) * colour[inside] + OPACITY * np.array(label.colour)
    return _scaled(colour, image.grid.spacing, plane)


def _middle(shape: Sequence[int], mask: NDArray[Any] | None, axis: int) -> int:
    """Return the slice with the most labelled voxels, or the middle one."""
    if mask is None or not mask.any():
        return shape[axis] // 2
    others = tuple(a for a in range(3) if a != axis)
    return int(np.count_nonzero(mask, axis=others).argmax())


def _cut(voxels: NDArray[Any], plane: Plane, at: int) -> NDArray[Any]:
    """Return rows x columns of one slice, anterior and superior up, right and anterior left."""
    flat = np.take(voxels, at, axis=plane.fixed)  # the two other axes, in order
    # In every plane of PLANES, the axis that runs right comes first.
    upright: NDArray[Any] = flat.T[::-1, ::-1]
    return upright


def _scaled(colour: NDArray[Any], spacing: Sequence[float], plane: Plane) -> Image.Image:
    height_mm, width_mm = colour.shape[0] * spacing[plane.down], colour.shape[1] * spacing[plane.right]
    scale = TILE / max(height_mm, width_mm)
    size = max(1, round(width_mm * scale)), max(1, round(height_mm * scale))
    tile = Image.fromarray(colour.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(tile)
    left, right = plane.sides
    middle = tile.height // 2 - 8
    for x, side in ((4, left), (tile.width - 14, right)):
        draw.text((x, middle), side, fill=TEXT, font=_font(13), stroke_width=2, stroke_fill=(0, 0, 0))
    return tile


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
