"""Answers by transformers, on a CPU or a GPU, batch by batch: greedy, or sampled (sampling.py).

In fp32 a greedy answer does not depend on the batch it is generated in. Padding, the cache and the other rows change a
logit by rounding alone (about 1e-5), and that can only flip a step whose two best logits are almost equal. So such a
step is decided by a pass over that row alone, without padding or cache and with one thread: a function of the row
only. In lower precision rounding is too coarse for that, and answers may depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from pipeline.evaluation.sampling import DrawTokens, Sampling
from pipeline.threads import one_torch_thread

NEAR_TIE = 1e-3
"""Logits nearer than this are decided alone; tests hold what batching changes to less than a tenth of it."""


@dataclass(frozen=True)
class Generated:
    """An answer's token ids, its end token included; `truncated`: no end token came within the limit."""

    ids: list[int]
    truncated: bool


class TransformersEngine:
    """Answers batches of token ids with a loaded model. `pad_token` is any valid id: padding is masked by position."""

    name = "transformers"
    version = transformers.__version__

    def __init__(self, model: Any, pad_token: int) -> None:
        self._model, self._pad = model, pad_token
        ends = model.generation_config.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())

    @torch.inference_mode()
    def answer(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[Generated]:
        """The continuation of each prompt, greedy unless `sampling` is given."""
        width = max(map(len, prompts))
        # Left padding: every prompt ends where its answer begins.
        ids = torch.full((len(prompts), width), self._pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        decide: list[transformers.LogitsProcessor] = []
        if sampling is not None:
            decide = [DrawTokens(sampling)]
        elif self._model.dtype == torch.float32:
            decide = [_DecideTies(self._model, [width - len(prompt) for prompt in prompts], width, self._ends)]
        output = self._model.generate(
            input_ids=ids.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            max_new_tokens=max_new_tokens,
            logits_processor=transformers.LogitsProcessorList(decide),
        )
        return [self._cut(row) for row in output[:, width:].tolist()]

    def _cut(self, row: list[int]) -> Generated:
        length = next((i + 1 for i, token in enumerate(row) if token in self._ends), len(row))
        return Generated(row[:length], truncated=row[length - 1] not in self._ends)


class _DecideTies(transformers.LogitsProcessor):
    """Replaces the logits of a row whose two best are nearly equal by those of a pass over that row alone."""

    def __init__(self, model: Any, starts: Sequence[int], width: int, ends: set[int]) -> None:
        self._model, self._starts, self._width, self._ends = model, starts, width, ends

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids [rows, width + steps], scores [rows, vocabulary] fp32."""
        best = scores.topk(2, dim=-1).values
        for row in (best[:, 0] - best[:, 1] < NEAR_TIE).nonzero().flatten().tolist():
            ids = input_ids[row, self._starts[row] :]
            if not self._ends.isdisjoint(input_ids[row, self._width :].tolist()):
                continue  # it has ended; what follows is not read
            with one_torch_thread():  # sums in an order that does not depend on how many threads there are
                scores[row] = self._model(input_ids=ids[None], use_cache=False, logits_to_keep=1).logits[0, -1]
        return scores
