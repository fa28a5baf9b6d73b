"""Phase 1: from prompts to answers-SUITE.jsonl, greedy, batch by batch; a killed run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.data.chat import ChatEncoder
from pipeline.evaluation.jsonl import append_lines, resume_lines
from pipeline.evaluation.model import pad_token
from pipeline.evaluation.progress import Progress
from pipeline.evaluation.suite import Prompt


def generate(
    load_model: Callable[[], Any],
    encoder: ChatEncoder,
    prompts: Sequence[Prompt],
    path: Path,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> None:
    """Completes `path`: one line {"id", "answer", "tokens", "truncated"} a prompt, in the order they were generated.

    The batches are fixed by the prompts and `batch_size`, not by what is done already, so an interrupted run writes
    the same bytes as an undisturbed one. `truncated` says that no end token came within `max_new_tokens`.

    Args:
        load_model: called only if an answer is missing.

    Raises:
        ValueError: `path` holds other prompts, or a prompt leaves no room for its answer in --max_length.
    """
    tokens = [encoder.encode_prompt(prompt.messages) for prompt in prompts]
    for prompt, ids in zip(prompts, tokens, strict=True):
        if len(ids) + max_new_tokens > encoder.max_length:
            raise ValueError(
                f"{prompt.id}: its {len(ids)} tokens and --max_new_tokens {max_new_tokens} exceed --max_length "
                f"{encoder.max_length}"
            )
    # Kinds apart, since a batch runs until its longest answer ends; longest first, so that memory runs out at once.
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i].kind, -len(tokens[i]), i))
    done = [line["id"] for line in resume_lines(path)]
    if done != [prompts[i].id for i in order[: len(done)]]:
        raise ValueError(f"{path}: holds answers to other prompts; choose another --output_dir or remove it")
    if len(done) == len(prompts):
        return
    model = load_model()
    progress = Progress("answers", total=len(prompts), done=len(done))
    for start in range(len(done) // batch_size * batch_size, len(order), batch_size):
        batch = order[start : start + batch_size]
        answers = _answer(model, encoder.tokenizer, [tokens[i] for i in batch], max_new_tokens)
        lines = [{"id": prompts[i].id, **answer} for i, answer in zip(batch, answers, strict=True)]
        new = lines[max(len(done) - start, 0) :]
        append_lines(path, new)
        progress.update(len(new), sum(line["tokens"] for line in new))


@torch.inference_mode()
def _answer(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[dict[str, Any]]:
    width = max(map(len, prompts))
    # Left padding: every prompt ends where its answer begins.
    ids = torch.full((len(prompts), width), pad_token(tokenizer))
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    output = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max_new_tokens
    )
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    answers = []
    for generated in output[:, width:].tolist():
        length = next((i + 1 for i, token in enumerate(generated) if token in ends), len(generated))
        kept = generated[:length]
        answers.append(
            {
                "answer": tokenizer.decode(kept, skip_special_tokens=True).strip(),
                "tokens": length,
                "truncated": kept[-1] not in ends,
            }
        )
    return answers
