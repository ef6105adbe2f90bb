"""The page of a result, in a real browser: what it shows is the record, and nothing in it runs or leaves the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dints_deploy.catalog.entry import RESEARCH_USE
from dints_deploy.imaging.volume import Grid
from tests.browser import Browser, chromium, counting_server
from tests.command import THRESHOLD, Machine, threshold_entry, write_scan
from tests.phantoms import affine, depth_in_ball
from tests.tiny_entry import label_fields

HOSTILE = (
    "</title></h1><script src={0}/a></script><script>document.body.remove()</script>"
    "<img src={0}/b onerror=\"document.title='taken'\"><style>@import '{0}/c'; #research-use {{display: none}}</style>"
    "${{x}} $title &amp; \"'"
)
LABEL = "<img src={0}/d><b>Part"
GRID = Grid((30, 36, 24), affine("LPS", (1, 1, 1.5), origin=(15, 18, -18)))
"""30 x 36 x 36 mm: x from -14.5 to 15.5, y from -17.5 to 18.5, z from -18.75 to 17.25."""
CENTRE, RADIUS = (4.0, -5.0, 3.0), 8.0
LEFTWARDS, BACKWARDS, DOWNWARDS = (15.5 - 4) / 30, (18.5 + 5) / 36, (17.25 - 3) / 36
"""Where the ball's centre lies, as shares of the way from right to left, front to back, and top to bottom."""
PICTURES = {
    "axial": (LEFTWARDS, BACKWARDS),
    "coronal": (LEFTWARDS, DOWNWARDS),
    "sagittal": (BACKWARDS, DOWNWARDS),
}
"""Picture -> where the ball must show, as shares of its width and height: right is left, anterior is left or up."""


@dataclass(frozen=True)
class Shown:
    """A page in a browser, the record beside it, what loading it asked for, and who was visited."""

    browser: Browser
    page: Path
    record: dict[str, Any]
    requests: list[str]
    visits: list[str]
    server: str


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """Segment a ball with an entry whose every word is hostile, and open the page."""
    folder = tmp_path_factory.mktemp("page")
    with counting_server() as (server, visits), chromium(folder) as browser:
        hostile = HOSTILE.format(server)
        machine = Machine(folder / "machine")
        label = label_fields(1) | {"name": LABEL.format(server)}
        words = {"title": hostile, "intended_use": hostile, "not_for": hostile}
        machine.add(threshold_entry("hostile", labels=[label], **words))
        scan = THRESHOLD + 10 * depth_in_ball(GRID, CENTRE, RADIUS)
        path = write_scan(folder / "scan.nii.gz", scan.astype(np.float32), GRID.affine)
        done = machine.segment(path, "-o", folder / "out", "--to", "nifti,html")
        assert done.code == 0, done.err
        page = folder / "out" / "scan_seg.html"
        browser.requests()
        browser.open(page)
        yield Shown(browser, page, done.cases[0], browser.requests(), visits, server)


def text_of(shown: Shown, selector: str) -> str:
    text: str = shown.browser.ask(f"return document.querySelector('{selector}').textContent")
    return text


def test_the_research_use_line_is_seen_without_scrolling_and_nothing_covers_it(shown: Shown) -> None:
    seen = shown.browser.ask("""
        const line = document.querySelector('#research-use'), box = line.getBoundingClientRect();
        const style = getComputedStyle(line);
        const top = document.elementFromPoint(box.left + box.width / 2, box.top + 12);
        return {text: line.innerText, height: box.height, bottom: box.bottom, screen: innerHeight,
                shown: style.display !== 'none' && style.visibility === 'visible' && style.opacity === '1',
                free: line.contains(top), size: parseFloat(style.fontSize)};
    """)
    assert seen["text"].startswith(RESEARCH_USE)
    assert seen["shown"]
    assert seen["free"]
    assert seen["size"] >= 12
    assert 0 < seen["height"] < seen["bottom"] <= seen["screen"]


def test_three_pictures_show_the_structure_in_its_colour_and_on_its_side(shown: Shown) -> None:
    pictures = shown.browser.ask("""
        return [...document.images].map(image => {
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
            let green = 0, x = 0, y = 0;
            for (let n = 0; n < data.length / 4; n++) {
                if (data[4 * n + 1] <= (data[4 * n] + data[4 * n + 2]) / 2 + 30) continue;
                green += 1;
                x += (n % canvas.width + 0.5) / canvas.width;
                y += (Math.floor(n / canvas.width) + 0.5) / canvas.height;
            }
            return {alt: image.alt, width: image.naturalWidth, complete: image.complete, x: x / green, y: y / green,
                    shown: image.getBoundingClientRect().width, share: green / (data.length / 4)};
        });
    """)
    assert [picture["alt"] for picture in pictures] == list(PICTURES)
    for picture in pictures:
        assert picture["complete"]
        assert picture["width"] > 100
        assert picture["shown"] > 100
        assert 0.1 < picture["share"] < 0.3  # a ball of 16 mm in fields of 30 or 36 mm
        assert (picture["x"], picture["y"]) == pytest.approx(PICTURES[picture["alt"]], abs=0.03)


def test_the_volumes_shown_are_those_of_the_record(shown: Shown) -> None:
    rows = shown.browser.ask("""
        return [...document.querySelectorAll('#volumes tr')].slice(1).map(row => [...row.cells].map(c => c.innerText));
    """)
    expected = [[s["name"], f"{s['volume_ml']:.3f}"] for s in shown.record["structures"]]
    assert [[name.strip(), volume] for name, volume in rows] == expected
    assert float(rows[0][1]) == pytest.approx(4 / 3 * np.pi * (RADIUS / 10) ** 3, rel=0.05)


def test_the_provenance_shown_is_that_of_the_record(shown: Shown) -> None:
    rows = shown.browser.ask("""
        return [...document.querySelectorAll('#provenance tr')].map(row => [...row.cells].map(c => c.innerText));
    """)
    table = dict(rows)
    record = shown.record
    assert table["model.entry"] == record["model"]["entry"] == "hostile"
    assert table["model.weights_sha256"] == record["model"]["weights_sha256"][0]
    assert table["scan.sha256.scan"] == record["scan"]["sha256"]["scan"]
    assert table["engine.name"] == record["engine"]["name"] == "onnx"
    assert table["engine.precision"] == "fp32"


def test_hostile_words_are_shown_as_words(shown: Shown) -> None:
    hostile = HOSTILE.format(shown.server)
    assert text_of(shown, "h1") == hostile
    assert shown.browser.ask("return document.title") == hostile
    assert text_of(shown, "#volumes td").strip() == LABEL.format(shown.server)
    assert hostile in text_of(shown, "#research-use")
    counts = shown.browser.ask(
        "return ['script', 'link', 'iframe', 'b', 'h1'].map(n => document.querySelectorAll(n).length)"
    )
    assert counts == [0, 0, 0, 0, 1]


def test_nothing_is_fetched_from_outside_the_page(shown: Shown) -> None:
    assert shown.requests[0] == shown.page.as_uri()
    assert all(address.startswith("data:") for address in shown.requests[1:])
    assert shown.visits == []


def test_the_page_forbids_scripts_and_requests_even_if_something_slipped_in(shown: Shown, tmp_path: Path) -> None:
    """The same page with an unescaped picture and script put into it; and, as a control, without its policy."""
    text = shown.page.read_text(encoding="utf-8")
    slipped = f"<img src='{shown.server}/slipped'><script>document.title = 'taken'</script></body>"
    guarded, open_page = tmp_path / "guarded.html", tmp_path / "open.html"
    guarded.write_text(text.replace("</body>", slipped), encoding="utf-8")
    shown.browser.open(guarded)
    assert shown.visits == []
    assert shown.browser.ask("return document.title") != "taken"
    open_page.write_text(
        text.replace("Content-Security-Policy", "x-nothing").replace("</body>", slipped), encoding="utf-8"
    )
    shown.browser.open(open_page)
    assert shown.visits == ["/slipped"]
    assert shown.browser.ask("return document.title") == "taken"
    shown.visits.clear()
    shown.browser.open(shown.page)
