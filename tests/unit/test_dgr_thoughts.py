"""Thoughts under the chat templates of R1's distilled models and Qwen3: trained exactly as they are generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.data.chat import IGNORE, ChatEncoder
from pipeline.data.schema import Conversation, read_conversations
from pipeline.data.thinking import join_thought, split_thought
from tests import tiny
from tests.reasoners import TEMPLATES

QUESTION = {"role": "user", "content": "How do I bake bread?"}
THOUGHT, ANSWER = "Flour and water.\n\nThen wait.", "Mix flour and water, then bake it."


def encoder(template: str, **settings: Any) -> ChatEncoder:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    return ChatEncoder(tokenizer, max_length=settings.get("max_length", 512))


def row(turn: str) -> Conversation:
    return Conversation("rows.jsonl:7", (QUESTION, {"role": "assistant", "content": turn}))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "turn",
    [
        join_thought(THOUGHT, ANSWER),
        f"<think>{THOUGHT}</think>{ANSWER}",
        f"{THOUGHT}\n</think>\n\n{ANSWER}",
    ],
    ids=["as generated", "tight", "opened by the prompt"],
)
def test_training_tokens_are_the_prompt_and_what_is_generated_after_it(template: str, turn: str) -> None:
    chat = encoder(template)
    example = chat.encode(row(turn))
    prompt = chat.encode_prompt([QUESTION])
    generated = join_thought(THOUGHT, ANSWER)
    if chat.tokenizer.decode(prompt).endswith("<think>\n"):
        generated = generated.removeprefix("<think>\n")
    trained = [label for label in example.labels if label != IGNORE]
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[: len(prompt)] == [IGNORE] * len(prompt)
    assert chat.tokenizer.decode(trained) == generated + tiny.EOS
    assert example.input_ids[len(prompt) : len(prompt) + len(trained)] == trained


@pytest.mark.parametrize("template", ["qwen3", "qwen3-thinking"])
def test_a_template_that_keeps_the_thought_gives_the_same_text(template: str) -> None:
    chat = encoder(template)
    messages = list(row(join_thought(THOUGHT, ANSWER)).messages)
    own = str(chat.tokenizer.apply_chat_template(messages, tokenize=False))
    assert chat.tokenizer.decode(chat.encode(row(join_thought(THOUGHT, ANSWER))).input_ids) == own
    assert THOUGHT in own


def test_r1_drops_the_thought_unless_it_is_kept_for_it() -> None:
    chat = encoder("r1")
    messages = list(row(join_thought(THOUGHT, ANSWER)).messages)
    assert THOUGHT not in str(chat.tokenizer.apply_chat_template(messages, tokenize=False))
    assert THOUGHT in chat.tokenizer.decode(chat.encode(row(join_thought(THOUGHT, ANSWER))).input_ids)


def test_an_empty_thought_is_what_qwen3_writes_for_none() -> None:
    chat = encoder("qwen3")
    assert chat.encode(row(join_thought("", ANSWER))) == chat.encode(row(ANSWER))


def test_a_template_that_knows_no_thoughts_sees_text() -> None:
    tokenizer = tiny.tiny_tokenizer()
    chat = ChatEncoder(tokenizer, max_length=512)
    assert not chat.thinks
    assert join_thought(THOUGHT, ANSWER) in tokenizer.decode(chat.encode(row(join_thought(THOUGHT, ANSWER))).input_ids)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ("<think>a</think>b<think>c</think>d", r"rows.jsonl:7: expected one thought.*2 <think> and 2 </think>"),
        ("before <think>a</think>b", "rows.jsonl:7: expected one thought"),
        ("<think>a</think>\n", "rows.jsonl:7: no answer stands behind its thought"),
    ],
)
def test_a_broken_thought_names_its_row(turn: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder("r1").encode(row(turn))


def test_split_and_join_are_each_others_inverse() -> None:
    assert split_thought(join_thought(THOUGHT, ANSWER)) == (THOUGHT, ANSWER)
    assert split_thought(ANSWER) == (None, ANSWER)
    with pytest.raises(ValueError, match="1 <think> and 0 </think>"):
        split_thought("<think>never closed")


def test_a_file_of_thoughts_is_read_as_training_reads_it(tmp_path: Path) -> None:
    path = tiny.write_jsonl(
        tmp_path / "rows.jsonl", [tiny.chat_row("How?", join_thought(THOUGHT, ANSWER), id="x", origin="refined")]
    )
    (conversation,) = read_conversations(str(path), flag="train_data")
    trained = [label for label in encoder("r1-opened").encode(conversation).labels if label != IGNORE]
    assert tiny.tiny_tokenizer().decode(trained) == f"{THOUGHT}\n</think>\n\n{ANSWER}{tiny.EOS}"
