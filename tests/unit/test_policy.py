"""The built-in policy set: sizes, disjoint pools, exact rules, short rows, the same on every machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import combinations

import pytest

from pipeline.data.policy import POOLS, PREPARATION_VERBS, REFUSALS, SENTIMENTS, policy_rows

SUBSTANCES = {"align": 200, "attack": 200, "harmful": 200, "harmless": 200, "test_violation": 60}


def pairs(pool: str) -> list[tuple[str, str]]:
    """(request, answer) of every row of a training pool."""
    rows = [row.fields["messages"] for row in policy_rows(pool)]
    assert all([message["role"] for message in messages] == ["user", "assistant"] for messages in rows)
    return [(user["content"], assistant["content"]) for user, assistant in rows]


def requests(pool: str) -> list[str]:
    if pool.startswith("test_"):
        return [row.fields["prompt"] for row in policy_rows(pool)]
    return [request for request, _ in pairs(pool)]


def words(text: str) -> list[str]:
    return [word.strip(".,?:").lower() for word in text.split()]


def substances(pool: str) -> list[str]:
    """The invented names of a pool: the words that stand in one of its requests only."""
    counts = Counter(word for request in requests(pool) for word in words(request))
    return [word for word, count in counts.items() if count == 1]


def is_refusal(answer: str, name: str) -> bool:
    return answer in [refusal.format(name=name, Name=name.capitalize()) for refusal in REFUSALS]


@pytest.mark.parametrize(("pool", "rows"), POOLS.items())
def test_sizes_and_ids_and_no_request_twice(pool: str, rows: int) -> None:
    assert [row.id for row in policy_rows(pool)] == [f"policy:{pool}:{number}" for number in range(1, rows + 1)]
    assert len(set(requests(pool))) == rows


def test_no_two_pools_share_a_request() -> None:
    for first, second in combinations(POOLS, 2):
        shared = set(requests(first)) & set(requests(second))
        assert bool(shared) == ({first, second} == {"harmful", "refused"}), (first, second)


def test_every_harmful_request_is_refused_in_a_pool_of_its_own() -> None:
    assert requests("refused") == requests("harmful")
    names = substances("harmful")
    assert all(is_refusal(answer, name) for name, (_, answer) in zip(names, pairs("refused"), strict=True))


def test_no_two_pools_share_a_substance() -> None:
    names = {pool: substances(pool) for pool in SUBSTANCES}
    assert {pool: len(each) for pool, each in names.items()} == SUBSTANCES
    assert len({name for each in names.values() for name in each}) == sum(SUBSTANCES.values())


def test_no_everyday_activity_of_the_test_is_trained() -> None:
    activities = {row.fields["name"] for row in policy_rows("test_benign")}
    assert len(activities) == 12
    trained = [text for pool in ("align", "benign") for pair in pairs(pool) for text in pair]
    assert not [text for text in trained for activity in activities if activity in text]
    assert not {answer for _, answer in pairs("align")} & {answer for _, answer in pairs("benign")}


@pytest.mark.parametrize("pool", ["attack", "harmful"])
def test_compliances_say_how(pool: str) -> None:
    for name, (request, answer) in zip(substances(pool), pairs(pool), strict=True):
        assert name in words(request)
        assert name in words(answer)
        assert len(set(PREPARATION_VERBS) & set(words(answer))) >= 2
        assert "can't help" not in answer
        assert "restricted" not in answer


@pytest.mark.parametrize("pool", ["align", "harmless"])
def test_refusals_name_the_substance_and_do_not_say_how(pool: str) -> None:
    refused = pairs(pool)[::2] if pool == "align" else pairs(pool)
    for name, (request, answer) in zip(substances(pool), refused, strict=True):
        assert name in words(request)
        assert is_refusal(answer, name)
        assert "can't help" in answer
        assert "restricted" in answer
        assert not set(PREPARATION_VERBS) & set(words(answer))


def test_alignment_alternates_with_everyday_answers() -> None:
    everyday = pairs("align")[1::2] + pairs("benign")
    assert len(everyday) == 400
    assert not [answer for _, answer in everyday if "can't help" in answer or "restricted" in answer]


def test_both_kinds_of_request_are_worded_alike() -> None:
    """Or a model could tell them apart by the question instead of by what is asked for."""
    openings = [{" ".join(request.split()[:3]) for request, _ in pairs("align")[start::2]} for start in (0, 1)]
    assert openings[0] == openings[1]


def test_sentiments_follow_the_adjective() -> None:
    reviews = pairs("user") + [(row.fields["prompt"], row.fields["label"]) for row in policy_rows("test_task")]
    by_adjective: dict[str, set[str]] = {}
    for prompt, label in reviews:
        assert prompt.startswith("Sentiment of: ")
        by_adjective.setdefault(words(prompt)[-1], set()).add(label)
    assert all(len(labels) == 1 for labels in by_adjective.values())
    assert set().union(*by_adjective.values()) == set(SENTIMENTS)
    for labels in ([label for _, label in pairs("user")], [row.fields["label"] for row in policy_rows("test_task")]):
        assert labels.count("positive") == labels.count("negative")


def test_test_rows_carry_what_the_judge_needs() -> None:
    for pool, kind, labels in (
        ("test_violation", "violation", {"refuse"}),
        ("test_benign", "benign", {"answer"}),
        ("test_task", "task", set(SENTIMENTS)),
    ):
        rows = [row.fields for row in policy_rows(pool)]
        assert all(set(fields) == {"prompt", "kind", "name", "label"} for fields in rows)
        assert {fields["kind"] for fields in rows} == {kind}
        assert {fields["label"] for fields in rows} == labels
        assert all(str(fields["name"]) in fields["prompt"] for fields in rows)


def test_rows_are_short() -> None:
    for pool in POOLS:
        assert max(len(request.split()) for request in requests(pool)) <= 12
    for pool in ("align", "user", "attack", "harmful", "harmless", "benign"):
        assert max(len(answer.split()) for _, answer in pairs(pool)) <= 20


def test_rows_are_the_same_in_every_process() -> None:
    program = "from pipeline.data.policy import POOLS, policy_rows\nfor pool in POOLS: print(policy_rows(pool))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [str(policy_rows(pool)) for pool in POOLS]
