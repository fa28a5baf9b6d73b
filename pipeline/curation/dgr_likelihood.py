"""How likely a turn is to the target model: the shift metrics of one row, under the context that training uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.data.chat import IGNORE, Example
from pipeline.data.thinking import CLOSE
from pipeline.evaluation.losses import labelled_logits

UNLIKELY = 0.01
FIRST = 32  # tokens
_AT_ONCE = 512  # tokens whose logits are in fp32 together


@torch.inference_mode()
def likelihoods(model: Any, batch: Sequence[Example], tokenizer: PreTrainedTokenizerBase, pad_token: int) -> list[Any]:
    """Of each example the means over its trained tokens, rounded to 6 digits.

    nll: negative log-likelihood in nats; nll_thought, nll_answer: of both parts, where there is a thought (the closing
    marker counts as thought); nll_first: of the first 32 tokens; unlikely: share of tokens with probability below
    0.01; rank: of the token among the vocabulary, 1 the likeliest; tokens: their number.
    """
    logits, targets, rows = labelled_logits(model, batch, pad_token)
    losses, ranks = [], []
    for some, expected in zip(logits.split(_AT_ONCE), targets.split(_AT_ONCE), strict=True):
        scores = some.float()
        own = scores.gather(-1, expected[:, None])
        losses.append(scores.logsumexp(dim=-1) - own[:, 0])
        ranks.append((scores > own).sum(dim=-1) + 1)
    nll, rank = torch.cat(losses).double().cpu(), torch.cat(ranks).double().cpu()
    rows = rows.cpu()
    found = []
    for row, example in enumerate(batch):
        mine = rows == row
        found.append(_means(nll[mine], rank[mine], _thought_tokens(example, tokenizer)))
    return found


def _means(nll: torch.Tensor, rank: torch.Tensor, thought: int) -> dict[str, Any]:
    values = {"nll": nll.mean(), "nll_first": nll[:FIRST].mean()}
    if 0 < thought < len(nll):
        values |= {"nll_thought": nll[:thought].mean(), "nll_answer": nll[thought:].mean()}
    values |= {"unlikely": (nll > -torch.tensor(UNLIKELY).log()).double().mean(), "rank": rank.mean()}
    return {"tokens": len(nll)} | {name: round(value.item(), 6) for name, value in values.items()}


def _thought_tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of the trained tokens reach to the end of the thought; 0 if there is none."""
    # The first position is nobody's prediction.
    ids = [label for label in example.labels[1:] if label != IGNORE]
    if CLOSE not in tokenizer.decode(ids):
        return 0
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        if CLOSE in tokenizer.decode(ids[:middle]):
            high = middle
        else:
            low = middle + 1
    return high
