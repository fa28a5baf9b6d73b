"""TAR: train against simulated attackers, at the weights they reach (arXiv 2408.00761).

    g = lamb_tr sum_{i in I} c_i grad L_tr(w_i; held-out harmful rows)  +  lamb_retain grad L_retain(w_0; train rows)

w_i: after i + 1 of --inner_steps AdamW steps of an attacker who starts at w_0 and fine-tunes on --harmful_data, at a
learning rate drawn anew each step; I: every --tamper_every-th of them, c_i = exp(s (i - (K - 1))), s --tamper_slope.
    L_tr     = - mean entropy of the next-token distribution over the answers of --tamper_data
    L_retain = CE(train rows) + mean_l mean_t || h_l(t) - h_l at the starting weights (t) ||
The gradient at w_i is applied to w_0 as it is (first order, as in the paper). Alignment stage, on a refusing model.

Variant. The public code (FSDP1) has more attackers (retain-then-forget), takes the entropy over padding too, uses
ScheduleFree AdamW outside, and holds a second model for h at the start; for refusals it replaces L_tr by DPO. Here
there is one attacker, SFT on harmful rows; AdamW outside; and the starting weights' shards are put in place for one
forward. Attackers' batches are global batches. No engine step is taken inside: it would advance the outer optimizer.

Cost: K (F+B) + K/every (F+B) + 2F + B a step: with the defaults 81 times SFT. --inner_steps 8 --tamper_every 4 is a
small setting. Beside the optimizer: four fp32 and two model-dtype copies of the trained weights, sharded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Problems, out_of_range
from pipeline.data.packing import PackedBatch
from pipeline.training.generators import rng_state, set_rng_state
from pipeline.training.losses import token_entropy
from pipeline.training.method import Method, MicroBatch, StepContext
from pipeline.training.passes import blocks, missing_blocks
from pipeline.training.zero3 import Shards

Drawn = list[tuple[MicroBatch, PackedBatch]]


@dataclass
class TARConfig:
    """TAR's flags."""

    inner_steps: int = field(default=64, metadata={"help": "Steps K of the simulated attacker."})
    inner_learning_rates: list[float] = field(
        default_factory=lambda: [2e-6, 2e-5, 4e-5], metadata={"help": "The attacker's learning rates, drawn by step."}
    )
    tamper_every: int = field(default=4, metadata={"help": "Attacker steps between two tamper-resistance gradients."})
    tamper_slope: float = field(default=0.0625, metadata={"help": "How much more the attacker's later steps count."})
    lamb_tr: float = field(default=4.0, metadata={"help": "Weight of tamper resistance."})
    lamb_retain: float = field(default=1.0, metadata={"help": "Weight of what is to be retained."})

    def __post_init__(self) -> None:
        problems = out_of_range(self, ("inner_steps", "tamper_every"), 1)
        if self.tamper_every > self.inner_steps:
            problems.append(
                f"--tamper_every {self.tamper_every}: above --inner_steps {self.inner_steps} nothing is measured"
            )
        problems += out_of_range(self, ("tamper_slope", "lamb_tr", "lamb_retain"), 0)
        if not self.inner_learning_rates or not all(0 < each < math.inf for each in self.inner_learning_rates):
            rates = " ".join(map(str, self.inner_learning_rates))
            problems.append(f"--inner_learning_rates {rates}: give numbers above 0")
        if problems:
            raise Problems(problems)


class TAR(Method):
    """An attack inside each step; its gradients are added to those of the retain loss at the untouched weights."""

    Config = TARConfig
    alignment = True
    pools = ("harmful", "tamper")
    fictional = {"harmful": "policy:harmful[:150]", "tamper": "policy:harmful[150:]"}  # noqa: RUF012
    touches_shards = True

    def refuse_modules(self, model: Any) -> list[str]:
        return missing_blocks(model, "self_attn")

    def batches_a_step(self, pool: str) -> int:
        return int(self.config.inner_steps) if pool == "harmful" else 1

    def begin(self, shards: Shards) -> None:
        # Not saved: a resumed run starts from the same model, and loads its checkpoint after this.
        self.start = [each.clone() for each in shards.seen()]

    def step(self, ctx: StepContext) -> None:
        train = [(micro, ctx.pack(micro)) for micro in ctx.draw("train")]
        dropout: list[Any] = []
        with ctx.shards.edited() as write:
            resistance = self._attack(ctx, write)
            write(self.start)
            before = [self._starting_states(ctx, batch, dropout) for _, batch in train]
        for (micro, batch), states, random in zip(train, before, dropout, strict=True):
            set_rng_state(random)
            self._retain(ctx, micro, batch, states)
        ctx.shards.add_to_gradients(resistance)

    def _attack(self, ctx: StepContext, write: Any) -> list[Tensor]:
        """Fine-tune the weights in place on harmful rows; returns the shards of the tamper-resistance gradient."""
        config = self.config
        held_out: Drawn = [(micro, ctx.pack(micro)) for micro in ctx.draw("tamper")]
        weights = [nn.Parameter(each.clone()) for each in ctx.shards.weights()]
        rate = float(ctx.generator("attacker").choice(config.inner_learning_rates))
        attacker = torch.optim.AdamW(weights, lr=rate)  # torch's defaults, as in the public code
        resistance = [torch.zeros_like(each) for each in weights]
        for i in range(config.inner_steps):
            for micro in ctx.draw("harmful", step=ctx.step * config.inner_steps + i):
                batch = ctx.pack(micro)
                loss = ctx.cross_entropy(micro, batch)
                ctx.backward(loss, micro, batch, last=False)
                if i == 0:
                    ctx.log(harmful_loss=loss)
            for weight, gradient in zip(weights, ctx.shards.gradients(), strict=True):
                weight.grad = gradient
            attacker.step()
            ctx.shards.forget_gradients()
            write(each.detach() for each in weights)
            if (i + 1) % config.tamper_every == 0:
                weight_of_step = math.exp(config.tamper_slope * (i - (config.inner_steps - 1)))
                self._resist(ctx, held_out, config.lamb_tr * weight_of_step)
                for total, gradient in zip(resistance, ctx.shards.gradients(), strict=True):
                    total += gradient
                ctx.shards.forget_gradients()
        return resistance

    @staticmethod
    def _resist(ctx: StepContext, held_out: Drawn, weight: float) -> None:
        """Accumulate weight x grad L_tr at the attacked weights."""
        for micro, batch in held_out:
            entropies = ctx.token_losses(batch, batch.targets, score=token_entropy)
            entropy = ctx.token_mean(entropies, micro.trained_tokens)
            ctx.log(attacked_entropy=entropy)
            ctx.backward(-weight * entropy, micro, batch, last=False)

    def _starting_states(self, ctx: StepContext, batch: PackedBatch, dropout: list[Any]) -> list[Tensor]:
        """Every layer's output on a packed row, with the weights as they are now."""
        dropout.append(rng_state())
        with torch.no_grad(), _layer_outputs(ctx.model) as states:
            ctx.token_losses(batch, batch.targets)
        return states

    def _retain(self, ctx: StepContext, micro: MicroBatch, batch: PackedBatch, before: list[Tensor]) -> None:
        with _layer_outputs(ctx.model) as states:
            ce = ctx.cross_entropy(micro, batch)
        drifts = [
            torch.linalg.vector_norm(now.float() - then.float(), dim=-1).mean()
            for now, then in zip(states, before, strict=True)
        ]
        drift = torch.stack(drifts).mean()
        loss = self.config.lamb_retain * (ce + drift)
        ctx.log(loss=loss, ce_loss=ce, drift=drift)
        ctx.backward(loss, micro, batch, last=micro.last)


@contextmanager
def _layer_outputs(model: Any) -> Iterator[list[Tensor]]:
    """A list that is filled with every layer's output [1,T,D] in the forward passes of the block."""
    outputs: list[Tensor] = []

    def hook(_: Any, __: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    layers = [model.get_submodule(name.rpartition(".")[0]) for name in blocks(model, "self_attn")]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    yield outputs
    for handle in handles:
        handle.remove()
