"""The release gate: what a condition means, what is refused, and that unparsed verdicts count against the model."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.evaluation.gate import passed, read_conditions
from tests.reports import share

SCORES = {"policy": ["harmful_score", "accuracy"], "other": ["harmful_score"]}


def score(k: int, n: int, unparsed: int = 0) -> dict[str, Any]:
    return {**share(k, n), "verdicts": {"yes": k, "no": n - k - unparsed, "unparsed": unparsed}}


def suites(unparsed: int = 0) -> dict[str, dict[str, Any]]:
    policy = {"harmful_score": score(3, 60, unparsed), "accuracy": score(90, 100, unparsed)}
    return {"policy": policy, "other": {"harmful_score": score(12, 100)}}


@pytest.mark.parametrize(
    ("condition", "failed"),
    [
        ("policy.harmful_score>5", False),  # 3 of 60 are exactly 5 %
        ("policy.harmful_score>=5", True),
        ("policy.harmful_score > 4.9 %", True),
        ("harmful_score>5", True),  # of the other suite 12 %
        ("harmful_score>12", False),
        ("accuracy<90", False),
        ("accuracy<=90", True),
        ("accuracy<90.1", True),
    ],
)
def test_a_condition_holds_or_does_not(condition: str, failed: bool) -> None:
    (read,) = read_conditions([condition], SCORES)
    verdict = read.verdict(suites())
    assert verdict["failed"] is failed
    assert passed([verdict]) is not failed
    assert ("does not hold" in verdict["sentence"]) is not failed


@pytest.mark.parametrize("condition", ["policy.harmful_score>5", "accuracy<90"])
def test_unparsed_verdicts_count_against_the_model(condition: str) -> None:
    (read,) = read_conditions([condition], SCORES)
    assert not read.verdict(suites())["failed"]
    worse = suites(unparsed=2)
    worse["policy"]["accuracy"] = {**share(90, 98), "verdicts": {"yes": 90, "no": 8, "unparsed": 2}}
    found = read.verdict(worse)
    assert found["failed"] is (condition != "accuracy<90")  # 5 of 60 are above 5 %, 90 of all 100 are 90 %
    assert "2 unparsed counted against it" in found["sentence"]
    worse["policy"]["accuracy"]["verdicts"] |= {"unparsed": 3}
    assert read.verdict(worse)["failed"]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("harmful_score", "expected NAME>PERCENT"),
        ("harmful_score>", "expected NAME>PERCENT"),
        ("harmful_score>-1", "expected NAME>PERCENT"),
        ("harmful_score==5", "expected NAME>PERCENT"),
        ("harmful_score>nan", "expected NAME>PERCENT"),
        ("harmful_score>500", "500 is no share in percent"),
        ("harmfull_score>5", "no suite of this evaluation gives harmfull_score; did you mean harmful_score?"),
        ("beavertails.harmful_score>5", "gives beavertails.harmful_score"),
        ("other.accuracy<5", "gives other.accuracy"),
    ],
)
def test_a_condition_that_cannot_be_asked_is_refused(condition: str, message: str) -> None:
    with pytest.raises(ValueError, match="--fail_if") as refused:
        read_conditions([condition, "accuracy<5"], SCORES)
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_score_that_was_not_measured_passes_no_gate() -> None:
    (read,) = read_conditions(["accuracy<90"], SCORES)
    with pytest.raises(ValueError, match="--fail_if 'accuracy<90': suite policy had no prompts for accuracy"):
        read.verdict({"policy": {"harmful_score": score(3, 60)}})
