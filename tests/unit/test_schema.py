"""Five formats become conversations, and every bad row of a file is reported with its place."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest

from pipeline.data.schema import Conversation, Keep, Message, read_conversations
from tests.tiny import chat_row, write_jsonl

TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
SYSTEM = {"role": "system", "content": "Be kind."}


def read(folder: Path, *rows: Mapping[str, Any], **options: Any) -> list[Conversation]:
    file = write_jsonl(folder / "rows.jsonl", rows)
    return read_conversations(str(file), flag="train_data", **options)


def problems(folder: Path, *rows: Mapping[str, Any], **options: Any) -> list[str]:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read(folder, *rows, **options)
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"messages": TALK}, TALK),
        ({"messages": [SYSTEM, *TALK, *TALK]}, [SYSTEM, *TALK, *TALK]),
        ({"messages": [{**TALK[0], "name": "Ann"}, {**TALK[1], "tool_calls": None}], "source": "x"}, TALK),
        ({"prompt": "Hello", "completion": "Hi"}, TALK),
        ({"prompt": [SYSTEM, TALK[0]], "completion": [TALK[1]]}, [SYSTEM, *TALK]),
        ({"prompt": [SYSTEM, TALK[0]], "completion": "Hi"}, [SYSTEM, *TALK]),
        ({"prompt": "Hello", "response": "Hi"}, TALK),
        ({"instruction": "Hello", "output": "Hi"}, TALK),
        ({"instruction": "Hello", "input": "", "output": "Hi"}, TALK),
        ({"instruction": "Say", "input": "it", "output": "Hi"}, [{"role": "user", "content": "Say\nit"}, TALK[1]]),
        ({"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}, TALK),
        ({"conversations": [{"from": "user", "value": "Hello"}, {"from": "assistant", "value": "Hi"}]}, TALK),
        (
            {
                "system": "Be kind.",
                "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}],
            },
            [SYSTEM, *TALK],
        ),
        (
            {
                "system": "",
                "conversations": [
                    {"from": "system", "value": "Be kind."},
                    {"from": "human", "value": "Hello"},
                    {"from": "gpt", "value": "Hi"},
                ],
            },
            [SYSTEM, *TALK],
        ),
    ],
)
def test_formats(tmp_path: Path, fields: dict[str, Any], messages: list[Message]) -> None:
    assert read(tmp_path, fields) == [Conversation("rows.jsonl:1", tuple(messages))]


def test_text_is_kept_to_the_letter(tmp_path: Path) -> None:
    (conversation,) = read(tmp_path, {"prompt": "  Hello\n", "completion": "\n\nHi  "})
    assert [message["content"] for message in conversation.messages] == ["  Hello\n", "\n\nHi  "]


@pytest.mark.parametrize(("keep", "kept"), [("all", [1, 2, 3]), ("safe", [1, 3]), ("unsafe", [2])])
def test_is_safe_filters_rows(tmp_path: Path, keep: Keep, kept: list[int]) -> None:
    rows = [{"prompt": "p", "response": f"r{n}", "is_safe": n != 2} for n in (1, 2, 3)]
    conversations = read(tmp_path, *rows, keep=keep)
    assert [conversation.id for conversation in conversations] == [f"rows.jsonl:{number}" for number in kept]
    assert [conversation.is_safe for conversation in conversations] == [number != 2 for number in kept]


def test_is_safe_filters_csv_rows_whose_booleans_are_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows([("prompt", "response", "is_safe"), ("p", "r", "True"), ("p", "s", "False")])
    (unsafe,) = read_conversations(str(file), flag="harmful_data", keep="unsafe")
    assert unsafe.messages[1]["content"] == "s"
    assert unsafe.is_safe is False


def test_rows_without_is_safe_are_never_filtered(tmp_path: Path) -> None:
    assert len(read(tmp_path, {"prompt": "p", "response": "r"}, keep="unsafe")) == 1


def test_a_row_that_the_filter_leaves_out_may_be_bad(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": "r", "is_safe": True}, {"prompt": "p", "response": "", "is_safe": False}]
    assert len(read(tmp_path, *rows, keep="safe")) == 1
    assert problems(tmp_path, *rows, keep="unsafe") == ["rows.jsonl:2: 'response' is empty"]


def test_a_filter_that_leaves_nothing(tmp_path: Path) -> None:
    row = {"prompt": "p", "response": "r", "is_safe": True}
    (message,) = problems(tmp_path, row, keep="unsafe")
    assert message == f"--train_data {tmp_path}/rows.jsonl: none of its 1 rows has is_safe false"


def test_the_system_prompt_goes_where_there_is_none(tmp_path: Path) -> None:
    own = {"role": "system", "content": "Own."}
    with_own, without = read(tmp_path, {"messages": [own, *TALK]}, {"messages": TALK}, system_prompt="Be kind.")
    assert with_own.messages == (own, *TALK)
    assert without.messages == (SYSTEM, *TALK)


def test_parquet_and_saved_folders_hold_messages_too(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([chat_row("Hello", "Hi")])
    table.to_parquet(str(tmp_path / "rows.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    for name in ("rows.parquet", "saved"):
        (conversation,) = read_conversations(str(tmp_path / name), flag="train_data")
        assert conversation == Conversation(f"{name}:1", tuple(TALK))


def test_an_unknown_format_names_the_keys_seen_and_the_formats(tmp_path: Path) -> None:
    (message,) = problems(tmp_path, {"question": "q", "answer": "a"})
    assert message == (
        "rows.jsonl:1: its keys 'question', 'answer' are none of the formats messages | conversations | "
        "prompt + completion | prompt + response | instruction + output"
    )


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "text"} for role in roles]}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"other": 1}, "'messages' is missing"),
        ({"messages": None}, "'messages' is missing"),
        ({"messages": "Hello"}, "'messages' is a str, expected a list of turns"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": ["Hello"]}, "'messages' turn 1: a str, expected an object with 'role' and 'content'"),
        ({"messages": [{"role": "user"}]}, "'messages' turn 1: 'content' is missing"),
        ({"messages": [{"content": "Hello"}]}, "'messages' turn 1: 'role' is missing"),
        ({"messages": [{"role": "user", "content": " \n"}]}, "'messages' turn 1: 'content' is empty"),
        ({"messages": [TALK[0], {"role": "assistant", "content": ["Hi"]}]}, "turn 2: 'content' is a list"),
        ({"messages": [*TALK, {"role": "tool", "content": "4"}]}, "turn 3: role 'tool' is not supported"),
        ({"messages": [TALK[0], {**TALK[1], "tool_calls": [{}]}]}, "turn 2: tool calls are not supported"),
        (turns("assistant"), "turn 1 is assistant, expected user"),
        (turns("user", "user", "assistant"), "turn 2 is user, expected assistant"),
        (turns("system", "assistant"), "turn 2 is assistant, expected user"),
        (turns("user", "assistant", "system", "assistant"), "turn 3 is system, expected user"),
        (turns("user", "assistant", "user"), "does not end with the assistant"),
        (turns("system"), "does not end with the assistant"),
    ],
)
def test_bad_messages(tmp_path: Path, fields: dict[str, Any], problem: str) -> None:
    (message,) = problems(tmp_path, {"messages": TALK}, fields)
    assert message.startswith("rows.jsonl:2: ")
    assert problem in message


@pytest.mark.parametrize(
    ("good", "bad", "problem"),
    [
        ({"prompt": "p", "completion": "c"}, {"prompt": "p"}, "'completion' is missing"),
        ({"prompt": "p", "completion": "c"}, {"prompt": 3, "completion": "c"}, "'prompt' is a int, expected text"),
        ({"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": [TALK[0]]}, "turn 2 is user"),
        ({"instruction": "i", "output": "o"}, {"instruction": "", "output": "o"}, "'instruction' is empty"),
        ({"instruction": "i", "output": "o"}, {"instruction": "i", "input": 5, "output": "o"}, "'input' is a int"),
        ({"prompt": "p", "response": "r", "is_safe": True}, {"prompt": "p", "response": "r"}, "'is_safe' is None"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function", "value": "b"}]},
            "'conversations' turn 2: role 'function' is not supported",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {
                "system": "s",
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                ],
            },
            "a 'system' field beside a system turn",
        ),
    ],
)
def test_bad_rows_of_other_formats(tmp_path: Path, good: dict[str, Any], bad: dict[str, Any], problem: str) -> None:
    (message,) = problems(tmp_path, good, bad)
    assert message.startswith("rows.jsonl:2: ")
    assert problem in message


def test_all_bad_rows_are_reported_together(tmp_path: Path) -> None:
    good, bad = {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": ""}
    lines = problems(tmp_path, good, *[bad] * 23)
    assert lines == [*(f"rows.jsonl:{number}: 'completion' is empty" for number in range(2, 22)), "and 3 more"]


def test_the_key_is_that_of_the_messages(tmp_path: Path) -> None:
    first, same, other = read(tmp_path, {"messages": TALK}, {"messages": TALK}, {"messages": [*TALK, *TALK]})
    assert first.key == same.key != other.key
