"""One self-contained HTML page about a result: pictures, volumes, provenance, the research-use line. No scripts."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import Any, Final

from PIL import Image

from dints_deploy.catalog.entry import RESEARCH_USE, Entry

PAGE: Final = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1.5rem; max-width: 70rem; color: #1b1b1f; }
h1 { font-size: 1.3rem; margin: 0 0 .3rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
.use { background: #fff3d6; border-left: .3rem solid #e09a1a; padding: .5rem .8rem; margin: .8rem 0; }
.planes { display: flex; flex-wrap: wrap; gap: .8rem; } figure { margin: 0; }
figcaption { color: #555; font-size: .9rem; }
img { display: block; background: #000; image-rendering: auto; max-width: 100%; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .25rem .9rem .25rem 0; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } tr + tr { border-top: 1px solid #ddd; }
.swatch { display: inline-block; width: .9rem; height: .9rem; border-radius: .2rem; vertical-align: -.1rem; }
code { overflow-wrap: anywhere; font-size: .85rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$intended</p>
<p class="use" id="research-use"><strong>$use</strong> $not_for</p>
$scan
<h2>Pictures</h2>
<div class="planes">
$pictures
</div>
<p>Axial and coronal: the patient's right is on the left. Sagittal: anterior is on the left.</p>
<h2>Volumes</h2>
<table id="volumes"><tr><th>Structure</th><th>mL</th></tr>
$volumes
</table>
<h2>Provenance</h2>
<table id="provenance">
$provenance
</table>
</body>
</html>
""")


def render_page(record: Mapping[str, Any], entry: Entry, pictures: Sequence[tuple[str, Image.Image]]) -> str:
    """Return the page as text; every value is escaped.

    Args:
        record: from `describe`.
        entry: gives colours and words.
        pictures: (caption, picture).
    """
    colours = {label.id: label.colour for label in entry.labels}
    volumes = "\n".join(_volume_row(s["name"], s["volume_ml"], colours[s["id"]]) for s in record["structures"])
    figures = "\n".join(
        f'<figure><img alt="{escape(caption)}" width="{image.width}" height="{image.height}" src="{_data_url(image)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, image in pictures
    )
    parts = ("model", "engine", "parity", "scan", "software", "seconds")
    rows = [row for part in parts for row in _rows(part, record[part])]
    return PAGE.substitute(
        title=escape(entry.title),
        intended=escape(entry.intended_use),
        use=escape(RESEARCH_USE),
        not_for=escape(f"Not for: {entry.not_for}" if entry.not_for else ""),
        scan=_scan(record.get("series", {})),
        pictures=figures,
        volumes=volumes,
        provenance="\n".join(f"<tr><th>{escape(k)}</th><td><code>{escape(v)}</code></td></tr>" for k, v in rows),
    )


def _scan(series: Mapping[str, Any]) -> str:
    """Return which DICOM series was read, and what was unusual about it; nothing for NIfTI."""
    lines = [f"Taken: {line}" for line in series.get("taken", [])]
    lines += [line[:1].upper() + line[1:] for line in series.get("handled", [])]
    items = "\n".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<h2>Scan</h2>\n<ul id="scan">\n{items}\n</ul>' if lines else ""


def _volume_row(name: str, volume_ml: float, colour: tuple[int, int, int]) -> str:
    swatch = f'<span class="swatch" style="background: rgb{colour}"></span>'
    return f'<tr><td>{swatch} {escape(name)}</td><td class="number">{volume_ml:.3f}</td></tr>'


def _rows(name: str, value: object) -> list[tuple[str, str]]:
    """Return a nested record as (dotted name, text) rows."""
    if isinstance(value, Mapping):
        return [row for key, inner in value.items() for row in _rows(f"{name}.{key}", inner)]
    if isinstance(value, list):
        return [(name, ", ".join(str(v) for v in value))]
    return [(name, str(value))]


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
