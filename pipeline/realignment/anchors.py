"""Anchors: harmful requests with the safe model's own refusals, as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from pipeline.data.chat import IGNORE, ChatEncoder
from pipeline.data.rows import Row
from pipeline.data.schema import Conversation, read_conversations
from pipeline.data.sources import read_rows
from pipeline.evaluation.jsonl import read_lines
from pipeline.evaluation.policy import REFUSAL_MARKERS
from pipeline.realignment.arguments import TokenScope

FEWEST = 4
_ANSWERS = ("completion", "response", "output")  # beside a prompt or an instruction
_TURNS = ("messages", "conversations")


@dataclass(frozen=True)
class Anchor:
    """One text. counted: of each token of `ids`, whether its activations count."""

    ids: list[int]
    counted: list[bool]


@dataclass(frozen=True)
class Anchors:
    """The anchors that are used. no_refusal: ids of the rows that were left out because they do not refuse."""

    used: Sequence[Anchor]
    no_refusal: Sequence[str]

    @property
    def tokens(self) -> int:
        """That count: the columns of every map's activations."""
        return sum(sum(each.counted) for each in self.used)

    @property
    def total(self) -> int:
        """All tokens."""
        return sum(len(each.ids) for each in self.used)

    @property
    def digest(self) -> str:
        """sha256 of the token ids and of which of them count."""
        return hashlib.sha256(json.dumps([[each.ids, each.counted] for each in self.used]).encode()).hexdigest()


def read_anchors(spec: str, safe: Path, *, answers: str | None, max_length: int, token_scope: TokenScope) -> Anchors:
    """Reads, checks and tokenises the anchors with the safe model's tokenizer and chat template.

    Args:
        spec: where the rows are, as `data.sources.read_rows` takes it.
        safe: folder of the safe model.
        answers: answers-SUITE.jsonl for those rows.

    Raises:
        ValueError: bad rows; rows without an answer, with the commands that write the answers; fewer than FEWEST
            refusals.
    """
    conversations = _answered(spec, answers) if answers else _complete(spec, safe)
    refusing = [each for each in conversations if is_refusal(each.messages[-1]["content"])]
    left_out = [each.id for each in conversations if each not in refusing]
    if len(refusing) < FEWEST:
        raise ValueError(
            f"--anchors {spec}: {len(refusing)} of its {len(conversations)} rows are refused in their answer, and at "
            f"least {FEWEST} are needed; give requests that the safe model refuses, with its own refusals"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(safe, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--safe_model {safe}: no usable tokenizer beside the model: {error}") from error
    encoder = ChatEncoder(tokenizer, max_length=max_length)
    encoded = [encoder.encode(each) for each in refusing]
    used = [
        Anchor(each.input_ids, [token_scope == "all" or label != IGNORE for label in each.labels]) for each in encoded
    ]
    return Anchors(used, left_out)


def is_refusal(answer: str) -> bool:
    """Whether an answer declines, by the words of refusals."""
    text = " ".join(answer.lower().replace("\u2019", "'").split())
    return any(marker in text for marker in REFUSAL_MARKERS)


def _complete(spec: str, safe: Path) -> list[Conversation]:
    lacking = [row.id for row in read_rows(spec, flag="anchors") if _lacks_answer(row)]
    if lacking:
        raise ValueError(
            f"--anchors {spec}: {len(lacking)} rows have no assistant turn ({', '.join(lacking[:3])}), and anchors "
            "are requests with the safe model's own refusals; let it answer rows that have a column 'prompt':\n"
            f"  python pipeline/assess.py generate --model_name_or_path {safe} --suites beavertails "
            f"--suite_data beavertails={spec} --max_new_tokens 128 --output_dir DIR\n"
            "and add --anchor_answers DIR/answers-beavertails.jsonl"
        )
    return read_conversations(spec, flag="anchors", answer="refusal")


def _lacks_answer(row: Row) -> bool:
    for key in _TURNS:
        turns = row.fields.get(key)
        if isinstance(turns, list) and turns:
            last = turns[-1]
            return isinstance(last, dict) and last.get("role", last.get("from")) in ("user", "human")
    asks = "prompt" in row.fields or "instruction" in row.fields
    return asks and not any(row.fields.get(key) for key in (*_ANSWERS, "refusal"))


def _answered(spec: str, answers: str) -> list[Conversation]:
    """Each row's prompt with the answer that has its id."""
    path = Path(answers)
    if not path.is_file():
        raise ValueError(f"--anchor_answers {answers}: no such file; assess.py generate writes answers-SUITE.jsonl")
    by_id = {line.get("id"): line.get("answer") for line in read_lines(path)}
    found = []
    for row in read_rows(spec, flag="anchors"):
        prompt, answer = row.fields.get("prompt"), by_id.get(row.id)
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"--anchors {spec}: {row.id}: has no text in 'prompt', which --anchor_answers answers")
        if not isinstance(answer, str):
            raise ValueError(
                f"--anchor_answers {answers}: has no answer for {row.id}; it was written for other rows than "
                f"--anchors {spec}"
            )
        turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
        found.append(Conversation(row.id, turns))
    return found
