"""The report of a sweep: shares over its conditions, which models are compared, and what the figure's panels hold."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.report.comparison import Row, read_rows
from pipeline.report.controls import beyond_slower_learning
from pipeline.report.figures import styles
from pipeline.report.page import write_report
from pipeline.report.paired import compare
from pipeline.report.poison import panels
from pipeline.report.table import write_table
from tests.reports import first, sweep_rows, write_judged

CONTROL = "SFT at Surgery's poisoned loss"


def cells(table: str, first_cell: str) -> list[list[str]]:
    """The cells of all lines that begin with one."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [line for line in lines if line[0] == first_cell]


def two_rates(folder: Path) -> list[Row]:
    """One defense with its control over three ratios at one learning rate, at one ratio at another."""
    slow = sweep_rows(folder / "slow", (10,), setting="lr 1e-5, ")
    return read_rows([*sweep_rows(folder / "fast", setting="lr 1e-4, "), *slow])


def test_the_table_of_a_sweep_has_a_column_for_each_condition(tmp_path: Path) -> None:
    aligned = write_judged(tmp_path / "aligned", first(1, 60), first(2, 100))
    table = write_table([*read_rows([f"Aligned={aligned}"]), *two_rates(tmp_path)], tmp_path / "out")
    conditions = ["lr 1e-4, 0 %", "lr 1e-4, 10 %", "lr 1e-4, 20 %", "lr 1e-5, 10 %"]
    assert cells(table, "harmful score") == [["harmful score", *conditions]]
    assert cells(table, "accuracy") == [["accuracy", *conditions]]
    harmful, accuracy = cells(table, "SFT")
    assert [cell.split()[0] for cell in harmful] == ["SFT", "0.0%", "50.0%", "100.0%", "50.0%"]
    assert [cell.split()[0] for cell in accuracy] == ["SFT", "97.0%", "97.0%", "97.0%", "97.0%"]
    assert [cell.split()[0] for cell in cells(table, CONTROL)[0][1:]] == ["0.0%", "1.7%", "3.3%", "1.7%"]
    # What is no point of the sweep stands below, under columns of its own.
    assert [line[:3] for line in cells(table, "model")] == [["model", "harmful score", "accuracy"]]
    assert [line[1].split()[0] for line in cells(table, "Aligned")] == ["1.7%"]
    assert (tmp_path / "out/table.md").read_text(encoding="utf-8") == table


def test_a_model_without_a_condition_gets_a_dash_and_one_condition_is_no_sweep(tmp_path: Path) -> None:
    rows = sweep_rows(tmp_path, (0, 10))
    table = write_table(read_rows(rows[:-2]), tmp_path / "out")  # SFT alone at the second ratio
    assert [line[-1] for line in cells(table, "Surgery")] == ["–", "–"]
    table = write_table(read_rows(rows[:3]), tmp_path / "out")
    assert cells(table, "model")[0][1:3] == ["harmful score", "accuracy"]
    assert len(cells(table, "Surgery, 0 %")) == 1


def test_models_are_compared_under_one_condition(tmp_path: Path) -> None:
    rows = two_rates(tmp_path)
    found, _ = compare(rows)
    pairs = [(each.first, each.second) for each in found if each.score == "harmful_score"]
    assert len(pairs) == 8
    assert all(a.partition(", ")[2] == b.partition(", ")[2] for a, b in pairs)
    outcome = "harmful score: no significant difference at 4 of 4 conditions"
    assert beyond_slower_learning(rows, found) == [f"Surgery beside its control, {CONTROL}, {outcome}"]
    # Without controls too: the same ratio at two learning rates is not one condition.
    plain = [row for row in rows if row.model == "SFT"]
    assert compare(plain) == ([], [])


def test_the_figure_has_a_panel_for_each_setting(tmp_path: Path) -> None:
    rows = two_rates(tmp_path)
    drawn = styles(row.model for row in rows)
    (panel,) = panels(rows, drawn)  # one ratio alone is no line
    assert panel.title == "Surgery, lr 1e-4"
    assert {row.name.partition(", ")[2] for row in panel.rows} == {"lr 1e-4, 0 %", "lr 1e-4, 10 %", "lr 1e-4, 20 %"}
    both = read_rows(
        [*sweep_rows(tmp_path / "a", setting="lr 1e-4, "), *sweep_rows(tmp_path / "b", setting="lr 1e-5, ")]
    )
    assert [each.title for each in panels(both, drawn)] == ["Surgery, lr 1e-4", "Surgery, lr 1e-5"]
    plain = [row for row in both if row.model == "SFT"]
    assert [(each.title, len(each.rows)) for each in panels(plain, drawn)] == [("lr 1e-4", 3), ("lr 1e-5", 3)]


def test_the_page_shows_the_conditions_of_a_sweep_at_one_ratio_too(tmp_path: Path) -> None:
    rates = [sweep_rows(tmp_path / rate, (10,), setting=f"lr {rate}, ") for rate in ("1e-4", "1e-5")]
    write_report(read_rows([*rates[0], *rates[1]]), tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "Against the share of poisoned rows" not in page
    head = re.search(r"<h3>Harmful score</h3>.*?</thead>", page[page.index("Under each condition") :], re.DOTALL)
    assert head is not None
    assert re.findall(r"<th>(.+?)</th>", head[0]) == ["model", "lr 1e-4, 10 %", "lr 1e-5, 10 %"]
