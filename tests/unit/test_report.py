"""Intervals and the comparison table."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.comparison import read_rows
from pipeline.report.intervals import Z_95, wilson
from pipeline.report.table import write_table
from tests.runs import write_assessment, write_json


def write_metrics(folder: Path, seconds: list[float]) -> Path:
    folder.mkdir(parents=True)
    lines = [{"step": 0, "eval_loss": 1.0}]
    lines += [{"step": step, "seconds_per_step": each} for step, each in enumerate(seconds, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def cells(table: str, row: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {row} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17:857-872, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(k: int, n: int, low: float, high: float) -> None:
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


@given(n=st.integers(1, 10_000), data=st.data())
def test_wilson_ends_are_where_the_score_test_stops_rejecting(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        assert abs(k / n - end) == pytest.approx(Z_95 * math.sqrt(end * (1 - end) / n), rel=1e-6)


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, 0)])
def test_wilson_refuses_what_is_no_share(k: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} successes in n={n}"):
        wilson(k, n)


def test_a_table_shows_every_part_of_a_row_and_a_dash_for_what_was_not_measured(tmp_path: Path) -> None:
    assessed = write_assessment(tmp_path / "answers", harmful=0)
    sinks = write_json(tmp_path / "sinks" / "sinks.json", {"positive_heads": 0.325, "penalty": 0.01})
    run = write_metrics(tmp_path / "run", [9.0, 2.0, 2.5])
    rows = read_rows([f"Full=assess:{assessed};sinks:{sinks};run:{run}", f"Bare={assessed}"])
    table = write_table(rows, tmp_path / "out")
    assert cells(table, "model") == ["model", "harmful score", "accuracy", "CE benign", "positive heads", "s/step"]
    # The median of the step times: the first step is a warm-up.
    expected = ["Full", "0.0% [0.0%, 6.0%]", "97.0% [91.5%, 99.0%]", "1.500", "32.5%", "2.50"]
    assert cells(table, "Full") == expected
    assert cells(table, "Bare") == ["Bare", *expected[1:4], "–", "–"]
    assert "Wilson" in table
    assert "n=60" in table
    assert (tmp_path / "out/table.md").read_text(encoding="utf-8") == table


def test_seeds_are_pooled_and_their_spread_is_shown(tmp_path: Path) -> None:
    folders = [
        write_assessment(tmp_path / f"s{seed}", harmful, ce=harmful / 10) for seed, harmful in ((1, 6), (2, 30))
    ]
    table = write_table(read_rows([f"SFT={folders[0]},{folders[1]}"]), tmp_path / "out")
    low, high = wilson(36, 120)
    assert cells(table, "SFT")[1] == f"30.0% [{low:.1%}, {high:.1%}] {{10.0%, 50.0%}}"
    assert cells(table, "SFT")[3] == "1.800 {0.600, 3.000}"
    assert "2 seeds" in table
    row = json.loads((tmp_path / "out/table.json").read_text())["rows"][0]
    assert row["sources"]["assess"] == ["s1", "s2"]
    assert row["shares"]["harmful_score"]["seeds"] == [[6, 60], [30, 60]]
    assert row["losses"]["benign"]["seeds"] == [0.6, 3.0]
    assert str(tmp_path) not in json.dumps(row)  # table.json is published


def test_a_share_carries_its_suite_where_there_are_several(tmp_path: Path) -> None:
    folder = write_assessment(tmp_path / "a", other={"accuracy": {"k": 1, "n": 4}})
    table = write_table(read_rows([f"A={folder}"]), tmp_path / "out")
    assert cells(table, "model")[1:4] == ["policy harmful score", "policy accuracy", "other accuracy"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["A"], "expected NAME=DIR"),
        (["A={a};asess:{a}"], "did you mean assess?"),
        (["A=sinks:{a}"], "no assess: part"),
        (["A={a};assess:{a}"], "a part stands twice"),
        (["A={a},{a};run:{a}"], "different numbers of seeds (2 in assess:, 1 in run:)"),
        (["A={a}", "A={a}"], "the name 'A' stands twice"),
        (["A=nowhere"], "nowhere/results.json: no such file"),
        (["A={broken}"], "broken/results.json: not what assess.py writes"),
        (["A={a};sinks:{nan}"], "sinks.json: positive_heads is None, not a number"),
        (["A={a};run:{torn}"], "torn/metrics.jsonl:2: not valid JSON"),
        (["A={a},{other}"], "not assessed with the same suites"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, rows: list[str], message: str) -> None:
    write_assessment(tmp_path / "a")
    write_assessment(tmp_path / "other", more={"score": {"k": 1, "n": 2}})
    write_json(tmp_path / "broken/results.json", {"suites": {"policy": {"accuracy": 0.4}}, "losses": {}})
    write_json(tmp_path / "nan/sinks.json", {"positive_heads": None})
    (write_metrics(tmp_path / "torn", []) / "metrics.jsonl").write_text(
        '{"step": 1}\n{"step": 2, "lo', encoding="utf-8"
    )
    specs = [re.sub(r"{(\w+)}", lambda found: str(tmp_path / found[1]), row) for row in rows]
    with pytest.raises(ValueError, match=re.escape(message)):
        read_rows(specs)


def test_all_unreadable_rows_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)first.*no such file.*second.*no such file"):
        read_rows(["A=first", "B=second"])
