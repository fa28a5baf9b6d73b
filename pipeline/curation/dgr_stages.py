"""The costly steps, each a file of lines in the work folder that a killed run goes on with and workers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.curation.dgr_guard import Guard
from pipeline.curation.dgr_likelihood import likelihoods
from pipeline.curation.dgr_target import Target
from pipeline.data.chat import Example
from pipeline.evaluation.jsonl import read_lines
from pipeline.evaluation.losses import batches
from pipeline.evaluation.sampling import Sampling, seed_of
from pipeline.evaluation.shared_lines import make_lines
from pipeline.evaluation.suite import Prompt
from pipeline.evaluation.workers import Crew

Lines = dict[str, dict[str, Any]]
"""The lines of a step by their id."""
VERDICTS_TOGETHER = 16


@dataclass(frozen=True)
class Draws:
    """How answers are drawn; temperature 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_new_tokens: int
    batch_size: int


class Stages:
    """folder: of the lines. Every worker of the crew calls every step, with the same arguments."""

    def __init__(self, target: Target, guard: Guard | None, draws: Draws, folder: Path, crew: Crew) -> None:
        self._target, self._guard, self._draws, self._folder, self._crew = target, guard, draws, folder, crew

    def answers(self, name: str, prompts: Mapping[str, Sequence[int]]) -> Lines:
        """{"id", "ids", "tokens", "truncated"} of each prompt's answer. A draw depends on the seed, the step's name
        and the prompt's id."""
        ids, draws = list(prompts), self._draws

        def work(batch: Sequence[int]) -> list[dict[str, Any]]:
            sampling = None
            if draws.temperature > 0:
                seeds = tuple(seed_of(draws.seed, name, ids[i]) for i in batch)
                sampling = Sampling(draws.temperature, draws.top_p, draws.top_k, seeds)
            found = self._target.engine().answer([prompts[ids[i]] for i in batch], draws.max_new_tokens, sampling)
            return [
                {"id": ids[i], "ids": each.ids, "tokens": len(each.ids), "truncated": each.truncated}
                for i, each in zip(batch, found, strict=True)
            ]

        # Longest first, so that memory runs out at once.
        order = sorted(range(len(ids)), key=lambda i: (-len(prompts[ids[i]]), i))
        return self._lines(name, ids, _chunks(order, draws.batch_size), work)

    def likelihoods(self, name: str, examples: Sequence[Example]) -> Lines:
        """The shift metrics of each example (dgr_likelihood.py), by its row's id."""
        places = {each.row_id: i for i, each in enumerate(examples)}
        target = self._target

        def work(batch: Sequence[int]) -> list[dict[str, Any]]:
            some = [examples[i] for i in batch]
            found = likelihoods(target.weights(), some, target.tokenizer, target.pad)
            return [{"id": each.row_id, **values} for each, values in zip(some, found, strict=True)]

        order = [[places[each.row_id] for each in batch] for batch in batches(examples)]
        return self._lines(name, list(places), order, work)

    def verdicts(self, name: str, texts: Mapping[str, tuple[Prompt, str]]) -> Lines:
        """The guard's verdict on each text; {} without a guard."""
        guard = self._guard
        if guard is None:
            return {}
        if hasattr(guard, "model"):  # a judge that is a model needs the memory
            self._target.release()
        ids = list(texts)

        def work(batch: Sequence[int]) -> list[dict[str, Any]]:
            return [{"id": ids[i], **guard.verdict(*texts[ids[i]])} for i in batch]

        return self._lines(name, ids, _chunks(range(len(ids)), VERDICTS_TOGETHER), work)

    def _lines(
        self,
        name: str,
        ids: Sequence[str],
        order: Sequence[Sequence[int]],
        work: Callable[[Sequence[int]], list[dict[str, Any]]],
    ) -> Lines:
        path = self._folder / f"{name}.jsonl"
        make_lines(path, ids, order, work, self._crew, label=name)
        return {line["id"]: line for line in read_lines(path)}


def _chunks(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
