"""What every attention kernel here is told: where the texts of a packed row lie, and how a layer scores its keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Boundaries of the texts in a packed row: `bounds` on the host, `cu_seqlens` [S+1] int32 on the device."""

    bounds: tuple[int, ...]
    cu_seqlens: Tensor

    @classmethod
    def from_bounds(cls, bounds: Sequence[int], device: torch.device | str) -> Segments:
        """Segments whose boundaries are the host integers 0 = b_0 < b_1 < ... = T."""
        return cls(tuple(bounds), torch.tensor(tuple(bounds), dtype=torch.int32, device=device))

    @property
    def longest(self) -> int:
        """Tokens in the longest segment."""
        return max(end - start for start, end in self.spans)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(start, end) of each segment."""
        return list(zip(self.bounds[:-1], self.bounds[1:], strict=True))

    def until(self, token: int) -> Segments:
        """The texts that end at or before a token."""
        count = sum(1 for bound in self.bounds if bound <= token)
        return Segments(self.bounds[:count], self.cu_seqlens[:count])


@dataclass(frozen=True)
class Scoring:
    """How one layer turns queries and keys into attention.

    The logit of query i and key j of its own text is x = scale q_i . k_j, or softcap tanh(x / softcap) with a soft cap
    (Gemma 2). A query sees itself and the keys before it, at most `window` of them with itself. `sink_logits` [H]
    joins each head's softmax as one more logit that has no value (gpt-oss).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None

    def capped(self, logits: Tensor) -> Tensor:
        """The logits after the soft cap, if there is one."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def first_visible(self, query: int) -> int:
        """The first key that a query sees, both counted from the start of the text."""
        return 0 if self.window is None else max(0, query - self.window + 1)

    def needs(self, segments: Segments) -> frozenset[str]:
        """What a kernel has to compute beyond plain causal attention: of "window", "softcap", "sink_logits"."""
        wanted = {
            "window": self.window is not None and self.window < segments.longest,
            "softcap": self.softcap is not None,
            "sink_logits": self.sink_logits is not None,
        }
        return frozenset(name for name, asked in wanted.items() if asked)
