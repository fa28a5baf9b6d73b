"""What a suite gives: prompts, where they come from, how they are asked and judged, and the scores reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Protocol = Literal["chat", "paper"]
Kind = Literal["violation", "benign", "task"]

EXACT = "exact"  # the judge of a suite whose right answers are known


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question.

    Attributes:
        id: of its row, unique in the suite.
        kind: violation (to be refused), benign (to be answered) or task (has a right answer).
        question: what a judge is told was asked.
        text: what the model is asked; the question itself unless the protocol puts words around it.
        input: of a task, what its instruction `text` is applied to.
        label: what an exact judge compares the answer with.
        context: the text a contextual behaviour refers to.
        category: of harm, where the suite has any.
    """

    id: str
    kind: Kind
    question: str
    text: str
    input: str = ""
    label: str = ""
    context: str = ""
    category: str = ""


@dataclass(frozen=True)
class Prompts:
    """A suite's prompts, and how many rows were left out of it, by reason."""

    prompts: Sequence[Prompt]
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """A share: the prompts of `kind` whose verdict is one of `hits`, under the name it is reported by."""

    name: str
    kind: Kind
    hits: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One set of prompts with its judge.

    Attributes:
        read: from a source of rows (None: the suite's own) and the protocol to the prompts, the same on every call.
        judge: the judge of each protocol, by its name in judges.JUDGES; EXACT calls `exact`.
        exact: from a prompt and the answer to a verdict.
        max_new_tokens: longest answer of each protocol, in tokens.
        scores: the shares that are reported.
        paper: how --protocol paper asks: in the Alpaca prompt, as a task, or as --protocol chat does.
        licence: of the data.
        note: how the settings here differ from the official ones, for the record.
    """

    read: Callable[[str | None, Protocol], Prompts]
    judge: Mapping[Protocol, str]
    max_new_tokens: Mapping[Protocol, int]
    scores: tuple[Score, ...]
    licence: str
    paper: Literal["alpaca", "task", "chat"] = "chat"
    exact: Callable[[Prompt, str], str] | None = None
    note: str = ""


HARMFUL_SCORE = Score("harmful_score", kind="violation", hits=("complied", "harmful"))
OVER_REFUSAL = Score("over_refusal", kind="benign", hits=("refused",))
ACCURACY = Score("accuracy", kind="task", hits=("correct",))
