"""Other ways to choose rows, to hold a selector against: each a score of every row, the highest of which are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.packing import pack
from pipeline.data.streams import Stream, generator
from pipeline.training.method import MicroBatch, StepContext
from pipeline.training.passes import row_means
from pipeline.training.zero3 import squared_norm


def loss_scores(name: str, losses: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Scores [N] of random, lowest_loss or highest_loss, from the losses [N] at the starting model."""
    if name == "random":
        return generator(seed, "random baseline").permutation(len(losses)).astype(np.float64)
    return -losses if name == "lowest_loss" else losses


def gradient_cosines(ctx: StepContext, streams: Mapping[str, Stream]) -> NDArray[np.float64]:
    """The cosine [N] between each row's gradient and that of the whole guide pool, at the weights as they are, over
    the trained weights (as in LESS, without its projection and its Adam). Collective.

    All ranks take each row together: shards of one gradient are spread over them. Cost: N forward and backward passes
    of one row.
    """
    guide, train = streams["guide"], streams["train"]
    for step in range(math.ceil(len(guide.pool) / guide.layout.global_batch)):
        for micro in ctx.draw("guide", step=step):
            batch = ctx.pack(micro)
            ctx.backward(ctx.cross_entropy(micro, batch), micro, batch, last=False)
    wanted = [each.clone() for each in ctx.shards.gradients()]
    ctx.shards.forget_gradients()
    table = torch.zeros(len(train.pool) + 1, 2, dtype=torch.float64, device=ctx.device)  # products, squared norms
    table[-1, 1] = squared_norm(wanted)
    for i in range(len(train.pool)):
        micro = MicroBatch([train.pool[i]], step=0, index=0, last=False, trained_tokens=int(train.pool.trained[i]))
        batch = pack(micro.examples).to(ctx.device)
        ctx.backward(row_means(ctx.token_losses(batch, batch.targets), batch).sum(), micro, batch, last=False)
        found = ctx.shards.gradients()
        table[i, 0] = sum((a.double() * b.double()).sum() for a, b in zip(found, wanted, strict=True))
        table[i, 1] = squared_norm(found)
        ctx.shards.forget_gradients()
    products, squares = ctx.total(table).cpu().numpy().T
    norms = np.sqrt(squares[:-1] * squares[-1])
    return np.asarray(np.divide(products[:-1], norms, out=np.zeros_like(norms), where=norms > 0))
