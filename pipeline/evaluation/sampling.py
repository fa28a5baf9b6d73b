"""Sampled answers: temperature, top-k, top-p, and a random stream for each prompt.

Every prompt draws with a generator of its own, so its draws do not depend on the batch it is in. In fp32 what batching
changes by rounding moves a draw about once in 1e5 steps; in lower precision more often.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import transformers


@dataclass(frozen=True)
class Sampling:
    """temperature above 0; top_p in (0, 1], 1 keeps all; top_k 0 keeps all; a seed for each prompt."""

    temperature: float
    top_p: float
    top_k: int
    seeds: tuple[int, ...]


def seed_of(*parts: object) -> int:
    """A seed in [0, 2^63) that depends on every part."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class DrawTokens(transformers.LogitsProcessor):
    """Draws a token for each row and forbids all others, so that greedy decoding takes it."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._streams = [torch.Generator().manual_seed(seed) for seed in sampling.seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [rows, vocabulary]; the result has one 0 a row and -inf elsewhere."""
        shares = kept_shares(scores, self._sampling).double().cumsum(dim=-1)
        points = torch.cat([torch.rand(1, generator=stream, dtype=torch.float64) for stream in self._streams])
        # In the order of the vocabulary, not of the shares: two nearly equal shares may swap places in another batch.
        drawn = torch.searchsorted(shares, points.to(shares.device)[:, None] * shares[:, -1:], right=True)
        return torch.full_like(scores, float("-inf")).scatter(-1, drawn, 0.0)


def kept_shares(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities [rows, vocabulary] fp32 after temperature, top-k and top-p in this order, 0 for what they leave
    out; not normalised again."""
    scores = scores.float() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        lowest = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < lowest, float("-inf"))
    shares = scores.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered = shares.sort(dim=-1, descending=True).values
        # The fewest of the likeliest tokens that reach top_p together; the likeliest in any case.
        inside = ordered.cumsum(dim=-1) - ordered < sampling.top_p
        lowest = ordered.gather(-1, inside.sum(dim=-1, keepdim=True) - 1)
        shares = shares.masked_fill(shares < lowest, 0.0)
    return shares
