"""Data that cannot be trained on: the file and line, or the flag and its value, and what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.config import Problems
from tests.cli.preflight import ROWS, Refused, resolve
from tests.tiny import chat_row, write_jsonl


@pytest.mark.parametrize("flag", ["train_data", "harmful_data", "harmless_data", "eval_data", "attack_data"])
def test_a_missing_or_empty_data_file(refused: Refused, tmp_path: Path, flag: str) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    more = ["--poison_ratio", "0.5"] if flag == "attack_data" else []
    assert refused(f"--{flag}", "{tmp}/none.jsonl", *more) == [f"--{flag} {{tmp}}/none.jsonl: no such file"]
    assert refused(f"--{flag}", "{tmp}/empty.jsonl", *more) == [
        f"--{flag} {{tmp}}/empty.jsonl: empty, it holds no rows"
    ]


def test_a_name_that_is_no_source_lists_the_accepted_ones(refused: Refused) -> None:
    (problem,) = refused("--train_data", "{tmp}/rows.txt")
    assert problem.startswith("--train_data {tmp}/rows.txt: no such file or folder; accepted are .jsonl .json .csv")
    (problem,) = refused("--train_data", "x" * 5000)
    assert problem.endswith("File name too long: '" + "x" * 5000 + "'")
    assert refused("--train_data", "policy:nosuch") == [
        "--train_data policy:nosuch: no such pool; the built-in ones are align, user, attack, harmful, refused, "
        "harmless, benign, test_violation, test_benign, test_task"
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"prompt": \n', "rows.jsonl:901: not valid JSON: Expecting value at column 1"),
        (b"[1]\n", "rows.jsonl:901: a list, expected an object in braces"),
        (b'{"prompt": "p\xff"}\n', "rows.jsonl:901: not UTF-8 text (invalid start byte at byte 14)"),
        (b'{"prompt": "p"}\n', "rows.jsonl:901: 'completion' is missing"),
        (b'{"prompt": "p", "completion": null}\n', "rows.jsonl:901: 'completion' is missing"),
        (b'{"prompt": "p", "completion": " "}\n', "rows.jsonl:901: 'completion' is empty"),
        (b'{"prompt": 3, "completion": "c"}\n', "rows.jsonl:901: 'prompt' is a int, expected text"),
        (
            b'{"prompt": "p", "completion": "c\\ud83d"}\n',
            "rows.jsonl:901: 'completion' holds half a character, '\\ud83d'; remove it",
        ),
    ],
)
def test_a_bad_line(refused: Refused, tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "p", "completion": "c"}\n' * 900 + content)
    (found,) = refused("--train_data", "{tmp}/rows.jsonl")
    assert found.startswith(problem)


def test_conversations_that_do_not_alternate_or_end_with_the_assistant(refused: Refused, tmp_path: Path) -> None:
    user, assistant = ({"role": role, "content": "text"} for role in ("user", "assistant"))
    talks = [[user, assistant], [user, user], [assistant], [user, assistant, user], [{"role": "user", "content": ""}]]
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": talk} for talk in talks])
    for flag in ("train_data", "harmful_data", "eval_data"):
        assert refused(f"--{flag}", "{tmp}/rows.jsonl") == [
            "rows.jsonl:2: turn 2 is user, expected assistant: the roles must alternate",
            "rows.jsonl:3: turn 1 is assistant, expected user: the roles must alternate",
            "rows.jsonl:4: does not end with the assistant",
            "rows.jsonl:5: 'messages' turn 1: 'content' is empty",
        ]


def test_an_unknown_format(refused: Refused, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}])
    (problem,) = refused("--train_data", "{tmp}/rows.jsonl")
    assert problem.startswith("rows.jsonl:1: its keys 'question', 'answer' are none of the formats messages | ")


@pytest.mark.parametrize(("flag", "length"), [("train_data", "max_length"), ("harmful_data", "reference_max_length")])
def test_a_row_without_a_trained_token_after_truncation(
    refused: Refused, tmp_path: Path, flag: str, length: str
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [chat_row("short", "warm"), chat_row("bread " * 60, "warm")])
    (problem,) = refused(f"--{flag}", "{tmp}/rows.jsonl", f"--{length}", "40")
    assert re.fullmatch(
        rf"rows\.jsonl:2: no trained token is left after cutting its \d\d tokens to --{length} 40; "
        rf"raise --{length} or remove the row",
        problem,
    )
    assert refused(f"--{length}", "1") == [
        f"--{length} 1: at least 2 tokens are needed, one to read and one to predict"
    ]


def test_a_reference_pool_without_a_usable_row(refused: Refused, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "response": "r", "is_safe": True}] * 3)
    assert refused("--harmful_data", "{tmp}/rows.jsonl") == [
        "--harmful_data {tmp}/rows.jsonl: none of its 3 rows has is_safe false"
    ]


def test_a_row_with_two_answers(refused: Refused, tmp_path: Path) -> None:
    """The response of an alignment set's row is harmful: a method that does not align must not learn it by mistake."""
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "response": "r", "refusal": "no"}] * 3)
    assert refused("--train_data", "{tmp}/rows.jsonl") == [
        "--train_data {tmp}/rows.jsonl: its rows hold a response and a refusal, and nothing says which is to be "
        "learned: remove one of the two keys"
    ]


def test_a_users_own_data_needs_references_of_its_own(good_flags: list[str]) -> None:
    own = good_flags[: good_flags.index("--harmful_data")] + good_flags[good_flags.index("--output_dir") :]
    with pytest.raises(Problems) as error:
        resolve(own)
    assert error.value.problems == [
        f"--{pool}_data is needed by this --method: the reference pool of {pool} texts"
        for pool in ("harmful", "harmless")
    ]


def test_a_sink_beyond_the_shortest_reference(refused: Refused, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "short.jsonl", [chat_row("bread " * 30, "warm"), chat_row("tea", "no")])
    shortest = refused("--harmful_data", "{tmp}/short.jsonl", "--sink_token_position", "25")
    (problem,) = shortest
    assert re.fullmatch(
        r"--sink_token_position 25: short\.jsonl:2 of --harmful_data has \d\d tokens, and 27 are needed for one query "
        r"after the sink: lower it, or remove the short rows",
        problem,
    )


def test_rows_that_stand_in_two_pools(refused: Refused, pools: dict[str, Path], good_flags: list[str]) -> None:
    reused = ["--harmful_data", str(pools["train"]), "--eval_data", f"fit={pools['train']}[:3]"]
    where = "the first at train.jsonl:1 and train.jsonl:1: use disjoint rows, or --allow_overlap"
    assert refused(*reused) == [
        f"--train_data and --harmful_data share {ROWS} rows, {where}",
        f"--train_data and --eval_data fit share 3 rows, {where}",
        f"--harmful_data and --eval_data fit share 3 rows, {where}",
    ]
    assert resolve([*good_flags, *reused, "--allow_overlap"]).steps == 30


def test_more_rows_asked_for_than_there_are(refused: Refused) -> None:
    assert refused("--sample_num", "30") == [
        f"--sample_num 30: takes 30 rows of --train_data, which has {ROWS}: lower --sample_num"
    ]
    assert refused("--attack_data", "policy:attack", "--poison_ratio", "0.9", "--sample_num", "230") == [
        "--sample_num 230 at --poison_ratio 0.9: takes 207 rows of --attack_data, which has 200: lower --sample_num"
    ]


def test_two_evaluation_sets_of_one_name(refused: Refused) -> None:
    assert refused("--eval_data", "a=policy:benign[:50]", "a=policy:benign[50:]") == [
        "--eval_data a=policy:benign[50:]: two evaluation sets are named a: write name=SPEC"
    ]
    assert refused("--eval_data", "{tmp}/a=b.jsonl") == ["--eval_data {tmp}/a=b.jsonl: no such file"]
