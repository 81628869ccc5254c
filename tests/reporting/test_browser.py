"""The pages in a real browser, on a phone and on a desk: nothing is cut off, nothing covers anything else."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pages import HOSTILE, LONG, REPORT, REPORTS, front, trial

from lightning_edge.reporting.html import comparison_page, picture, report_page, style, sweep_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (390, 1280)
PAGES = {
    **{
        name: report_page(REPORTS[name], recipe="x: " + "y" * 500)
        for name in ("plain", "many", "pruned", "full", "many layers and classes", "long", "hostile", "failed")
    },
    "side by side": comparison_page({"before": REPORT, LONG: REPORTS["many"], HOSTILE: REPORTS["over budget"]}),
    "sweep": sweep_page(
        front(*map(trial, range(30)), trial(30, status="failed", values={}, front=False, reason=LONG), study=LONG)
    ),
}
# Measures every page in frames of both widths, since a browser without a screen has no narrow windows, and leaves what
# it found as the text of its body.
SCRIPT = """
function boxOf(element) { const b = element.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; }
function measure(frame) {
  const page = frame.contentDocument, root = page.documentElement;
  const wide = [...page.querySelectorAll('main *')].filter(
    one => !one.closest('.scroll') && !one.closest('pre') && one.getBoundingClientRect().right > root.clientWidth + 1);
  const pictures = [...page.querySelectorAll('figure svg')].map(svg => ({
    box: boxOf(svg), size: parseFloat(getComputedStyle(svg).fontSize) * svg.clientWidth / svg.viewBox.baseVal.width,
    texts: [...svg.querySelectorAll('text')].map(one => ({words: one.textContent, box: boxOf(one)})),
    labels: [...svg.querySelectorAll('text.halo')].map(one => ({words: one.textContent, box: boxOf(one)}))}));
  return {name: frame.name, width: root.clientWidth, scrolls: root.scrollWidth, pictures,
    wide: wide.map(one => one.outerHTML.slice(0, 80)), tables: page.querySelectorAll('table').length,
    sections: [...page.querySelectorAll('section')].map(one => ({title: one.querySelector('h2').innerText,
      pictures: one.querySelectorAll('figure svg').length, tables: one.querySelectorAll('table').length,
      captions: [...one.querySelectorAll('figcaption')].map(caption => caption.innerText)})),
    alerts: page.querySelectorAll('script, img').length, heading: page.querySelector('h1').innerText};
}
addEventListener('load', () => {
  document.body.textContent = JSON.stringify([...document.querySelectorAll('iframe')].map(measure));
});
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if BROWSER is None:
        pytest.skip("no chromium here; apt-get install chromium")
    folder = tmp_path_factory.mktemp("pages")
    frames = []
    for number, (name, page) in enumerate(PAGES.items()):
        (folder / f"{number}.html").write_text(page)
        frames += [
            f'<iframe name="{name}" src="{number}.html" style="border:0;width:{width}px;height:900px"></iframe>'
            for width in WIDTHS
        ]
    outer = folder / "frames.html"
    outer.write_text(f"<!doctype html><meta charset=utf-8><body>{''.join(frames)}<script>{SCRIPT}</script></body>")
    # A profile of its own: a browser that is open here would answer in its place.
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command += ["--allow-file-access-from-files", "--virtual-time-budget=10000", "--dump-dom", outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    body = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    assert body is not None, done.stderr
    found = json.loads(html.unescape(body.group(1)))
    assert isinstance(found, list)
    assert [(page["name"], page["width"]) for page in found] == [(name, width) for name in PAGES for width in WIDTHS]
    return found


def test_pages_are_shown_whole_and_run_nothing(measured: list[dict[str, Any]]) -> None:
    headings = {page["name"]: page["heading"] for page in measured}
    assert headings["plain"] == "Digits on the device"
    assert headings["side by side"] == "3 reports side by side"
    assert headings["hostile"].startswith("<script>alert(1)</script>")
    for page in measured:
        assert page["alerts"] == 0
        assert page["tables"] >= 2 or page["name"] == "sweep"
        assert page["pictures"] or page["name"] == "hostile"


def test_a_full_report_has_every_part_with_a_table_beside_its_pictures(measured: list[dict[str, Any]]) -> None:
    for page in (page for page in measured if page["name"] == "full"):
        parts = {part["title"]: part for part in page["sections"]}
        assert [*parts] == [
            "What each file costs, and how well it does",
            "How fast",
            "On devices",
            "How true each file is to its network",
            "Which samples changed their class",
            "Layer by layer",
            "What runs where",
            "Where memory goes",
            "Notes",
            "How it was made",
        ]
        assert all(part["tables"] for title, part in parts.items() if title != "Notes")
        assert parts["Layer by layer"]["captions"] == [
            "Bytes of weights, and in float before (narrow bar)",
            "What was cut: channels left, and before (narrow bar)",
            "What each layer costs in int8, the most sensitive first",
        ]
        drawn = {title: part["pictures"] for title, part in parts.items() if part["pictures"]}
        assert drawn == {
            "What each file costs, and how well it does": 2,
            "How fast": 1,
            "On devices": 2,
            "How true each file is to its network": 1,
            "Which samples changed their class": 2,
            "Layer by layer": 3,
            "What runs where": 1,
            "Where memory goes": 2,
        }


def test_nothing_is_wider_than_the_page(measured: list[dict[str, Any]]) -> None:
    for page in measured:
        assert page["scrolls"] <= page["width"], (page["name"], page["width"], page["wide"])
        assert page["wide"] == [], (page["name"], page["width"])


def test_texts_in_pictures_are_inside_and_large_enough(measured: list[dict[str, Any]]) -> None:
    for page in measured:
        for drawn in page["pictures"]:
            left, top, right, bottom = drawn["box"]
            assert drawn["size"] > 10, page["name"]
            for text in drawn["texts"]:
                start, high, end, low = text["box"]
                inside = start > left - 2 and end < right + 2 and high > top - 2 and low < bottom + 2
                assert inside, (page["name"], page["width"], text["words"])


def test_labels_cover_no_labels(measured: list[dict[str, Any]]) -> None:
    for page in measured:
        for drawn in page["pictures"]:
            labels = drawn["labels"]
            for number, one in enumerate(labels):
                for other in labels[:number]:
                    left, right = max(one["box"][0], other["box"][0]), min(one["box"][2], other["box"][2])
                    top, bottom = max(one["box"][1], other["box"][1]), min(one["box"][3], other["box"][3])
                    covered = right - left > 1 and bottom - top > 3  # lines of text stand close, letters do not touch
                    assert not covered, (page["name"], page["width"], one["words"], other["words"])


def _luminance(color: str) -> float:
    parts = (int(color[start : start + 2], 16) / 255 for start in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("sheet", [picture.LIGHT + style.STATES_LIGHT, picture.DARK + style.STATES_DARK])
def test_every_color_is_read_on_every_ground(sheet: str) -> None:
    colors = dict(re.findall(r"--(\w+):(#\w{6});", sheet))
    assert len(colors) == picture.COLORS + 8
    for ground in ("paper", "panel"):
        for name in colors.keys() - {"paper", "panel", "rule"}:
            light, dark = sorted((_luminance(colors[name]), _luminance(colors[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)


def test_browser_that_is_skipped_is_said_where_it_is_installed() -> None:
    assert "install_if_missing chromium chromium" in (Path(__file__).parents[2] / ".ci" / "run").read_text()
