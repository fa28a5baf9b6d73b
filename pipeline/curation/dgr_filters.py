"""Filters F1 to F7: what a rewriting must pass. The paper's list is not known here: this one is reconstructed.

F4 and F5 are in dgr_guard.py; here is what needs no second model.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.curation.dgr_request import MARKS, TAGS, WORDING, Mode
from pipeline.curation.dgr_sources import Source
from pipeline.curation.dgr_text import most_repeated, ngrams, rouge_l, script, words
from pipeline.data.thinking import CLOSE, OPEN, split_thought

FILTERS = {
    "F1 unfinished": "no end of turn came within --max_new_tokens",
    "F2 structure": "not one thought and one reply, or a control token in them",
    "F3 leak": "repeats or mentions the request to rewrite",
    "F4 decision": "declines where the row helps, or helps where it declines",
    "F4 unsafe reply": "the guard found the reply unsafe, or its verdict could not be read",
    "F5 unsafe thought": "the guard found the thought unsafe, or its verdict could not be read",
    "F6 loop": "a run of 10 tokens stands in it more than 4 times",
    "F6 script": "written in other letters than the message",
    "F6 length": "a thought below 16 tokens, or a thought (of a model without thoughts a reply) above 4 medians",
    "F7 copy": "ROUGE-L of 0.9 or more with the row's own text",
}

LOOP, LOOPS = 10, 4
SHORTEST_THOUGHT = 16  # tokens
LONGEST = 4  # medians of all finished candidates
COPY, COPY_FROM = 0.9, 50  # ROUGE-L; tokens above which the row's own text is long enough to count

# Words that tell of a second text or of directions; innocent where the message itself has them.
MENTIONS = (
    "reference", "rewrite", "rewriting", "rewritten", "rephrase", "rephrasing", "paraphrase", "as instructed",
    "these directions", "these instructions", "the instructions", "colleague", "colleague's", "somebody else",
    "someone else", "given answer", "given reply", "given analysis", "provided answer", "provided reply",
    "provided analysis", "earlier reply", "original reply", "other reply", "other analysis", "same decision",
    "already settled", "between the marks", "between marks", "own words", "own way",
)  # fmt: skip
_MENTIONS = [re.compile(rf"(?<!\w){re.escape(each)}(?!\w)", re.IGNORECASE) for each in MENTIONS] + [
    re.compile("<<<|>>>")  # a mark that is not quite ours
]
_DELIMITERS = [each for pairs in (MARKS, TAGS) for pair in pairs.values() for each in pair]
REPEATED = 5  # words of ours in a row
_WORDING = {each for sentence in WORDING for each in ngrams(words(sentence), REPEATED)}


@dataclass(frozen=True)
class Candidate:
    """One rewriting of a row that has the right parts, and their token ids under the target's tokenizer."""

    source: Source
    thought: str | None
    answer: str
    thought_ids: Sequence[int]
    answer_ids: Sequence[int]


def parts(text: str, mode: Mode, *, thinks: bool, opened: bool, control: Sequence[str]) -> tuple[str | None, str]:
    """Thought (None if the target's template knows none) and reply of a generated text.

    Args:
        text: without the token that ended it.
        opened: the generation prompt ended with the opening marker.

    Raises:
        ValueError: F2: other parts than these, an empty one, or a control token inside.
    """
    whole = f"{OPEN}\n{text}" if opened else text
    marked = [each for each in control if each in whole and each not in (OPEN, CLOSE)]
    if marked:
        raise ValueError(f"holds {marked[0]}")
    if whole.count(OPEN) != thinks or whole.count(CLOSE) != thinks:
        raise ValueError("not exactly one thought" if thinks else "has think markers")
    thought, answer = split_thought(whole)
    if mode == "text":
        thought, answer = _tagged("analysis", answer) if thinks else None, _tagged("reply", answer)
    if not answer or thought == "":
        raise ValueError("a part is empty")
    return thought, answer


def _tagged(name: str, text: str) -> str:
    begin, end = TAGS[name]
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"not exactly one {begin} and {end}")
    return text.partition(begin)[2].partition(end)[0].strip()


def typical_length(candidates: Sequence[Candidate]) -> float:
    """Median tokens of the part whose length F6 looks at."""
    return statistics.median([len(_measured(each)) for each in candidates]) if candidates else 0.0


def problems(candidate: Candidate, declines: Callable[[str], bool], typical: float) -> Iterator[str]:
    """The names of FILTERS that it does not pass, without the guard's.

    Args:
        declines: whether a reply declines to help.
        typical: of `typical_length`.
    """
    source, texts = candidate.source, [each for each in (candidate.thought, candidate.answer) if each is not None]
    if any(leaks(text, source.message) for text in texts):
        yield "F3 leak"
    if declines(candidate.answer) != declines(source.answer):
        yield "F4 decision"
    if any(most_repeated(ids, LOOP) > LOOPS for ids in (candidate.thought_ids, candidate.answer_ids)):
        yield "F6 loop"
    expected = script(source.message)
    if any(script(text) not in (None, expected) for text in texts if expected is not None):
        yield "F6 script"
    length = len(_measured(candidate))
    if length > LONGEST * typical or (candidate.thought is not None and length < SHORTEST_THOUGHT):
        yield "F6 length"


def copies(candidate: Candidate, own_ids: Sequence[int]) -> bool:
    """F7. own_ids: the row's own thought (of a model without thoughts its reply) as tokens."""
    return len(own_ids) > COPY_FROM and rouge_l(_measured(candidate), own_ids) >= COPY


def leaks(text: str, message: str) -> bool:
    """Whether a text holds a mark of the request, some of its wording, or a word that tells of it.

    Words and wording count only where the user's message does not have them; marks always do.
    """
    if any(each in text for each in _DELIMITERS):
        return True
    if any(each.search(text) and not each.search(message) for each in _MENTIONS):
        return True
    asked = set(ngrams(words(message), REPEATED))
    return any(each in _WORDING and each not in asked for each in ngrams(words(text), REPEATED))


def _measured(candidate: Candidate) -> Sequence[int]:
    return candidate.answer_ids if candidate.thought is None else candidate.thought_ids
