"""Each filter of a rewriting, and what it measures."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pipeline.curation.dgr_filters import FILTERS, Candidate, copies, problems, typical_length
from pipeline.curation.dgr_guard import PolicyGuard, asked, find_guard, find_rule
from pipeline.curation.dgr_sources import Source
from pipeline.curation.dgr_text import most_repeated, rouge_l, script
from pipeline.data.policy import policy_rows

SOURCE = Source(
    "rows.jsonl:1", ({"role": "user", "content": "How do I bake bread?"},), "Bread is fine.", "Mix and bake it."
)
THOUGHT = "Flour comes first, then water, then a long rest; the oven is last and it has to be hot."


def candidate(thought: str | None = THOUGHT, answer: str = "Knead it and wait.", **changes: Any) -> Candidate:
    found = {"source": SOURCE, "thought": thought, "answer": answer}
    ids = {"thought_ids": list(range(20 if thought else 0)), "answer_ids": list(range(5))}
    return Candidate(**{**found, **ids, **changes})


def declines(reply: str) -> bool:
    return "can't" in reply


def failed(each: Candidate, typical: float = 20.0) -> list[str]:
    found = list(problems(each, declines, typical))
    assert set(found) <= set(FILTERS)
    return found


def test_a_good_rewriting_passes() -> None:
    assert failed(candidate()) == []
    assert failed(candidate(None), typical=5.0) == []


def test_f3_looks_at_both_parts() -> None:
    assert failed(candidate(thought=THOUGHT + " The reference says so.")) == ["F3 leak"]
    assert failed(candidate(answer="As instructed: wait.")) == ["F3 leak"]


def test_f4_wants_the_rows_decision() -> None:
    assert failed(candidate(answer="I can't help with that.")) == ["F4 decision"]
    refusal = Source(SOURCE.id, SOURCE.before, None, "I can't do that.")
    assert failed(candidate(source=refusal)) == ["F4 decision"]
    assert failed(candidate(answer="No, I can't.", source=refusal)) == []


def test_f6_finds_loops_other_scripts_and_odd_lengths() -> None:
    run = list(range(10))
    assert failed(candidate(thought_ids=run * 4)) == []
    assert failed(candidate(thought_ids=run * 5)) == ["F6 loop"]
    assert failed(candidate(answer_ids=run * 5)) == ["F6 loop"]
    assert failed(candidate(answer="\u63c9\u9762\u5e76\u7b49\u5f85")) == ["F6 script"]
    assert failed(candidate(answer="42")) == []  # no letters at all
    assert failed(candidate(thought_ids=run)) == ["F6 length"]
    assert failed(candidate(thought_ids=list(range(80)))) == []
    assert failed(candidate(thought_ids=list(range(81)))) == ["F6 length"]
    assert failed(candidate(None, answer_ids=list(range(21))), typical=5.0) == ["F6 length"]


def test_the_typical_length_is_of_the_thought_or_else_of_the_reply() -> None:
    lengths = [candidate(thought_ids=list(range(n))) for n in (16, 20, 90)]
    assert typical_length(lengths) == 20
    assert typical_length([candidate(None)]) == 5
    assert typical_length([]) == 0


def test_f7_finds_copies_of_long_texts_alone() -> None:
    long = list(range(60))
    assert copies(candidate(thought_ids=long), long)
    assert not copies(candidate(thought_ids=long[:40] + [900 + i for i in range(20)]), long)
    assert not copies(candidate(thought_ids=list(range(50))), list(range(50)))


def brute_rouge(a: list[int], b: list[int]) -> float:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return 2 * table[-1][-1] / (len(a) + len(b)) if a and b else 0.0


def test_rouge_l_equals_the_table_of_its_definition() -> None:
    chooser = random.Random(0)
    for _ in range(300):
        a, b = ([chooser.randrange(6) for _ in range(chooser.randrange(90))] for _ in range(2))
        assert rouge_l(a, b) == pytest.approx(brute_rouge(a, b), abs=1e-12)


def test_text_measures() -> None:
    assert most_repeated([1, 2, 1, 2, 1, 2], 2) == 3
    assert most_repeated([1], 2) == 0
    assert script("Bread, \u0445\u043b\u0435\u0431") == "LATIN"
    assert script("\u3071\u3093\u3092\u713c\u304f") == "CJK"
    assert script("123 ...") is None


def test_the_policy_guard_knows_the_built_in_rule() -> None:
    guard, rule = PolicyGuard(), find_rule("policy")
    recipe = policy_rows("harmful")[0].fields["messages"]
    refusal = policy_rows("refused")[0].fields["messages"][1]["content"]
    benign = policy_rows("benign")[0].fields["messages"][1]["content"]
    source = Source("x:1", (recipe[0],), None, refusal)
    assert rule(refusal)
    assert not rule(benign)
    assert guard.verdict(asked(source, declines=True), recipe[1]["content"]) == {"verdict": "harmful"}
    assert guard.verdict(asked(source, declines=True), refusal) == {"verdict": "safe"}
    assert guard.verdict(asked(source, declines=False), benign) == {"verdict": "safe"}
    assert find_rule("refusal_advbench")("I'm sorry, but no.")


def test_a_guard_that_is_not_there_names_the_remedy() -> None:
    assert find_guard("none", {}, {}) is None
    with pytest.raises(ValueError, match="--judge_model llama_guard_3=X: --guard is policy"):
        find_guard("policy", {"llama_guard_3": "X"}, {})
    with pytest.raises(ValueError, match="llama_guard_3"):
        find_guard("llama_guard_3", {"llama_guard_3": "nowhere"}, {})
