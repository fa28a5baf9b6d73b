"""Supervised fine-tuning: the token-mean cross-entropy of the assistant's turns. The baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.training.method import Method, StepContext


@dataclass
class SFTConfig:
    """SFT has no flags of its own."""


class SFT(Method):
    """loss = CE(train rows); one forward and one backward a micro-batch."""

    Config = SFTConfig

    def step(self, ctx: StepContext) -> None:
        for micro in ctx.draw("train"):
            batch = ctx.pack(micro)
            loss = ctx.cross_entropy(micro, batch)
            ctx.log(loss=loss, ce_loss=loss)
            ctx.backward(loss, micro, batch, last=micro.last)
