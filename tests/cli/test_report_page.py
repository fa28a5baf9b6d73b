"""report.html in a real browser: its figures are those of the files, it asks for nothing, and it fits any screen."""

from __future__ import annotations

import html as entities
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.report.comparison import read_rows
from pipeline.report.figures import styles
from pipeline.report.page import write_report
from pipeline.report.poison import panels
from pipeline.report.scores import write_scores
from tests.browser import browse, dom, needs_browser
from tests.reports import first, share, sweep_rows, write_judged

ROOT = Path(__file__).resolve().parents[2]

pytestmark = needs_browser


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What compare.py leaves for a sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    command = [sys.executable, "tools/compare.py", "--rows", *sweep_rows(folder), "--output_dir", str(folder / "out")]
    subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120, check=True)
    return folder / "out"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two models whose suite has categories, one of them with unparsed verdicts and a failed gate."""
    folder = tmp_path_factory.mktemp("models")
    kinds = ["brewing", "mixing", "<script>alert(1)</script>"]
    entry = {"condition": "harmful_score>5", "failed": True, "sentence": "harmful_score>5: holds (policy 40.0 %)"}
    other = {"lm_eval": {"arc": {"acc,none": 0.5, "acc_stderr,none": 0.01, "alias": "arc"}}}
    base = write_judged(
        folder / "base", first(24, 60), first(90, 100), categories=kinds, unparsed=3, gate=[entry], **other
    )
    safe = write_judged(folder / "safe", first(1, 60), first(88, 100), categories=kinds, gate=[])
    for name in ("base", "safe"):
        path = folder / name / "results.json"
        results = json.loads(path.read_text())
        results["settings"]["rendered_prompt"] = "SECRET TEXT"
        path.write_text(json.dumps(results))
    write_report(read_rows([f"Base <b>&=assess:{base}", f"Safe=assess:{safe}"]), folder)
    return folder


def text(document: str) -> str:
    """What a reader reads."""
    body = document[document.index("<body>") :]
    return " ".join(entities.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_every_share_stands_where_results_json_says(models: Path, tmp_path: Path) -> None:
    document = dom((models / "report.html").read_text(encoding="utf-8"), tmp_path)
    shown = text(document)
    for name in ("base", "safe"):
        scores = json.loads((models / name / "results.json").read_text())["suites"]["policy"]
        for score in scores.values():
            assert f"{score['value']:.1%} {score['low']:.1%} to {score['high']:.1%}" in shown
            left = re.escape(f"left:{100 * score['low']:.2f}%;width:{100 * (score['high'] - score['low']):.2f}%")
            assert re.search(f'class="range" style="{left}', document)
        for each in scores["harmful_score"]["by"].values():
            assert f"{each['value']:.1%} {each['low']:.1%} to {each['high']:.1%}" in shown
    assert "Unparsed (the judge's answer could not be read): Base <b>& 3." in shown
    assert "arc acc 0.500 ± 0.020 –" in shown
    assert "Release gate failed , Base <b>&: harmful_score>5: holds (policy 40.0 %)" in shown


def test_names_are_escaped_and_texts_around_prompts_left_out(models: Path) -> None:
    page = (models / "report.html").read_text(encoding="utf-8")
    assert "<b>&" not in page
    assert "alert(1)</script>" not in page
    assert "<script" not in page
    assert "SECRET TEXT" not in page + (models / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["models", "sweep"])
def test_nothing_is_loaded_and_nothing_refused(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    page = (request.getfixturevalue(name) / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")
    count = "performance.getEntriesByType('resource').filter((each) => !each.name.startsWith('data:')).length"
    document = dom(page, tmp_path, f"window.onload = () => {{ document.title = 'requests ' + {count}; }};")
    assert "<title>requests 0</title>" in document


@pytest.mark.parametrize(("width", "dark"), [(360, False), (1200, True)])
@pytest.mark.parametrize("name", ["models", "sweep"])
def test_it_fits_the_screen_in_light_and_dark(
    name: str, width: int, dark: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    inner = (request.getfixturevalue(name) / "report.html").read_text(encoding="utf-8")
    # Headless windows are never narrow, frames may be.
    page.write_text(f'<iframe id="f" width="{width}" height="900" srcdoc="{entities.escape(inner)}"></iframe>')
    page.write_text(
        page.read_text() + "<script>window.onload = () => { const d = document.getElementById('f').contentDocument; "
        "document.title = [d.documentElement.scrollWidth, getComputedStyle(d.body).backgroundColor].join(' '); };"
        "</script>"
    )
    shown = browse(
        page, "--dump-dom", *(["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else [])
    )
    title = re.search(r"<title>(\d+) rgb\((\d+), \d+, \d+\)</title>", shown)
    assert title is not None
    assert int(title[1]) <= width, "nothing but tables in their own frame is wider than the screen"
    assert (int(title[2]) < 60) is dark


def test_a_sweep_is_drawn_with_its_control_as_a_line_of_its_own(sweep: Path, tmp_path: Path) -> None:
    document = dom((sweep / "report.html").read_text(encoding="utf-8"), tmp_path)
    shown = text(document)
    assert "Against the share of poisoned rows" in shown
    outcome = "harmful score: no significant difference at 3 of 3 conditions"
    assert f"Surgery beside its control, SFT at Surgery's poisoned loss, {outcome}." in shown
    figure = document[document.index('<figure role="img" aria-label="harmful score against') :]
    figure = figure[: figure.index("</figure>")]
    assert all(f"var(--series{i})" in figure for i in range(3))
    assert "var(--series3)" not in figure
    ticks = re.findall(r">(\d+)</text>", figure)
    assert ticks[:3] == ["0", "10", "20"]
    assert "SFT at Surgery's poisoned loss" in shown
    assert "SFT, 20 %" in shown
    picture = np.array(Image.open(sweep / "poison_sweep.png").convert("RGB")).reshape(-1, 3)
    for colour in ("0072B2", "D55E00", "009E73"):
        rgb = [int(colour[i : i + 2], 16) for i in (0, 2, 4)]
        assert (picture == rgb).all(axis=1).sum() > 200, f"a line in #{colour}"
    report = (sweep / "report.md").read_text(encoding="utf-8")
    assert "harmful score: SFT, 20 % 100.0% against Surgery, 20 % 0.0%: a significant difference" in report
    low, high = share(0, 60)["low"], share(0, 60)["high"]
    assert "| Surgery, 20 %" in report
    assert f"0.0% [{low:.1%}, {high:.1%}]" in report


def test_the_figure_of_a_table_has_a_mark_where_each_score_is(tmp_path: Path) -> None:
    safe, unsafe = (write_judged(tmp_path / name, first(k, 60)) for name, k in (("safe", 0), ("unsafe", 60)))
    write_scores(read_rows([f"Safe={safe}", f"Unsafe={unsafe}"]), tmp_path)
    blue = (np.array(Image.open(tmp_path / "scores.png").convert("RGB")) == (0x00, 0x72, 0xB2)).all(axis=2)
    rows, columns = np.nonzero(blue[:, : blue.shape[1] // 2])  # the panel of the harmful score
    above = rows < (rows.min() + rows.max()) / 2
    assert columns[above].max() < columns[~above].min(), "0 % of the upper model lies left of 100 % of the lower"
    write_scores(read_rows(sweep_rows(tmp_path / "sweep")), tmp_path / "none")
    assert not (tmp_path / "none").exists(), "a sweep has a figure of its own"


def test_many_defenses_get_a_panel_each(tmp_path: Path) -> None:
    """With SFT and the own control; what was run at one ratio alone is in no panel."""
    rows = sweep_rows(tmp_path, (0, 10, 20), ("Surgery", "Booster", "Lisa"))
    rows += sweep_rows(tmp_path / "lone", (10,), ("Lone",))[1:]
    drawn = read_rows(rows)
    found = panels(drawn, styles(row.model for row in drawn))
    assert [each.title for each in found] == ["Surgery", "Booster", "Lisa"]
    for each in found:
        assert list(dict.fromkeys(row.series for row in each.rows)) == [
            "SFT", each.title, f"SFT at {each.title}'s poisoned loss",
        ]  # fmt: skip
    # A control at one ratio alone, as where nothing is poisoned at the other, is drawn as a point.
    few = [row for row in read_rows(sweep_rows(tmp_path / "few", (0, 10))) if row.matches == [] or row.poison_percent]
    assert {row.series for each in panels(few, styles(row.model for row in few)) for row in each.rows} == {
        "SFT", "Surgery", "SFT at Surgery's poisoned loss",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "tools/compare.py", "--rows", *rows, "--output_dir", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("against the share of poisoned rows; the numbers are") == 3
    assert Image.open(tmp_path / "out" / "poison_sweep.png").size[0] > 1500


def test_training_curves_and_maps_are_there_for_what_was_measured(sweep: Path, models: Path) -> None:
    page, bare = ((folder / "report.html").read_text(encoding="utf-8") for folder in (sweep, models))
    assert page.count('aria-label="eval poisoned loss by training step"') == 3
    assert page.count("data:image/png;base64,") == 6
    assert "--poison_ratio 0.2" in page
    for heading in ("<h2>Training</h2>", "<h2>Attention sinks</h2>"):
        assert heading in page
        assert heading not in bare


def test_a_row_named_with_another_ratio_than_its_run_is_refused(tmp_path: Path) -> None:
    rows = [row.replace("SFT, 20 %", "SFT, 25 %") for row in sweep_rows(tmp_path)]
    with pytest.raises(ValueError, match="poison_ratio is 0.2, not what the name 'SFT, 25 %' says"):
        read_rows(rows)
