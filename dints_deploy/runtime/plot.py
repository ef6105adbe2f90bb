"""A picture of an evaluation: one dot per case, a row per structure and score, the mean as a line."""

from __future__ import annotations

from typing import Final

from PIL import Image, ImageDraw, ImageFont

from dints_deploy.catalog.entry import RESEARCH_USE, Entry
from dints_deploy.runtime.evaluate import Evaluation
from dints_deploy.runtime.metrics import Score

WIDTH: Final = 900
LEFT: Final = 250
RIGHT: Final = 40
ROW: Final = 56
TOP: Final = 44
INK: Final = (30, 30, 34)
FAINT: Final = (205, 205, 210)
TICKS: Final = 5


def draw_scores(result: Evaluation, spec: Entry, title: str) -> Image.Image:
    """Draw Dice and NSD of every case; the axis starts at the tenth below the lowest score."""
    rows = [
        (
            f"{label.name}, {name}",
            label.colour,
            [getattr(case, attribute)[label.value] for case in result.cases.values()],
        )
        for label in spec.labels
        for name, attribute in (("Dice", "dice"), (f"NSD {label.nsd_tolerance:g} mm", "nsd"))
    ]
    lowest = min((s for _, _, scores in rows for s in scores if s is not None), default=0.0)
    start = int(lowest * 10) / 10 if lowest < 1 else 0.9
    image = Image.new("RGB", (WIDTH, TOP + ROW * len(rows) + 70), "white")
    draw = ImageDraw.Draw(image)
    draw.text((16, 12), title, fill=INK, font=ImageFont.load_default(16))
    _axis(draw, start, TOP + ROW * len(rows))
    for number, (name, colour, scores) in enumerate(rows):
        _row(draw, TOP + ROW * number + ROW // 2, name, colour, scores, start)
    draw.text((16, image.height - 28), RESEARCH_USE, fill=(170, 100, 0), font=ImageFont.load_default(13))
    return image


def _place(score: float, start: float) -> float:
    return LEFT + (score - start) / (1 - start) * (WIDTH - LEFT - RIGHT)


def _axis(draw: ImageDraw.ImageDraw, start: float, bottom: int) -> None:
    for tick in range(TICKS + 1):
        value = start + (1 - start) * tick / TICKS
        x = _place(value, start)
        draw.line((x, TOP, x, bottom), fill=FAINT)
        draw.text((x - 12, bottom + 4), f"{value:.2f}", fill=INK, font=ImageFont.load_default(12))


def _row(
    draw: ImageDraw.ImageDraw, y: int, name: str, colour: tuple[int, int, int], scores: list[Score], start: float
) -> None:
    present = [score for score in scores if score is not None]
    draw.text((16, y - 10), name, fill=INK, font=ImageFont.load_default(14))
    for number, score in enumerate(present):
        x, spread = _place(score, start), y + (number % 7 - 3) * 4  # neighbours apart, so that dots stay visible
        draw.ellipse((x - 3, spread - 3, x + 3, spread + 3), fill=colour)
    if present:
        mean = sum(present) / len(present)
        x = _place(mean, start)
        draw.line((x, y - 22, x, y + 22), fill=INK, width=2)
        draw.text((x + 5, y - 25), f"{mean:.3f}", fill=INK, font=ImageFont.load_default(12))
