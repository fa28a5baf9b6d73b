"""What a defense shows beyond slower learning: its harmful score beside its loss-matched control's, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.report.comparison import Row
from pipeline.report.paired import Paired, p_text
from pipeline.report.trials import trials

OUTCOMES = ("significantly lower", "significantly higher", "no significant difference")


def beyond_slower_learning(rows: Sequence[Row], found: Sequence[Paired]) -> list[str]:
    """A sentence for each harmful score of each defense and control, over all conditions of a sweep."""
    groups: dict[tuple[str, str, str], list[tuple[Paired, str]]] = {}
    for trial in trials(rows):
        defense = trial.defense
        for control in trial.controls:
            for each in _harmful(found, {control.name, defense.name}):
                names = (each.score.replace("_", " "), defense.model, control.model)
                groups.setdefault(names, []).append((each, defense.name))
    return [_sentence(*names, pairs) for names, pairs in groups.items()]


def _harmful(found: Sequence[Paired], names: set[str]) -> Iterator[Paired]:
    for each in found:
        if each.score.split()[-1] == "harmful_score" and {each.first, each.second} == names:
            yield each


def _sentence(score: str, defense: str, control: str, pairs: Sequence[tuple[Paired, str]]) -> str:
    outcomes = [_outcome(*each) for each in pairs]
    names = f"{defense} beside its control, {control}"
    if len(pairs) > 1:
        counts = [(outcomes.count(outcome), outcome) for outcome in OUTCOMES]
        found = ", ".join(f"{outcome} at {count}" for count, outcome in counts if count)
        return f"{names}, {score}: {found} of {len(pairs)} conditions"
    ((pair, name),) = pairs
    own, other = pair.shares if pair.first == name else pair.shares[::-1]
    return f"{names}: {score} {own:.1%} against {other:.1%}, {outcomes[0]} ({p_text(pair.p_holm)})"


def _outcome(pair: Paired, defense: str) -> str:
    own, other = pair.shares if pair.first == defense else pair.shares[::-1]
    if not pair.significant:
        return OUTCOMES[2]
    return OUTCOMES[0] if own < other else OUTCOMES[1]
