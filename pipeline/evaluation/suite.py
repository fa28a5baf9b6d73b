"""What a suite gives: prompts, a judge for each answer, and the scores its verdicts add up to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.data.schema import Message


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        id: of its row.
        kind: prompts of one kind are generated together and scored together.
        messages: the turns before the answer.
        label: what the judge compares the answer with, if anything.
    """

    id: str
    kind: str
    messages: tuple[Message, ...]
    label: str


@dataclass(frozen=True)
class Score:
    """A share: the prompts of `kind` whose verdict is `verdict`, under the name it is reported by."""

    name: str
    kind: str
    verdict: str


@dataclass(frozen=True)
class Suite:
    """One set of prompts with its judge.

    Attributes:
        prompts: from an optional system prompt to the questions, the same on every call.
        judge: from a question and the answer to a verdict.
        scores: the shares that are reported.
    """

    prompts: Callable[[str | None], Sequence[Prompt]]
    judge: Callable[[Prompt, str], str]
    scores: tuple[Score, ...]
