"""Surgery: keep heads from learning harmful patterns by a penalty on attention-sink divergence (arXiv 2602.05228).

    loss = CE + alpha R,   R = 1/(L H) sum_lh ReLU( sink_lh(harmful text) - sink_lh(harmless text) )

Faithful to the paper's objective. The public code runs three eager forward passes a step (user batch, one harmful
text, one harmless text) with all attention maps in memory, draws the same pair on every rank, and does not divide by
the accumulation. Here the two texts ride behind the user's in one packed row: one forward and one backward a
micro-batch, at SFT's price plus the references' tokens; each micro-batch draws its own pair, and the penalty is the
mean over micro-steps and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import Problems
from pipeline.sink.backends import Segments
from pipeline.sink.divergence import SinkStep, penalty
from pipeline.sink.support import sink_refusals
from pipeline.training.method import Method, StepContext


@dataclass
class SurgeryConfig:
    """Surgery's flags, under the public code's names."""

    alpha: float = field(default=300.0, metadata={"help": "Weight of the sink-divergence penalty."})
    sink_token_position: int = field(
        default=0, metadata={"help": "Position of the sink key in each text (0: the first token)."}
    )

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.alpha < math.inf:
            problems.append(f"--alpha {self.alpha}: the penalty's weight is a number of 0 or more")
        if self.sink_token_position < 0:
            problems.append(f"--sink_token_position {self.sink_token_position}: count from 0 at the start of the text")
        if problems:
            raise Problems(problems)


class Surgery(Method):
    """One harmful and one harmless text a micro-batch, packed behind it; the layers inject the penalty's gradient."""

    Config = SurgeryConfig
    pools = ("harmful", "harmless")

    def refuse(self, model_config: Any, ds_config: Mapping[str, Any]) -> list[str]:
        return sink_refusals(model_config, ds_config)

    def reference_texts(self) -> int:
        return 2

    def shortest_reference(self) -> int:
        return int(self.config.sink_token_position) + 2  # one query after the sink

    def step(self, ctx: StepContext) -> None:
        alpha = self.config.alpha
        for micro in ctx.draw("train"):
            references = [*ctx.sample("harmful", micro, 1), *ctx.sample("harmless", micro, 1)]
            batch = ctx.pack(micro, references)
            sink = SinkStep(
                Segments.from_bounds(batch.reference_bounds, batch.input_ids.device),
                start=batch.reference_start,
                harmful=1,
                layers=ctx.model_config.num_hidden_layers,
                heads=ctx.model_config.num_attention_heads,
                alpha=alpha,
                position=self.config.sink_token_position,
            )
            ce = ctx.cross_entropy(micro, batch, sink=sink)
            divergence = sink.divergence()
            r = penalty(divergence)
            ctx.log(
                loss=ce + alpha * r,
                ce_loss=ce,
                sink_penalty=r,
                positive_heads=(divergence > 0).float().mean(),
            )
            ctx.backward(sink.tap(ce), micro, batch, last=micro.last)
