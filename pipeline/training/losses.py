"""Token cross-entropy at the model's own output projection, without ever holding all logits of a long batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Score = Callable[[Tensor, Tensor], Tensor]

LOGITS_AT_ONCE = 1 << 26  # elements of fp32 logits a chunk may hold: 256 MiB

# Configuration fields with which a model changes its logits after the output projection (Gemma 2, Cohere, Granite).
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood [N] fp32 of targets [N] under logits [N,V] of any float dtype."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def token_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Entropy [N] fp32 (nats) of the distributions of logits [N,V]; the targets are not looked at."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


class TokenLoss:
    """Makes a causal LM's output projection return token losses in place of logits while targets are set.

    The projection has to run inside its own module call: under ZeRO-3 that is where its weight is gathered, once.
    Chunks of tokens go through it one by one, each recomputed in the backward pass. Parameter names stay as they are.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.head: nn.Module = model.get_output_embeddings()
        self.fused = type(self.head) is nn.Linear and not any(getattr(config, name, None) for name in LOGIT_TRANSFORMS)
        self.chunk = max(1, LOGITS_AT_ONCE // config.vocab_size)
        self._targets: Tensor | None = None
        self._score: Score = token_nll
        if self.fused:
            self.head.forward = self._forward

    def __call__(self, module: nn.Module, targets: Tensor, score: Score = token_nll, **inputs: Any) -> Tensor:
        """Run `module` (the model, or the engine around it) and return the NLL [N] fp32 of targets [N], or another
        score of (logits, targets).

        inputs: the model's keyword arguments, with logits_to_keep [N] naming the position that predicts each target.
        """
        self._targets, self._score = targets if self.fused else None, score
        try:
            logits: Tensor = module(**inputs).logits
        finally:
            self._targets = None
        return logits if self.fused else score(logits[0], targets)

    def _forward(self, hidden: Tensor) -> Tensor:
        weight, bias, targets, score = self.head.weight, self.head.bias, self._targets, self._score
        if targets is None:
            return F.linear(hidden, weight, bias)  # type: ignore[arg-type]
        hidden = hidden[0]  # [N,D]

        def chunk_nll(h: Tensor, t: Tensor) -> Tensor:
            return score(F.linear(h, weight, bias), t)  # type: ignore[arg-type]

        if len(targets) <= self.chunk:
            return chunk_nll(hidden, targets)
        parts = zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True)
        return torch.cat([checkpoint(chunk_nll, h, t, use_reentrant=False) for h, t in parts])
