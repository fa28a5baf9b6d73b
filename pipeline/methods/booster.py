"""Booster: keep one harmful gradient step from paying off (arXiv 2409.01586).

    min_w  f(w) + lamb [ h(w) - h(w - perturb_alpha grad h(w) / ||grad h(w)||) ]
    g    = grad f(w) + lamb ( grad h(w) - grad h(w') ),   w' = w - perturb_alpha grad h(w) / (||grad h(w)|| + 1e-7)

f is the cross-entropy on the alignment rows, h on harmful ones; the Jacobian of w' is dropped, as in the paper.
Alignment stage. --rho above 0 takes f under Vaccine's shift of the attention outputs, the paper's combination.

Faithful. The public code moves weights forth and back by subtracting and adding, which in bf16 does not bring 5 % of
them back; holds two copies of the gradient; and with accumulation perturbs on one micro-batch. Here harmful gradients
accumulate with weight lamb, then -lamb, in the buffer the optimizer reads; weights come back as they were, bit for
bit; and a step uses the whole global batch. Both harmful passes draw the same dropout.

perturb_alpha is an absolute length over all trained weights. In bf16 a step that short rounds away on a large model
(`perturbation_norm` in the log is what was left of it): train an adapter, or give a length near a real attack step's.

Cost: 3 forwards and 3 backwards (4 and 4, one of them without weight gradients, with --rho); one shard of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Problems, out_of_range
from pipeline.training.generators import rng_state, set_rng_state
from pipeline.training.method import Method, StepContext
from pipeline.training.passes import blocks, missing_blocks, worst_shift_backward
from pipeline.training.zero3 import squared_norm


@dataclass
class BoosterConfig:
    """Booster's flags."""

    lamb: float = field(default=5.0, metadata={"help": "Weight lambda of the harmful terms."})
    perturb_alpha: float = field(
        default=0.1, metadata={"help": "Length of the simulated harmful step, over all trained weights."}
    )
    rho: float = field(default=0.0, metadata={"help": "Norm of Vaccine's shift on the alignment rows; 0: none."})

    def __post_init__(self) -> None:
        if problems := out_of_range(self, vars(self), 0):
            raise Problems(problems)


class Booster(Method):
    """Harmful rows at w and at w', then the alignment rows at w."""

    Config = BoosterConfig
    alignment = True
    pools = ("harmful",)
    touches_shards = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.differentiates_activations = config.rho > 0  # type: ignore[misc]

    def refuse_modules(self, model: Any) -> list[str]:
        return missing_blocks(model, "self_attn") if self.config.rho else []

    def step(self, ctx: StepContext) -> None:
        config, dropout = self.config, rng_state()
        harmful = self._harmful_pass(ctx, config.lamb)
        with ctx.shards.edited() as write:
            write(self._attacked(ctx))
            set_rng_state(dropout)
            attacked = self._harmful_pass(ctx, -config.lamb)
        if config.rho:
            modules = list(blocks(ctx.model, "self_attn").values())
            loss, ce = worst_shift_backward(ctx, modules, rho=config.rho, scope="micro_batch")
        else:
            loss = ce = self._alignment_pass(ctx)
        ctx.log(
            loss=loss + config.lamb * (harmful - attacked), ce_loss=ce, harmful_loss=harmful,
            harmful_loss_attacked=attacked,
        )  # fmt: skip

    @staticmethod
    def _harmful_pass(ctx: StepContext, weight: float) -> Tensor:
        """Accumulates weight x grad h; returns h of this rank."""
        losses = []
        for micro in ctx.draw("harmful"):
            batch = ctx.pack(micro)
            loss = ctx.cross_entropy(micro, batch)
            ctx.backward(weight * loss, micro, batch, last=False)
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    @staticmethod
    def _alignment_pass(ctx: StepContext) -> Tensor:
        losses = []
        for micro in ctx.draw("train"):
            batch = ctx.pack(micro)
            loss = ctx.cross_entropy(micro, batch)
            ctx.backward(loss, micro, batch, last=micro.last)
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def _attacked(self, ctx: StepContext) -> Iterator[Tensor]:
        """The shards of w'. The gradient so far is lamb x grad h, which has the direction of grad h."""
        gradients = ctx.shards.gradients()
        norm = ctx.total(squared_norm(gradients)).sqrt()
        scale = torch.where(norm > 0, self.config.perturb_alpha / (norm + self.config.lamb * 1e-7), 0.0)
        moved = torch.zeros_like(norm)
        for weight, gradient, seen in zip(ctx.shards.weights(), gradients, ctx.shards.seen(), strict=True):
            attacked = (weight - scale * gradient).to(seen.dtype)
            moved += squared_norm([attacked.float() - seen.float()])
            yield attacked
        ctx.log(perturbation_norm=ctx.total(moved).sqrt())
