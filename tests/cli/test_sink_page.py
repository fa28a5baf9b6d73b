"""sinks.html in a real browser: what a reader sees and clicks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.report.sink_page import write_pictures
from tests.browser import dom, needs_browser
from tests.sinks import measurement, score

LAYERS, HEADS = 6, 9

pytestmark = needs_browser


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    found = measurement(LAYERS, HEADS, steps=(3, 6, 9))
    for each, k in zip(found["checkpoints"], (1, 20, 50), strict=True):
        each["harmful_score"] = score(k)
    write_pictures(found, folder)
    return (folder / "sinks.html").read_text(encoding="utf-8")


def column(document: str, number: int) -> list[float]:
    """A column of the table of heads, as it stands in the document."""
    table = document[document.index('id="strongest"') :]
    rows = re.findall(r"<tr><td.*?</tr>", table, re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row)[number] for row in rows]
    return [float(cell.replace("−", "-")) for cell in cells]


def test_every_head_is_a_cell_with_its_numbers(html: str, tmp_path: Path) -> None:
    document = dom(html, tmp_path)
    titles = re.findall(r"<rect [^>]*><title>(.*?)</title>", document)
    assert len(titles) == LAYERS * HEADS
    assert titles[HEADS + 2].startswith("layer 1, head 2: d ")
    marks = re.findall(r'<path [^>]*d="(.*?)"', document)
    assert len(marks) == 2, "one head is significantly positive and one negative"
    assert len(set(marks)) == 2
    values = column(document, 2)
    assert len(values) == 50
    assert [abs(value) for value in values] == sorted(map(abs, values), reverse=True)


def test_a_click_on_a_heading_sorts_the_table_by_value_and_a_second_one_turns_it(html: str, tmp_path: Path) -> None:
    once = "document.querySelectorAll('#strongest th button')[2].click();"
    values = column(dom(html, tmp_path, once), 2)
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.2
    assert values[-1] < -0.2
    turned = dom(html, tmp_path, once + once)
    assert column(turned, 2) == values[::-1]
    assert re.findall(r'<th aria-sort="(\w+)"', turned) == ["ascending"]


def test_pointing_at_a_head_shows_its_numbers_at_once(html: str, tmp_path: Path) -> None:
    point = "document.querySelectorAll('rect')[4].dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));"
    document = dom(html, tmp_path, point)
    readout = re.search(r'class="readout[^>]*>(.*?)</p>', document)
    assert readout is not None
    assert readout[1].startswith("layer 0, head 4: d ")


def test_pictures_are_inside_and_nothing_is_loaded_or_refused(html: str, tmp_path: Path) -> None:
    report = (
        "window.onload = () => { document.title = [...document.images].map((each) => each.naturalWidth > 500).join()"
        " + ' ' + performance.getEntriesByType('resource').filter((each) => !each.name.startsWith('data:')).length"
        " + ' ' + document.querySelector('.bar').computedStyleMap().get('width').value; };"
    )
    title = re.search(r"<title>(.*?)</title>", dom(html, tmp_path, report))
    assert title is not None
    pictures, requests, width = title[1].split()
    assert pictures == "true,true", "positive heads by step, and against the harmful score"
    assert requests == "0"
    assert float(width) > 100, "the style sheet applies under the page's own content policy"
