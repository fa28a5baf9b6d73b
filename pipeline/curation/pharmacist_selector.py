"""The selector: one free logit a row of the alignment set, and the weights that the rows get from it.

    w_i = N softmax(s)_i, so that the weights sum to N
    dF/ds_i = w_i (u_i - sum_j w_j u_j / sum_j w_j),  u_i = dF/dw_i, zero for rows outside the batch

Source: the public SEAL code, which has the same free logits and Adam on all of them. There a row that is not drawn
moves by momentum alone, at Adam's full rate. A lazy step moves the drawn rows alone and holds their total weight, as
rows outside can no longer balance it: its sums over j run over the batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Update = Literal["lazy", "dense"]
BETAS, EPSILON = (0.9, 0.95), 1e-12
START = 0.1  # of every logit, as in SEAL; softmax does not see it


class Selector:
    """Logits [N] in fp64 on the CPU, the same on every rank, and Adam on them.

    lazy: a step moves the logits of its rows alone, each with moments and a step count of its own. dense: Adam as it
    is (SEAL).
    """

    def __init__(self, rows: int, *, learning_rate: float, update: Update) -> None:
        self.logits = torch.full((rows,), START, dtype=torch.float64)
        self._rate = learning_rate
        self._dense = update == "dense"
        self._mean, self._square = torch.zeros_like(self.logits), torch.zeros_like(self.logits)
        self._visits = torch.zeros_like(self.logits)
        self._sum, self._counted = torch.zeros_like(self.logits), 0

    def weights(self) -> Tensor:
        """w [N], fp64."""
        return len(self.logits) * self.logits.softmax(0)

    def gradient(self, rows: Tensor, of_weights: Tensor, moved: Tensor) -> Tensor:
        """dF/ds of the logits that move [M], while their total weight is held.

        rows [B] int64, of_weights [B]: the batch, in which a row may stand twice, and dF/dw; moved [M]: logits that
        move, all of the batch's among them.
        """
        weights = self.weights()
        u = torch.zeros_like(weights).index_add_(0, rows, of_weights.double())[moved]
        weights = weights[moved]
        return weights * (u - (weights * u).sum() / weights.sum())

    def step(self, rows: Tensor, of_weights: Tensor) -> None:
        """One Adam step on the logits; arguments as for `gradient`."""
        moved = torch.arange(len(self.logits)) if self._dense else rows.unique()
        gradient = self.gradient(rows, of_weights, moved)
        self._visits[moved] += 1
        self._mean[moved] += (1 - BETAS[0]) * (gradient - self._mean[moved])
        self._square[moved] += (1 - BETAS[1]) * (gradient.square() - self._square[moved])
        mean = self._mean[moved] / (1 - BETAS[0] ** self._visits[moved])
        square = self._square[moved] / (1 - BETAS[1] ** self._visits[moved])
        self.logits[moved] -= self._rate * mean / (square.sqrt() + EPSILON)

    def keep_for_scores(self) -> None:
        """Count the logits as they are now among those of the last epoch."""
        self._sum += self.logits
        self._counted += 1

    def scores(self) -> Tensor:
        """What rows are ranked by [N], fp64, higher is kept. dense: the mean over the last epoch's steps. lazy: the
        last value, which is that of the row's visit in the last epoch; a mean over the epoch would count the order of
        the visits."""
        return self._sum / self._counted if self._dense else self.logits.clone()
