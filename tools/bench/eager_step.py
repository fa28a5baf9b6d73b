"""Surgery the way its public code runs, in plain PyTorch: three forward passes with eager attention, one backward.

    pass 1     the user's rows, padded into one batch: cross-entropy
    pass 2, 3  one harmful text, one harmless text, each alone, with output_attentions=True: for every layer and head
               the mean attention of queries 1.. to key 0

    loss = CE + alpha mean_lh ReLU(harmful_lh - harmless_lh)

One process holds the whole model and AdamW's states. Where the public way is wasteful beyond that, this one is not: no
logits of the reference texts, and of the user's rows only from the first trained token on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.chat import IGNORE, Example
from tools.bench.memory import peak_bytes
from tools.bench.timing import Seconds, clock

MAX_GRAD_NORM = 1.0  # as the product's default


def load_eager(folder: str, device: torch.device, bf16: bool) -> Any:
    """The model in training mode with eager attention."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if bf16 else torch.float32, attn_implementation="eager"
    )
    return model.to(device).train()


def padded(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, attention_mask, labels), each [B, longest] int64, padded on the right."""
    longest = max(len(each.input_ids) for each in examples)

    def column(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
        return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], device=device)

    ids = [each.input_ids for each in examples]
    return (
        column(ids, 0),
        column([[1] * len(row) for row in ids], 0),
        column([each.labels for each in examples], IGNORE),
    )


def cross_entropy(model: Any, examples: Sequence[Example], device: torch.device) -> Tensor:
    """Token-mean cross-entropy of the user's rows, a scalar in fp32."""
    ids, mask, labels = padded(examples, device)
    first = int((labels[:, 1:] != IGNORE).any(0).nonzero()[0])  # the first position whose next token is trained
    predict = torch.arange(first, ids.shape[1] - 1, device=device)
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=predict, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, first + 1 :].flatten(), ignore_index=IGNORE)


def sink_attention(model: Any, text: Example, device: torch.device) -> Tensor:
    """Mean attention of queries 1.. to key 0, [layers, heads] fp32."""
    attentions = model(
        input_ids=torch.tensor([text.input_ids], device=device),
        output_attentions=True, logits_to_keep=1, use_cache=False,
    ).attentions  # fmt: skip
    return torch.stack([layer[0, :, 1:, 0].float().mean(-1) for layer in attentions])


def eager_loss(
    model: Any, examples: Sequence[Example], harmful: Example, harmless: Example, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross-entropy, penalty R) of the three passes, scalars with their graph."""
    ce = cross_entropy(model, examples, model.device)
    difference = sink_attention(model, harmful, model.device) - sink_attention(model, harmless, model.device)
    penalty = torch.relu(difference).mean()
    return ce + alpha * penalty, ce, penalty


class EagerTrainer:
    """Training steps of one model on the same texts, with AdamW at a learning rate of 0."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
        self.values: dict[str, float] = {}  # of the last step

    def step(self, *texts: Any) -> Seconds:
        """One step on the texts of `eager_loss`; returns its times."""
        device = self.model.device
        began = clock(device)
        ce, penalty = self._passes(*texts)
        passes = clock(device) - began
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        whole = clock(device) - began
        self.values = {"ce_loss": ce.item(), "sink_penalty": penalty.item(), "grad_norm": norm.item()}
        return Seconds(passes, whole)

    def peak(self, *texts: Any) -> int:
        """The peak in bytes of the forward and backward passes, gradients included."""
        found = peak_bytes(lambda: self._passes(*texts), self.model.device)
        self.optimizer.zero_grad()
        return found

    def _passes(self, *texts: Any) -> tuple[Tensor, Tensor]:
        loss, ce, penalty = eager_loss(self.model, *texts)
        loss.backward()
        return ce.detach(), penalty.detach()
