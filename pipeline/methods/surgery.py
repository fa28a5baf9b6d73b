"""Surgery: keep heads from learning harmful patterns by a penalty on attention-sink divergence (arXiv 2602.05228).

    loss = CE + alpha R,   R = 1/(L H) sum_lh ReLU( sink_lh(harmful texts) - sink_lh(harmless texts) )

Faithful to the paper's objective. The public code runs three eager forward passes a step (user batch, one harmful
text, one harmless text) with all attention maps in memory, draws the same pair on every rank, and does not divide by
the accumulation. Here the texts ride behind the user's in one packed row: one forward and one backward a micro-batch,
at SFT's price plus the references' tokens; each micro-batch draws its own references, and the penalty is the mean over
micro-steps and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import Problems, out_of_range
from pipeline.sink.divergence import SinkStep, penalty
from pipeline.sink.layout import Segments
from pipeline.sink.support import sink_refusals
from pipeline.training.method import Method, StepContext


@dataclass
class SurgeryConfig:
    """Surgery's flags, under the public code's names where it has one."""

    alpha: float = field(default=300.0, metadata={"help": "Weight of the sink-divergence penalty."})
    sink_token_position: int = field(
        default=0, metadata={"help": "Position of the sink key in each text (0: the first token)."}
    )
    references_per_step: int = field(
        default=1,
        metadata={"help": "Harmful texts, and harmless ones, a micro-batch; their mean is taken before the ReLU."},
    )
    penalty_every: int = field(
        default=1,
        metadata={
            "help": "Add the penalty every N optimizer steps, N times as strong. Above 1 an approximation: the steps "
            "between see no reference text and cost what SFT's do."
        },
    )
    layers: list[str] = field(
        default_factory=list, metadata={"help": "Layers that the penalty is the mean over: 0 5 8-15. [default: all]"}
    )
    heads: list[str] = field(
        default_factory=list, metadata={"help": "Query heads of each such layer: 0 2-5. [default: all]"}
    )

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.alpha < math.inf:
            problems.append(f"--alpha {self.alpha}: the penalty's weight is a number of 0 or more")
        if self.sink_token_position < 0:
            problems.append(f"--sink_token_position {self.sink_token_position}: count from 0 at the start of the text")
        problems += out_of_range(self, ("references_per_step", "penalty_every"), 1)
        for name in ("layers", "heads"):
            try:
                numbers(name, getattr(self, name))
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise Problems(problems)


class Surgery(Method):
    """Harmful and harmless texts behind each micro-batch; the layers inject the penalty's gradient."""

    Config = SurgeryConfig
    pools = ("harmful", "harmless")

    def refuse(self, model_config: Any, ds_config: Mapping[str, Any]) -> list[str]:
        reasons = sink_refusals(model_config, ds_config)
        for name, count in (
            ("layers", model_config.num_hidden_layers),
            ("heads", model_config.num_attention_heads),
        ):
            chosen = numbers(name, getattr(self.config, name))
            if chosen and max(chosen) >= count:
                reasons.append(f"--{name} {max(chosen)}: the model has {count} {name}, counted from 0")
        return reasons

    def reference_texts(self) -> int:
        return int(self.config.references_per_step)

    def shortest_reference(self) -> int:
        return int(self.config.sink_token_position) + 2  # one query after the sink

    def step(self, ctx: StepContext) -> None:
        config = self.config
        with_penalty = ctx.step % config.penalty_every == 0
        alpha = config.alpha * config.penalty_every
        for micro in ctx.draw("train"):
            if not with_penalty:
                batch = ctx.pack(micro)
                ce = ctx.cross_entropy(micro, batch)
                ctx.log(loss=ce, ce_loss=ce)
                ctx.backward(ce, micro, batch, last=micro.last)
                continue
            count = config.references_per_step
            references = [*ctx.sample("harmful", micro, count), *ctx.sample("harmless", micro, count)]
            batch = ctx.pack(micro, references)
            sink = SinkStep(
                Segments.from_bounds(batch.reference_bounds, batch.input_ids.device),
                start=batch.reference_start,
                harmful=count,
                layers=ctx.model_config.num_hidden_layers,
                heads=ctx.model_config.num_attention_heads,
                alpha=alpha,
                position=config.sink_token_position,
                only_layers=numbers("layers", config.layers),
                only_heads=numbers("heads", config.heads),
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


def numbers(flag: str, words: list[str]) -> list[int] | None:
    """The numbers that words such as 3 and 8-15 name, in order; None for no words.

    Errors: ValueError naming the flag and the word.
    """
    found: set[int] = set()
    for word in words:
        first, dash, last = word.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"--{flag} {word}: give numbers or ranges, counted from 0, such as 3 or 8-15")
        found.update(range(int(first), int(last if dash else first) + 1))
    return sorted(found) or None
