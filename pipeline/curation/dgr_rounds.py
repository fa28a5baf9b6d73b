"""The rewriting itself: sample, filter, keep the likeliest; what fails is tried again in another way, or falls back.

Eq. (3) of the paper: a row becomes its rewriting if one passes the filters, else it stays what it was.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.curation.dgr_filters import Candidate, copies, parts, problems, typical_length
from pipeline.curation.dgr_guard import UNSAFE, asked
from pipeline.curation.dgr_request import STRENGTHS, Mode, Request, Strength
from pipeline.curation.dgr_sources import Source, turn
from pipeline.curation.dgr_stages import Lines, Stages
from pipeline.curation.dgr_target import Target
from pipeline.data.chat import IGNORE, Example

PROBED = 50  # rows on which --strength auto compares the three


@dataclass
class Outcome:
    """What became of a row. turn: the rewriting that was kept, None where none passed; reasons: how many of its
    candidates failed each filter; after: the likelihood of `turn`."""

    source: Source
    turn: str | None = None
    tries: int = 0
    round: int | None = None
    strength: Strength | None = None
    sample: int | None = None
    reasons: Counter[str] = field(default_factory=Counter)
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] | None = None


@dataclass
class _Try:
    """One sample of a row; `candidate` is None if it has not the right parts."""

    id: str
    source: Source
    sample: int
    reasons: list[str]
    candidate: Candidate | None = None


class Rewriting:
    """Rewrites rows with one target. declines: whether a reply declines (--refusal_rule).

    Raises:
        ValueError: a row whose request, or whose own turn, is too long.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        target: Target,
        declines: Callable[[str], bool],
        *,
        mode: Mode,
        samples: int,
        max_new_tokens: int,
        strengths: Sequence[Strength],
    ) -> None:
        self.sources, self._target, self._rule, self._mode, self._samples = sources, target, declines, mode, samples
        self.declines = {each.id: declines(each.answer) for each in sources}
        request = Request(mode, thinks=target.encoder.thinks, control=target.control)
        self._prompts = {
            (each.id, strength): target.prompt(
                request.messages(each, strength, declines=self.declines[each.id]), max_new_tokens, each.id
            )
            for each in sources
            for strength in strengths
        }
        self.originals = [
            self._example(each, each.id, turn(each.thought, each.answer, target.encoder)) for each in sources
        ]

    def run(self, stages: Stages, strengths: Sequence[Strength]) -> list[Outcome]:
        """The outcome of each row, in their order; round i asks in the way of strengths[i]."""
        before = stages.likelihoods("before", self.originals)
        outcomes = {each.id: Outcome(each, before=before[each.id]) for each in self.sources}
        left = list(self.sources)
        for number, strength in enumerate(strengths, 1):
            tries, after = self._attempt(stages, f"round{number}", left, strength)
            for each in tries:
                outcomes[each.source.id].tries += 1
                outcomes[each.source.id].reasons.update(each.reasons)
            for each in _best(tries, after):
                assert each.candidate is not None
                outcome = outcomes[each.source.id]
                outcome.turn = turn(each.candidate.thought, each.candidate.answer, self._target.encoder)
                outcome.round, outcome.strength, outcome.sample = number, strength, each.sample
                outcome.after = after[each.id]
            left = [each for each in left if outcomes[each.id].turn is None]
            if not left:
                break
        return list(outcomes.values())

    def probe(self, stages: Stages, seed: int) -> dict[Strength, float]:
        """The share of some rows that each strength rewrites."""
        rows = self.some(PROBED, seed)
        tries = {each: self._attempt(stages, f"probe-{each}", rows, each) for each in STRENGTHS}
        return {strength: len(_best(*found)) / len(rows) for strength, found in tries.items()}

    def own(self, stages: Stages, rows: Sequence[Source]) -> Lines:
        """The likelihood of what the model itself answers to some rows: the reference of every shift."""
        prompts = {each.id: self._target.encoder.encode_prompt(each.before) for each in rows}
        answers = stages.answers("own", prompts)
        examples = [
            Example(name, [*ids, *answers[name]["ids"]], [IGNORE] * len(ids) + answers[name]["ids"], truncated=False)
            for name, ids in prompts.items()
        ]
        return stages.likelihoods("own-likelihood", examples)

    def some(self, count: int, seed: int) -> list[Source]:
        """That many rows at most, drawn by the seed, in their order."""
        drawn = random.Random(seed).sample(range(len(self.sources)), min(count, len(self.sources)))
        return [self.sources[i] for i in sorted(drawn)]

    def _attempt(
        self, stages: Stages, name: str, rows: Sequence[Source], strength: Strength
    ) -> tuple[list[_Try], Lines]:
        """Every sample of the rows with the filters it fails, and the likelihoods of those that fail none but perhaps
        the guard's."""
        prompts = {
            f"{each.id}#{sample}": self._prompts[each.id, strength] for each in rows for sample in range(self._samples)
        }
        answers = stages.answers(name, prompts)
        tries = [
            self._read(answers[f"{each.id}#{sample}"], each, sample)
            for each in rows
            for sample in range(self._samples)
        ]
        finished = [each.candidate for each in tries if each.candidate is not None and not each.reasons]
        typical = typical_length(finished)
        for each in tries:
            if each.candidate is not None:
                each.reasons += problems(each.candidate, self._rule, typical)
                own = each.source.answer if each.candidate.thought is None else each.source.thought or ""
                each.reasons += ["F7 copy"] * copies(each.candidate, self._target.tokens(own))
        passing = [each for each in tries if not each.reasons]
        after = stages.likelihoods(f"{name}-likelihood", [self._turn_of(each) for each in passing])
        self._guard(stages, name, passing)
        return tries, after

    def _read(self, line: dict[str, Any], source: Source, sample: int) -> _Try:
        target = self._target
        found = _Try(line["id"], source, sample, ["F1 unfinished"] if line["truncated"] else [])
        try:
            thought, answer = parts(
                target.text(line["ids"]),
                self._mode,
                thinks=target.encoder.thinks,
                opened=target.opened,
                control=target.control,
            )
        except ValueError:
            found.reasons.append("F2 structure")
            return found
        found.candidate = Candidate(source, thought, answer, target.tokens(thought or ""), target.tokens(answer))
        return found

    def _guard(self, stages: Stages, name: str, passing: Sequence[_Try]) -> None:
        """Adds F4 and F5 of the guard."""
        texts = {}
        for each in passing:
            assert each.candidate is not None
            prompt = asked(each.source, declines=self.declines[each.source.id])
            texts[f"{each.id} reply"] = (prompt, each.candidate.answer)
            if each.candidate.thought is not None:
                texts[f"{each.id} thought"] = (prompt, each.candidate.thought)
        verdicts = stages.verdicts(f"{name}-verdicts", texts)
        for each in passing:
            for part, reason in (("reply", "F4 unsafe reply"), ("thought", "F5 unsafe thought")):
                verdict = verdicts.get(f"{each.id} {part}", {"verdict": "safe"})["verdict"]
                each.reasons += [reason] * (verdict in UNSAFE)

    def _turn_of(self, each: _Try) -> Example:
        assert each.candidate is not None
        written = turn(each.candidate.thought, each.candidate.answer, self._target.encoder)
        return self._example(each.source, each.id, written)

    def _example(self, source: Source, name: str, written: str) -> Example:
        example = self._target.encoder.encode(source.conversation(written))
        return Example(name, example.input_ids, example.labels, example.truncated)


def _best(tries: Sequence[_Try], after: Lines) -> list[_Try]:
    """Of each row the passing sample with the lowest mean token NLL, if any passes."""
    found: dict[str, _Try] = {}
    for each in tries:
        if not each.reasons:
            other = found.get(each.source.id)
            if other is None or after[each.id]["nll"] < after[other.id]["nll"]:
                found[each.source.id] = each
    return list(found.values())
