"""T-Vaccine: Vaccine on a few layers, drawn by how much harmful texts pull at them (arXiv 2410.09760).

    s_l = || d CE(harmful rows) / d a_l ||,   p_l = s_l / sum_k s_k          every --score_every steps
    S   = --perturbed_layers layers drawn by p without replacement           every --resample_every steps
    CE(w; a_l + eps_l, l in S),   eps_l = rho g_l / ( norm over S + 1e-7 )   every step, as in Vaccine

Alignment stage. Attention weights (under LoRA: their adapters) of the layers outside S do not move while S stands;
the MLPs train everywhere.

Variant, for these reasons. The paper speaks of whole layers, the public code freezes their attention adapters: done so
here, and for full-parameter training their attention weights. The public code scores on one text; here the score is
over a global batch of harmful rows, summed over ranks, and rank 0's draw is everyone's. It also recomputes the
activations of the layers outside S to save memory: --gradient_checkpointing does that here for all layers. Freezing by
requires_grad would not hold under ZeRO-3 (momentum and weight decay go on): weights, masters and moments are put back
after the step instead, and frozen gradients do not count in the clipped norm. Adam's step count goes on for them.

Cost: Vaccine's (about 1.7 times SFT), a forward and a backward to activations every --score_every steps, and a copy of
the frozen attention weights and their optimizer states, sharded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipeline.config import Problems, out_of_range
from pipeline.training.method import Method, NonFinite, StepContext
from pipeline.training.passes import blocks, missing_blocks, shift_gradients, squared_sum, worst_shift_backward


@dataclass
class TVaccineConfig:
    """T-Vaccine's flags."""

    rho: float = field(default=3.0, metadata={"help": "Norm of the shift of the drawn layers' attention outputs."})
    perturbed_layers: int = field(default=8, metadata={"help": "Layers drawn."})
    resample_every: int = field(default=20, metadata={"help": "Optimizer steps between two draws."})
    score_every: int = field(default=200, metadata={"help": "Optimizer steps between two scorings."})

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.rho < math.inf:
            problems.append(f"--rho {self.rho}: the norm of the shift is a number of 0 or more")
        problems += out_of_range(self, ("perturbed_layers", "resample_every", "score_every"), 1)
        if problems:
            raise Problems(problems)


class TVaccine(Method):
    """Vaccine's passes over the drawn layers; the others' attention is put back after the step."""

    Config = TVaccineConfig
    alignment = True
    pools = ("harmful",)
    touches_shards = True
    differentiates_activations = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.probabilities: list[float] = []
        self.drawn: list[int] = []
        self._restore: Callable[[], None]

    def refuse(self, model_config: Any, ds_config: Mapping[str, Any]) -> list[str]:
        layers, wanted = model_config.num_hidden_layers, self.config.perturbed_layers
        return [f"--perturbed_layers {wanted}: the model has {layers} layers"] if wanted > layers else []

    def refuse_modules(self, model: Any) -> list[str]:
        return missing_blocks(model, "self_attn")

    def state(self) -> dict[str, Any]:
        return {"probabilities": self.probabilities, "drawn": self.drawn}

    def resume(self, state: Mapping[str, Any], shards: Mapping[str, Any]) -> None:
        self.probabilities = [float(each) for each in state["probabilities"]]
        self.drawn = [int(each) for each in state["drawn"]]

    def step(self, ctx: StepContext) -> None:
        config, attention = self.config, blocks(ctx.model, "self_attn")
        modules = list(attention.values())
        if ctx.step % config.score_every == 0:
            self.probabilities = self._score(ctx, modules)
        if ctx.step % config.resample_every == 0:
            self.drawn = self._draw(ctx)
        chosen = [modules[layer] for layer in self.drawn]
        loss, ce = worst_shift_backward(ctx, chosen, rho=config.rho, scope="micro_batch")
        ctx.log(loss=loss, ce_loss=ce)
        still = tuple(f"{name}." for layer, name in enumerate(attention) if layer not in self.drawn)
        frozen = {name for name in ctx.shards.names if name.startswith(still)}
        ctx.shards.forget_gradients(frozen)
        self._restore = ctx.shards.hold(frozen)

    def after_step(self, ctx: StepContext) -> None:
        self._restore()

    @staticmethod
    def _score(ctx: StepContext, modules: list[nn.Module]) -> list[float]:
        squares = torch.zeros(len(modules), device=ctx.device)
        for micro in ctx.draw("harmful"):
            _, gradients = shift_gradients(ctx, modules, micro, ctx.pack(micro))
            squares += torch.stack([squared_sum([each]) for each in gradients])
        scores: list[float] = ctx.total(squares).double().sqrt().tolist()
        if not all(map(math.isfinite, scores)):
            raise NonFinite(f"step {ctx.step + 1}: the harmful gradient is not finite. No optimizer step was taken")
        # A layer that nothing pulls at keeps a trace of a chance: as many layers must be drawn, whatever the scores.
        floor = 1e-6 * max(scores) or 1.0
        return [max(each, floor) / sum(max(each, floor) for each in scores) for each in scores]

    def _draw(self, ctx: StepContext) -> list[int]:
        """Rank 0's draw: ranks that hooked different layers would wait for each other in different collectives."""
        picked = ctx.generator("layers").choice(
            len(self.probabilities), size=self.config.perturbed_layers, replace=False, p=self.probabilities
        )
        return sorted(ctx.from_rank_0(torch.tensor(picked, device=ctx.device)).tolist())
