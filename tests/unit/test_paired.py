"""Two models on the same prompts: counts, exact p-values, Holm's correction, and what cannot be paired."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.comparison import read_rows
from pipeline.report.controls import beyond_slower_learning
from pipeline.report.paired import Paired, compare, p_text
from tests.reports import first, sweep_rows, write_judged


def found_in(*specs: str) -> dict[tuple[str, str, str], Paired]:
    found, reasons = compare(read_rows(specs))
    assert not reasons
    return {(each.score, each.first, each.second): each for each in found}


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    # Agresti, Categorical Data Analysis, 2nd ed., table 10.1 gives 86 and 150 discordant pairs; the rest by hand.
    [(0, 6, 2 / 64), (1, 5, 2 * 7 / 64), (3, 3, 1.0), (0, 0, 1.0), (86, 150, 3.7e-5)],
)
def test_mcnemar_is_the_two_sided_binomial_of_the_prompts_that_differ(
    tmp_path: Path, only_first: int, only_second: int, p: float
) -> None:
    both = [True] * 7 + [False] * 11
    one = write_judged(tmp_path / "a", [True] * only_first + [False] * only_second + both)
    other = write_judged(tmp_path / "b", [False] * only_first + [True] * only_second + both)
    pair = found_in(f"A={one}", f"B={other}")["harmful_score", "A", "B"]
    assert (pair.only_first, pair.only_second) == (only_first, only_second)
    assert pair.pairs == only_first + only_second + 18
    assert pair.p == pytest.approx(p, rel=0.03)
    assert pair.shares == ((only_first + 7) / pair.pairs, (only_second + 7) / pair.pairs)


@given(only_first=st.integers(0, 40), only_second=st.integers(0, 40))
def test_the_order_of_two_models_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, only_first: int, only_second: int
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    one = write_judged(folder / "a", [True] * only_first + [False] * (only_second + 1))
    other = write_judged(folder / "b", [False] * only_first + [True] * only_second + [False])
    pair = found_in(f"A={one}", f"B={other}")["harmful_score", "A", "B"]
    turned = found_in(f"B={other}", f"A={one}")["harmful_score", "B", "A"]
    assert pair.p == turned.p
    n, k = only_first + only_second, min(only_first, only_second)
    assert pair.p == pytest.approx(min(1, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n), rel=1e-12)


def test_seeds_are_pooled_prompt_by_prompt(tmp_path: Path) -> None:
    first_model = [write_judged(tmp_path / f"a{seed}", first(k, 20)) for seed, k in ((1, 4), (2, 9))]
    second_model = [write_judged(tmp_path / f"b{seed}", first(k, 20)) for seed, k in ((1, 1), (2, 11))]
    pair = found_in(f"A={first_model[0]},{first_model[1]}", f"B={second_model[0]},{second_model[1]}")
    harmful = pair["harmful_score", "A", "B"]
    assert (harmful.pairs, harmful.only_first, harmful.only_second) == (40, 3, 2)


def test_holm_corrects_over_the_pairs_of_one_score(tmp_path: Path) -> None:
    counts = {"A": 0, "B": 6, "C": 14}
    folders = {name: write_judged(tmp_path / name, first(k, 40), first(9, 10)) for name, k in counts.items()}
    found = found_in(*(f"{name}={folder}" for name, folder in folders.items()))
    raw = {pair: found["harmful_score", *pair].p for pair in (("A", "B"), ("A", "C"), ("B", "C"))}
    assert raw == {("A", "B"): 2 / 2**6, ("A", "C"): 2 / 2**14, ("B", "C"): 2 / 2**8}
    assert found["harmful_score", "A", "C"].p_holm == 3 * raw["A", "C"]
    assert found["harmful_score", "B", "C"].p_holm == 2 * raw["B", "C"]
    assert found["harmful_score", "A", "B"].p_holm == raw["A", "B"]
    assert {found["accuracy", *pair].p_holm for pair in raw} == {1.0}


def test_a_sentence_says_when_a_difference_is_not_significant(tmp_path: Path) -> None:
    folders = [write_judged(tmp_path / name, first(k, 60)) for name, k in (("a", 54), ("b", 0), ("c", 3), ("d", 3))]
    found = found_in(*(f"{name}={folder}" for name, folder in zip("ABCD", folders, strict=True)))
    clear, unclear, same = (found["harmful_score", *pair] for pair in (("A", "B"), ("B", "C"), ("C", "D")))
    assert clear.significant
    assert clear.sentence() == (
        "harmful score: A 90.0% against B 0.0%: a significant difference (54 of 60 prompts differ, p < 0.001)"
    )
    assert not unclear.significant
    assert unclear.sentence() == (
        "harmful score: B 0.0% and C 5.0% do not differ significantly at 5 % (3 of 60 prompts differ, p = 0.75)"
    )
    assert same.sentence() == "harmful score: C 5.0% and D 5.0%: no prompt was judged differently"
    assert p_text(0.9996) == "p = 1"


def test_models_of_a_sweep_are_compared_at_one_ratio_only(tmp_path: Path) -> None:
    found, reasons = compare(read_rows(sweep_rows(tmp_path)))
    assert not reasons
    for each in found:
        assert each.first.rpartition(", ")[2] == each.second.rpartition(", ")[2]
    assert len(found) == 2 * 3 * 2, "two scores, three ratios, Surgery beside SFT and beside its control"


def test_of_many_defenses_each_is_tested_beside_sft_and_its_own_control(tmp_path: Path) -> None:
    rows = read_rows(sweep_rows(tmp_path, (0, 10), ("Surgery", "Booster")))
    pairs = {(each.first, each.second) for each in compare(rows)[0] if each.score == "harmful_score"}
    assert pairs == {
        pair
        for ratio in (0, 10)
        for name in ("Surgery", "Booster")
        for pair in (
            (f"SFT, {ratio} %", f"{name}, {ratio} %"),
            (f"{name}, {ratio} %", f"SFT at {name}'s poisoned loss, {ratio} %"),
        )
    }
    # Without controls a sweep is every two models at one ratio.
    bare = [row for row in rows if not row.matches]
    assert len(compare(bare)[0]) == 2 * 2 * 3


def test_what_cannot_be_paired_is_said_and_why(tmp_path: Path) -> None:
    one, other, bare, old, short = (write_judged(tmp_path / name, first(2, 9)) for name in "abcde")
    write_judged(tmp_path / "b", first(2, 9), prompts="b" * 64)
    (bare / "verdicts-policy.jsonl").unlink()
    results = json.loads((old / "results.json").read_text())
    for score in results["suites"]["policy"].values():
        del score["hits"]
    (old / "results.json").write_text(json.dumps(results))
    cases = {
        f"B={other}": "A and B: not asked the same prompts, so no pairs",
        f"B={bare}": "B: c has no verdicts-policy.jsonl, so its differences cannot be tested",
        f"B={old}": "B: its results.json does not say which verdicts count; run assess.py again",
        f"B={short},{short}": "A and B: different numbers of seeds, so no pairs",
    }
    for spec, reason in cases.items():
        assert compare(read_rows([f"A={one}", spec])) == ([], [reason])


def test_verdicts_that_are_not_those_of_the_results_are_refused(tmp_path: Path) -> None:
    one, other = (write_judged(tmp_path / name, first(2, 9)) for name in "ab")
    path = other / "verdicts-policy.jsonl"
    path.write_text(path.read_text().replace("refused", "complied", 1))
    with pytest.raises(
        ValueError, match=r"verdicts-policy.jsonl: 3 verdicts count for harmful_score, but 2 by results"
    ):
        compare(read_rows([f"A={one}", f"B={other}"]))


def test_a_prompt_with_an_unparsed_verdict_is_no_pair(tmp_path: Path) -> None:
    one = write_judged(tmp_path / "a", first(5, 20), unparsed=4)
    other = write_judged(tmp_path / "b", first(1, 20), unparsed=4)
    verdicts = other / "verdicts-policy.jsonl"
    verdicts.write_text(verdicts.read_text().replace("unparsed", "refused"))
    pair = found_in(f"A={one}", f"B={other}")["harmful_score", "A", "B"]
    assert (pair.pairs, pair.only_first, pair.only_second) == (20, 4, 0)
    assert pair.shares == (5 / 20, 1 / 20)


@pytest.mark.parametrize(
    ("defense", "control", "outcome"),
    [
        (0, 30, "harmful score 0.0% against 50.0%, significantly lower (p < 0.001)"),
        (30, 0, "harmful score 50.0% against 0.0%, significantly higher (p < 0.001)"),
        (2, 4, "harmful score 3.3% against 6.7%, no significant difference (p = 0.5)"),
    ],
)
def test_a_defense_is_held_against_its_control(tmp_path: Path, defense: int, control: int, outcome: str) -> None:
    _, surgery, matched = sweep_rows(tmp_path, (20,))
    write_judged(tmp_path / "surgery_judged20", first(defense, 60))
    write_judged(tmp_path / "surgery_control_judged20", first(control, 60))
    rows = read_rows([matched, surgery])
    assert beyond_slower_learning(rows, compare(rows)[0]) == [
        f"Surgery beside its control, SFT at Surgery's poisoned loss: {outcome}"
    ]
