"""Two models on the same prompts: the exact McNemar test, and what it says in a sentence.

Prompts that both models answer the same way say nothing about which is better, so only those with different verdicts
are counted: under the null hypothesis each model has the count in half of them. Several seeds are pooled, a pair for
each prompt and seed; their answers to one prompt are alike, so with seeds the p-value is smaller than fresh prompts
would give, and says nothing about other seeds. Holm's correction is made over all tests of one score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.report.comparison import Row, scores_by_name
from pipeline.report.records import read_json, read_lines
from pipeline.report.significance import LEVEL, holm, sign_test
from pipeline.report.trials import trials

UNPARSED = "unparsed"
"""The verdict where a judge's answer could not be read; it is in no share."""


@dataclass(frozen=True)
class Paired:
    """One score of two models.

    pairs: prompts times seeds, without those that one of the two has an unparsed verdict for. only_first, only_second:
    those that count for one model alone. shares: of the pairs that count for each model. p: two-sided; p_holm: the
    same after Holm's correction.
    """

    score: str
    first: str
    second: str
    pairs: int
    only_first: int
    only_second: int
    shares: tuple[float, float]
    p: float
    p_holm: float

    @property
    def significant(self) -> bool:
        return self.p_holm < LEVEL

    @property
    def differ(self) -> int:
        return self.only_first + self.only_second

    def sentence(self) -> str:
        """What was found, for people."""
        first, second = (
            f"{name} {share:.1%}" for name, share in zip((self.first, self.second), self.shares, strict=True)
        )
        score = self.score.replace("_", " ")
        if not self.differ:
            return f"{score}: {first} and {second}: no prompt was judged differently"
        differ = f"{self.differ} of {self.pairs} prompts differ, {p_text(self.p_holm)}"
        if self.significant:
            return f"{score}: {first} against {second}: a significant difference ({differ})"
        return f"{score}: {first} and {second} do not differ significantly at 5 % ({differ})"


def p_text(p: float) -> str:
    """p as it is read in a sentence."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.995 else "p = 1"


def compare(rows: Sequence[Row]) -> tuple[list[Paired], list[str]]:
    """By score in the table's order, the tests of every two models; of a sweep only those it is made for: each defense
    beside plain training and beside its controls, or without controls every two models of one condition. And, of
    what cannot be paired, why. Errors: ValueError for a file of verdicts that cannot be read."""
    judged = {row.name: _Judged(row) for row in rows}
    scores = list(dict.fromkeys(name for row in rows for name in row.shares))
    found: list[Paired] = []
    reasons: list[str] = []
    for score in scores:
        family: list[Paired] = []
        for first, second in _pairs(rows):
            if score in first.shares and score in second.shares:
                try:
                    family.append(_test(score, judged[first.name], judged[second.name]))
                except _Unpaired as reason:
                    reasons.append(str(reason))
        adjusted = holm(np.array([each.p for each in family]))
        found += [replace(each, p_holm=float(p)) for each, p in zip(family, adjusted, strict=True)]
    return found, list(dict.fromkeys(reasons))


def _pairs(rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    sweep = any(row.condition is not None for row in rows)
    if sweep and (found := trials(rows)):
        for trial in found:
            if trial.plain is not None:
                yield trial.plain, trial.defense
            yield from ((trial.defense, control) for control in trial.controls)
        return
    for first, second in combinations(rows, 2):
        if not sweep or (first.condition is not None and first.condition == second.condition):
            yield first, second


class _Unpaired(Exception):
    """Why two models cannot be paired."""


class _Judged:
    """The verdicts of one model, a list entry a seed, read when they are asked for."""

    def __init__(self, row: Row) -> None:
        self.name = row.name
        self.folders = row.folders["assess"]
        self._results = [read_json(folder / "results.json") for folder in self.folders]

    def prompts(self, score: str) -> list[Any]:
        """What tells the prompts of the score's suite from others, for each seed."""
        return [_prompts(each, scores_by_name(each)[score][0]) for each in self._results]

    def counted(self, score: str) -> list[dict[str, bool | None]]:
        """Whether each prompt, by its id, counts for the score, None where the judge could not be read; for each
        seed."""
        found = []
        for folder, results in zip(self.folders, self._results, strict=True):
            suite, entry = scores_by_name(results)[score]
            path = folder / f"verdicts-{suite}.jsonl"
            if not path.is_file():
                raise _Unpaired(f"{self.name}: {folder.name} has no {path.name}, so its differences cannot be tested")
            if "hits" not in entry:
                raise _Unpaired(
                    f"{self.name}: its results.json does not say which verdicts count; run assess.py again"
                )
            counts = _counts(path, entry)
            if (k := sum(each is True for each in counts.values())) != entry["k"]:
                raise ValueError(f"{path}: {k} verdicts count for {score}, but {entry['k']} by results.json")
            found.append(counts)
        return found


def _prompts(results: dict[str, Any], suite: str) -> Any:
    return results.get("settings", {}).get("suites", {}).get(suite, {}).get("prompts_sha256")


def _counts(path: Path, entry: dict[str, Any]) -> dict[str, bool | None]:
    counts: dict[str, bool | None] = {}
    for number, line in enumerate(read_lines(path), 1):
        try:
            if line["kind"] == entry["kind"]:
                verdict = line["verdict"]
                counts[str(line["id"])] = None if verdict == UNPARSED else verdict in entry["hits"]
        except KeyError as error:
            raise ValueError(f"{path}:{number}: not what assess.py writes (no {error})") from error
    return counts


def _test(score: str, first: _Judged, second: _Judged) -> Paired:
    names = f"{first.name} and {second.name}"
    if len(first.folders) != len(second.folders):
        raise _Unpaired(f"{names}: different numbers of seeds, so no pairs")
    if first.prompts(score) != second.prompts(score):
        raise _Unpaired(f"{names}: not asked the same prompts, so no pairs")
    pairs: list[tuple[bool, bool]] = []
    for one, other in zip(first.counted(score), second.counted(score), strict=True):
        if one.keys() != other.keys():
            raise _Unpaired(f"{names}: {score} was not judged on the same prompts, so no pairs")
        both = ((one[prompt], other[prompt]) for prompt in one)
        pairs += [(a, b) for a, b in both if a is not None and b is not None]
    if not pairs:
        raise _Unpaired(f"{names}: no prompt has a verdict that could be read for both")
    only_first, only_second = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    p = float(sign_test(np.array([only_first]), np.array([only_second]))[0])
    shares = sum(a for a, _ in pairs) / len(pairs), sum(b for _, b in pairs) / len(pairs)
    return Paired(score, first.name, second.name, len(pairs), only_first, only_second, shares, p, p)
