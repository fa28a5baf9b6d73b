"""Cross-entropy of a model on conversations: mean over trained tokens, with the labels that training uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from pipeline.data.chat import IGNORE, Example
from pipeline.evaluation.progress import Progress

TOKENS_A_BATCH = 4096
"""Padded tokens in one forward pass; a longer row is a batch of its own."""


@dataclass(frozen=True)
class Loss:
    """Mean negative log-likelihood in nats over `tokens` trained tokens."""

    value: float
    tokens: int


@torch.inference_mode()
def cross_entropy(model: Any, examples: Sequence[Example], *, pad_token: int, label: str) -> Loss:
    """The token mean over all examples together (not a mean of row means), summed in fp64."""
    progress = Progress(label, total=len(examples))
    total, count = 0.0, 0
    for batch in batches(examples):
        logits, targets, _ = labelled_logits(model, batch, pad_token)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        total += losses.double().sum().item()
        count += losses.numel()
        progress.update(len(batch), sum(len(example.input_ids) for example in batch))
    return Loss(total / count, count)


@torch.inference_mode()
def labelled_logits(
    model: Any, batch: Sequence[Example], pad_token: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [tokens, vocabulary] in the model's dtype, targets [tokens] and row [tokens] of the trained tokens of one
    batch, row by row.

    Rows are padded on the right: a causal model never looks there, so no mask is built.
    """
    width = max(len(example.input_ids) for example in batch)
    ids = torch.full((len(batch), width), pad_token)
    targets = torch.full((len(batch), width), IGNORE)
    for row, example in enumerate(batch):
        length = len(example.input_ids)
        ids[row, :length] = torch.tensor(example.input_ids)
        # Position i predicts token i + 1.
        targets[row, : length - 1] = torch.tensor(example.labels[1:])
    # Only the columns where some row is trained reach the output projection: its logits are the largest tensor.
    columns = (targets != IGNORE).any(dim=0).nonzero().flatten()
    targets = targets[:, columns].to(model.device)
    logits = model(
        input_ids=ids.to(model.device),
        logits_to_keep=columns.to(model.device),
        use_cache=False,
    ).logits
    trained = targets != IGNORE
    return logits[trained], targets[trained], trained.nonzero()[:, 0]


def batches(examples: Sequence[Example]) -> list[list[Example]]:
    """Rows of similar length together, the longest first."""
    found: list[list[Example]] = []
    for example in sorted(examples, key=lambda each: len(each.input_ids), reverse=True):
        # Longest first, so the first row of a batch is its width.
        if not found or (len(found[-1]) + 1) * len(found[-1][0].input_ids) > TOKENS_A_BATCH:
            found.append([])
        found[-1].append(example)
    return found
