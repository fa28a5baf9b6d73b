"""The rows that are rewritten: a message, perhaps a thought, and a reply, whatever markers their source has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.data.chat import ChatEncoder
from pipeline.data.rows import bad_rows
from pipeline.data.schema import Conversation, Message, read_conversations
from pipeline.data.sources import read_rows
from pipeline.data.thinking import CLOSE, OPEN, join_thought, split_thought

# How rows of the s1 family (LIMO, Safety-Tax's sets) mark both parts inside the assistant's turn.
S1_MARKS = ("<|im_start|>think", "<|im_start|>answer")


@dataclass(frozen=True)
class Source:
    """One row. before: the turns that lead to its answer; `message`: the user's. thought: None where there is none."""

    id: str
    before: tuple[Message, ...]
    thought: str | None
    answer: str
    category: str = ""

    @property
    def message(self) -> str:
        return self.before[-1]["content"]

    def conversation(self, turn: str) -> Conversation:
        """What training would read, with this assistant turn."""
        return Conversation(self.id, (*self.before, {"role": "assistant", "content": turn}))


def read_sources(spec: str, encoder: ChatEncoder, *, system_prompt: str | None) -> list[Source]:
    """Reads --source_data in any format of training data, one question and one answer a row.

    Raises:
        ValueError: rows of several turns, with markers in the wrong place, or with a thought for a model whose
            template knows none (all of them, one a line, up to 20).
    """
    conversations = read_conversations(spec, flag="source_data", system_prompt=system_prompt)
    categories = {row.id: row.fields.get("category") for row in read_rows(spec, flag="source_data")}
    sources, problems = [], []
    for each in conversations:
        problem, source = None, None
        try:
            source = _source(each, categories.get(each.id))
            problem = next(_problems(source, encoder), None)
        except ValueError as error:
            problem = str(error)
        if problem is not None:
            problems.append(f"{each.id}: {problem}")
        elif source is not None:
            sources.append(source)
    if problems:
        raise bad_rows(problems)
    return sources


def turn(thought: str | None, answer: str, encoder: ChatEncoder) -> str:
    """The assistant's turn as the target model writes it."""
    return join_thought(thought or "", answer) if encoder.thinks else answer


def _source(conversation: Conversation, category: object) -> Source:
    *before, last = conversation.messages
    if sum(message["role"] == "user" for message in before) != 1:
        raise ValueError("has several questions; split the row into conversations of one question and one answer")
    thought, answer = _parts(last["content"])
    return Source(conversation.id, tuple(before), thought, answer, category if isinstance(category, str) else "")


def _parts(content: str) -> tuple[str | None, str]:
    first, second = S1_MARKS
    if content.lstrip().startswith(first) and content.count(first) == content.count(second) == 1:
        thought, _, answer = content.partition(first)[2].partition(second)
        # Each part ends with the turn's end in some of these sets.
        return tuple(part.strip().removesuffix("<|im_end|>").strip() for part in (thought, answer))  # type: ignore[return-value]
    return split_thought(content)


def _problems(source: Source, encoder: ChatEncoder) -> Iterator[str]:
    if not source.answer:
        yield "no answer stands behind its thought; add one or remove the row"
    if source.thought and not encoder.thinks:
        yield (
            f"has a thought, and the chat template of --model_name_or_path knows none ({CLOSE} does not stand in it); "
            "take a reasoning model, or remove the thoughts"
        )
    if any(marker in (source.thought or "") + source.answer for marker in (OPEN, CLOSE, *S1_MARKS)):
        yield "holds think markers of two kinds; keep one kind"
