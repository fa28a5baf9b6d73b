"""Resumable streams over a pool: which rows each optimizer step, micro-batch and rank sees is a pure function of the
seed and the step.

A run killed at step N continues with the rows and references of step N; nothing about the data order is stored.
Micro-batches of the global batch are numbered micro_step * ranks + rank, so that the same rows are in a step for any
split over ranks and accumulation.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from pipeline.data.cache import EncodedPool


def generator(seed: int, *parts: str | int) -> np.random.Generator:
    """Random numbers that are a function of the seed and of what they are for."""
    words = hashlib.sha256(repr((seed, *parts)).encode()).digest()
    return np.random.default_rng(np.frombuffer(words, dtype=np.uint32))


@dataclass(frozen=True)
class Layout:
    """How a global batch is split: rows a micro-batch, micro-batches a rank, ranks."""

    rows: int
    accumulation: int
    ranks: int

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a global batch, over all ranks."""
        return self.accumulation * self.ranks

    @property
    def global_batch(self) -> int:
        """Rows an optimizer step."""
        return self.rows * self.micro_batches


class Stream:
    """Endless epochs over one pool, each in an order of its own; an epoch's short last batch is filled from the next
    epoch."""

    def __init__(self, name: str, pool: EncodedPool, layout: Layout, seed: int) -> None:
        self.name = name
        self.pool = pool
        self.layout = layout
        self.seed = seed
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, generator(self.seed, self.name, "order", epoch).permutation(len(self.pool)))
        return self._epoch[1]

    def steps(self, epochs: float) -> int:
        """Optimizer steps that `epochs` passes take, rounded up."""
        return math.ceil(round(epochs * len(self.pool), 6) / self.layout.global_batch)

    def global_batch(self, step: int) -> np.ndarray:
        """Pool indices [global_batch] of optimizer step `step` (from 0)."""
        epoch, place = divmod(step * self.layout.global_batch, len(self.pool))
        rows = self._order(epoch)[place:]
        while len(rows) < self.layout.global_batch:
            epoch += 1
            rows = np.concatenate([rows, self._order(epoch)])
        return rows[: self.layout.global_batch]

    def micro_batch(self, step: int, index: int) -> np.ndarray:
        """Pool indices [rows] of micro-batch `index` (0 .. micro_batches-1) of a step."""
        return self.global_batch(step)[index * self.layout.rows : (index + 1) * self.layout.rows]

    def trained_tokens(self, step: int) -> int:
        """Trained tokens of the whole global batch of a step, on all ranks."""
        return int(self.pool.trained[self.global_batch(step)].sum())

    def sample(self, step: int, index: int, count: int) -> np.ndarray:
        """`count` pool indices drawn at random for micro-batch `index` of a step, without repetition while the pool
        allows it."""
        draw = generator(self.seed, self.name, "sample", step, index)
        return draw.choice(len(self.pool), size=count, replace=count > len(self.pool))
