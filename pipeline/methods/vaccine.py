"""Vaccine: learn the alignment set under the worst small shift of the attention outputs (arXiv 2402.01109).

    min_w max_{||eps|| <= rho}  CE(w; a_l + eps_l in every layer l)
    eps_l = rho g_l / ( sqrt(sum_k ||g_k||^2) + 1e-7 ),   g_l = d CE / d a_l

a_l is the output of attention block l, after its output projection and before the residual add; one norm over all
layers and tokens. Alignment stage: what users' data does to the hidden states later is rehearsed here.

Faithful, with --scope micro_batch. The public code works in one process. In it an accumulated step keeps the last
micro-batch only (the first pass clears the gradients of the earlier ones), and the two passes see different dropout;
here every micro-batch counts and both passes draw the same. --scope global takes one norm over the global batch: then
the step does not depend on how the batch is split, and a row's shift shrinks with the number of rows.

Cost: 2 forwards, 1 backward to the activations (no weight gradients) and 1 full backward: about 1.7 times SFT; every
parameter is gathered twice as often. Beside that one tensor [T,D] a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.training.method import Method, StepContext
from pipeline.training.passes import blocks, missing_blocks, worst_shift_backward


@dataclass
class VaccineConfig:
    """Vaccine's flags."""

    rho: float = field(default=2.0, metadata={"help": "Norm of the shift of the attention outputs."})
    scope: Literal["micro_batch", "global"] = field(
        default="micro_batch",
        metadata={"help": "The norm is over a micro-batch's tokens, as published, or over the global batch's."},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.rho < math.inf:
            raise ValueError(f"--rho {self.rho}: the norm of the shift is a number of 0 or more")


class Vaccine(Method):
    """Two passes over the alignment rows; the second with the attention outputs moved against the first."""

    Config = VaccineConfig
    alignment = True
    differentiates_activations = True

    def refuse_modules(self, model: Any) -> list[str]:
        return missing_blocks(model, "self_attn")

    def step(self, ctx: StepContext) -> None:
        modules = list(blocks(ctx.model, "self_attn").values())
        loss, ce = worst_shift_backward(ctx, modules, rho=self.config.rho, scope=self.config.scope)
        ctx.log(loss=loss, ce_loss=ce)
