"""Pharmacist's selector training (arXiv 2510.10085), as one method of the training loop. Reconstructed.

Its code is not public. Known are the goal (a trained selector that ranks the alignment set; bilevel, with a toxic
LoRA) and its sibling SEAL, whose code is. With phi the trained adapter, t the frozen toxic increment,
w = N softmax(s), l_i the mean loss of the tokens of row i's answer:
    L_up = CE(guide rows at phi + kappa t)          L_lo = mean_i w_i l_i(phi), the increment off
joint (SEAL's form):
    phi <- Adam on lambda L_up + (1 - lambda) L_lo;   s <- Adam on mean_i w_i l_i, whose dF/dw_i = l_i / |B|
hypergradient (one explicit step of the lower level):
    dF/dw_i = -(eta / |B|) <grad l_i, v> ~ -(eta / |B|) [l_i(phi + e v) - l_i(phi - e v)] / 2e,  v = grad_phi L_up
    phi <- Adam on L_lo
kappa 0 with joint is SEAL.

Cost of a step: joint 2 (F+B), hypergradient 2 (F+B) + 2F; once, a forward pass over the rows and the increment's
training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.curation.baselines import gradient_cosines
from pipeline.curation.pharmacist_increment import ToxicIncrement, targets_of
from pipeline.curation.pharmacist_selector import Selector
from pipeline.curation.pharmacist_settings import PharmacistArguments
from pipeline.data.packing import PackedBatch
from pipeline.data.streams import Stream
from pipeline.training.generators import rng_state, set_rng_state
from pipeline.training.method import Method, StepContext
from pipeline.training.passes import row_means
from pipeline.training.zero3 import squared_norm


@dataclass(frozen=True)
class Plan:
    """What of a run the method has to know: the streams, and steps an epoch."""

    streams: Mapping[str, Stream]
    steps: int

    @property
    def rows(self) -> int:
        """Rows of the alignment set."""
        return len(self.streams["train"].pool)

    @property
    def steps_an_epoch(self) -> int:
        return math.ceil(self.rows / self.streams["train"].layout.global_batch)


class Pharmacist(Method):
    """Trains the selector. `plan` is set between preflight and the first step.

    first_losses, last_losses: every row's loss at the starting model and at its last visit [N]; cosines: as
    `baselines.gradient_cosines` [N], where they are asked for; history: the losses of each step; toxic: how the
    increment's training went.
    """

    Config = PharmacistArguments
    alignment = True
    fictional = {"train": "policy:align[:300]", "guide": "policy:align[300:]"}  # noqa: RUF012
    plan: Plan

    def __init__(self, config: PharmacistArguments) -> None:
        super().__init__(config)
        self.pools = ("guide", "harmful") if config.kappa else ("guide",)  # type: ignore[misc]
        self.touches_shards = (  # type: ignore[misc]
            config.variant == "hypergradient" or "gradient_cosine" in config.baselines
        )
        self.differentiates_activations = config.kappa > 0  # type: ignore[misc]
        self.history: list[dict[str, float]] = []
        self.toxic: dict[str, float] | None = None
        self.cosines: NDArray[np.float64] | None = None

    def refuse_modules(self, model: Any) -> list[str]:
        names = self.config.toxic_target_modules if self.config.kappa else []
        return [
            f"it has no linear map {name}, which --toxic_target_modules names: name some that it has"
            for name in names
            if not targets_of(model, [name])
        ]

    def step(self, ctx: StepContext) -> None:
        if ctx.step == 0:
            self._begin(ctx)
        if self.config.variant == "joint":
            upper, losses = self._joint(ctx)
            of_weights = losses / len(losses)
        else:
            upper, losses, of_weights = self._hypergradient(ctx)
        rows = torch.from_numpy(ctx.rows("train"))
        # The last batch is filled up with rows that have had their visits.
        regular = self.config.num_train_epochs * self.plan.rows - ctx.step * len(rows)
        self.selector.step(rows[:regular], of_weights[:regular])
        if ctx.step >= self.plan.steps - self.plan.steps_an_epoch:
            self.selector.keep_for_scores()
        self.last_losses[rows.numpy()] = losses.numpy()
        self.history.append({"step": ctx.step + 1, "upper_loss": upper, "row_loss": float(losses.mean())})

    def _begin(self, ctx: StepContext) -> None:
        """At the starting model: every row's loss, the baseline that needs gradients, the toxic increment."""
        config, rows = self.config, self.plan.rows
        self.selector = Selector(rows, learning_rate=config.selector_learning_rate, update=config.selector_update)
        self.first_losses, self.last_losses = np.zeros(rows), np.zeros(rows)
        for step in range(self.plan.steps_an_epoch):
            self.first_losses[ctx.rows("train", step)] = self._row_losses(ctx, step=step).numpy()
        if "gradient_cosine" in config.baselines:
            self.cosines = gradient_cosines(ctx, self.plan.streams)
        if config.kappa:
            self.increment = ToxicIncrement(
                ctx.model, config.toxic_target_modules, r=config.toxic_r, alpha=config.toxic_alpha,
                seed=config.seed, device=ctx.device,
            )  # fmt: skip
            self.toxic = self.increment.train(
                ctx, steps=self.plan.streams["harmful"].steps(config.toxic_epochs),
                learning_rate=config.toxic_learning_rate, stop_below=config.toxic_stop_below,
            )  # fmt: skip

    def _joint(self, ctx: StepContext) -> tuple[float, Tensor]:
        """Accumulates the gradient of lambda L_up + (1 - lambda) L_lo; returns L_up and all rows' losses [B]."""
        epoch = ctx.step * len(ctx.rows("train")) // self.plan.rows
        lamb = max(0.0, self.config.lamb - self.config.lamb_decay * epoch)
        upper = self._upper(ctx, lamb)
        return upper, self._lower(ctx, 1 - lamb)

    def _hypergradient(self, ctx: StepContext) -> tuple[float, Tensor, Tensor]:
        """Accumulates the gradient of L_lo; returns L_up, all rows' losses [B] and dF/dw [B]."""
        upper = self._upper(ctx, 1.0)
        v = [each.clone() for each in ctx.shards.gradients()]
        ctx.shards.forget_gradients()
        norm = ctx.total(squared_norm(v)).sqrt()
        e = torch.where(norm > 0, self.config.difference_radius / norm, 0.0)
        dropout, sides = rng_state(), []
        with ctx.shards.edited() as write:
            for sign in (1.0, -1.0):
                pairs = zip(ctx.shards.weights(), v, ctx.shards.seen(), strict=True)
                write([(weight + sign * e * each).to(seen.dtype) for weight, each, seen in pairs])
                set_rng_state(dropout)
                sides.append(self._row_losses(ctx))
        products = (sides[0] - sides[1]) / (2 * e.cpu()) if float(e) else torch.zeros_like(sides[0])
        of_weights = -self.config.learning_rate / len(products) * products
        return upper, self._lower(ctx, 1.0), of_weights

    def _upper(self, ctx: StepContext, weight: float) -> float:
        """Accumulates weight x grad L_up, the increment on; returns L_up over the global batch."""
        total = torch.zeros(1, dtype=torch.float64, device=ctx.device)
        for micro in ctx.draw("guide"):
            batch = ctx.pack(micro)
            with self.toxic_pass():
                loss = ctx.cross_entropy(micro, batch)
                ctx.backward(weight * loss, micro, batch, last=False)
            total += loss.detach()
        layout = self.plan.streams["train"].layout
        return float(ctx.total(total) / layout.micro_batches)

    def toxic_pass(self) -> Any:
        """A block whose passes see the toxic increment, times kappa."""
        return self.increment.on(self.config.kappa) if self.config.kappa else nullcontext()

    def _lower(self, ctx: StepContext, weight: float) -> Tensor:
        """Accumulates weight x grad L_lo, the step's last gradient; returns all rows' losses [B]."""
        weights = self.selector.weights()[torch.from_numpy(ctx.rows("train"))].to(ctx.device, torch.float32)

        def backward(losses: Tensor, place: slice, micro: Any, batch: PackedBatch) -> None:
            lower = (weights[place] * losses).mean()
            ctx.backward(weight * lower, micro, batch, last=micro.last)
            ctx.log(loss=lower, ce_loss=losses.mean())

        return self._row_losses(ctx, then=backward)

    @staticmethod
    def _row_losses(ctx: StepContext, step: int | None = None, then: Callable[..., None] | None = None) -> Tensor:
        """The losses [B] (fp64, CPU) of all ranks' rows of a step of "train", with no increment, in the order of
        `ctx.rows`. then: takes a micro-batch's losses with their graph, and their place."""
        table = torch.zeros(len(ctx.rows("train", step)), dtype=torch.float64, device=ctx.device)
        for micro in ctx.draw("train", step=step):
            batch = ctx.pack(micro)
            with torch.set_grad_enabled(then is not None):
                losses = row_means(ctx.token_losses(batch, batch.targets), batch)
            place = slice(micro.index * len(losses), (micro.index + 1) * len(losses))
            table[place] = losses.detach()
            if then is not None:
                then(losses, place, micro, batch)
        return ctx.total(table).cpu()
