"""Phase 1: from prompts to answers-SUITE.jsonl, greedy, batch by batch; a killed run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline.evaluation.engine_transformers import Generated
from pipeline.evaluation.protocol import Asked, Renderer
from pipeline.evaluation.sampling import Sampling
from pipeline.evaluation.shared_lines import make_lines
from pipeline.evaluation.suite import Prompt
from pipeline.evaluation.workers import Crew


class Engine(Protocol):
    """What answers: each prompt's token ids to the ids of its answer, greedy unless `sampling` is given."""

    def answer(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[Generated]: ...


def ask(prompts: Sequence[Prompt], renderer: Renderer, *, max_new_tokens: int, max_length: int) -> list[Asked]:
    """Each prompt's tokens.

    Raises:
        ValueError: a prompt leaves no room for its answer in max_length: --max_length, or the model's positions.
    """
    asked = [renderer.ask(prompt) for prompt in prompts]
    for prompt, each in zip(prompts, asked, strict=True):
        if len(each.ids) + max_new_tokens > max_length:
            raise ValueError(
                f"{prompt.id}: its {len(each.ids)} tokens and --max_new_tokens {max_new_tokens} exceed --max_length "
                f"{max_length} (or the model's positions); raise it as far as those go, or leave the row out"
            )
    return asked


def generate(
    engine: Callable[[], Engine],
    decode: Callable[[list[int]], str],
    prompts: Sequence[Prompt],
    asked: Sequence[Asked],
    path: Path,
    crew: Crew,
    *,
    batch_size: int,
    max_new_tokens: int,
    show: Callable[[Prompt, str], None] | None = None,
) -> None:
    """Completes `path`: one line {"id", "answer", "tokens", "truncated"} a prompt, in the order of the prompts.

    `truncated` says that no end token came within `max_new_tokens`.

    Args:
        engine: called only if an answer is missing.
        decode: from an answer's token ids to the text that is judged.
        show: called with each new answer.

    Raises:
        ValueError: `path` holds answers to other prompts.
    """

    def work(batch: Sequence[int]) -> list[dict[str, Any]]:
        answers = engine().answer([asked[i].ids for i in batch], max_new_tokens)
        lines = []
        for i, each in zip(batch, answers, strict=True):
            text = decode(each.ids)
            lines.append({"id": prompts[i].id, "answer": text, "tokens": len(each.ids), "truncated": each.truncated})
            if show is not None:
                show(prompts[i], text)
        return lines

    # Kinds apart, since a batch runs until its longest answer ends; longest first, so that memory runs out at once.
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i].kind, -len(asked[i].ids), i))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    make_lines(path, [prompt.id for prompt in prompts], batches, work, crew, label=path.stem)
