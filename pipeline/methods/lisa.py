"""Lisa: the user's task and the alignment set in turn, each drawn to where the other ended (arXiv 2405.18641).

    in the alignment state:    CE(guide rows) + rho/2 ||w - w_ft||^2
    in the fine-tuning state:  CE(train rows) + rho/2 ||w - w_al||^2

w_ft and w_al are the weights with which the other state last ended (at first: those the run starts from). A run begins
in the alignment state; --alignment_steps and --finetune_steps are the lengths of the states. The proximal term counts
after the share --proximal_after of all steps, as in the public code. Fine-tuning stage.

Faithful. The public code counts micro-steps where this counts optimizer steps, and takes its snapshots before the
engine exists: under ZeRO-3 they would be empty and the term would vanish in silence. As there, the user's rows of an
alignment step are passed over. The term's gradient rho (w - w_ref) is added to the gradient shards, which is the same
and needs no gather. One snapshot is kept, not two: the other is never read before it is written again.

Cost: SFT's passes, and one fp32 copy of the trained weights, sharded, in memory and in checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Problems, out_of_range
from pipeline.training.method import Method, StepContext
from pipeline.training.zero3 import Shards, squared_norm

REFERENCE = "lisa_reference"


@dataclass
class LisaConfig:
    """Lisa's flags."""

    rho: float = field(default=1.0, metadata={"help": "Weight of the pull to where the other state ended."})
    alignment_steps: int = field(
        default=100, metadata={"help": "Optimizer steps on guide rows, at first and in turn."}
    )
    finetune_steps: int = field(default=900, metadata={"help": "Optimizer steps on the user's rows, in turn."})
    proximal_after: float = field(default=0.1, metadata={"help": "Share of all steps before the pull begins."})

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.rho < math.inf:
            problems.append(f"--rho {self.rho}: the weight of the pull is a number of 0 or more")
        problems += out_of_range(self, ("alignment_steps", "finetune_steps"), 1)
        if not 0 <= self.proximal_after <= 1:
            problems.append(f"--proximal_after {self.proximal_after}: give a share between 0 and 1")
        if problems:
            raise Problems(problems)


class Lisa(Method):
    """SFT on guide rows or the user's, with the gradient of the pull added to the shards."""

    Config = LisaConfig
    pools = ("guide",)
    fictional = {"guide": "policy:align"}  # noqa: RUF012
    touches_shards = True
    shard_states = (REFERENCE,)

    def begin(self, shards: Shards) -> None:
        self.reference = [each.clone() for each in shards.weights()]

    def kept_shards(self) -> dict[str, list[Tensor]]:
        return {REFERENCE: self.reference}

    def resume(self, state: Mapping[str, Any], shards: Mapping[str, list[Tensor]]) -> None:
        self.reference = shards[REFERENCE]

    def step(self, ctx: StepContext) -> None:
        config = self.config
        # The clock is a function of the step, so that all ranks and a resumed run agree on it.
        place = ctx.step % (config.alignment_steps + config.finetune_steps)
        aligning = place < config.alignment_steps
        if ctx.step and place in (0, config.alignment_steps):
            self.reference = [each.clone() for each in ctx.shards.weights()]
        losses = []
        for micro in ctx.draw("guide" if aligning else "train"):
            batch = ctx.pack(micro)
            loss = ctx.cross_entropy(micro, batch)
            ctx.backward(loss, micro, batch, last=micro.last)
            losses.append(loss.detach())
        ce = torch.stack(losses).mean()
        proximal = torch.zeros_like(ce)
        if ctx.step >= config.proximal_after * ctx.steps:
            proximal = config.rho / 2 * self._pull(ctx)
        ctx.log(loss=ce + proximal, ce_loss=ce, proximal=proximal, aligning=torch.full_like(ce, float(aligning)))

    def _pull(self, ctx: StepContext) -> Tensor:
        """Adds the gradient of the proximal term; returns ||w - w_ref||^2. One tensor's distance is held at a time."""
        squared: list[Tensor] = []

        def pulls() -> Iterator[Tensor]:
            for weight, old in zip(ctx.shards.weights(), self.reference, strict=True):
                distance = weight - old
                squared.append(squared_norm([distance]))
                yield self.config.rho * distance

        ctx.shards.add_to_gradients(pulls())
        return ctx.total(torch.stack(squared).sum()).float()
