"""The toxic increment: what a harmful fine-tuning of the starting model would add, as low-rank maps beside its own.

It is hazardous, so it lives in the memory of the ranks and is never on a disk: its tensors are no parameters of the
model, no checkpoint, export or log can reach them, and they are gone with the process, however that ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.training.method import StepContext


def targets_of(model: Any, names: list[str]) -> dict[str, Any]:
    """The linear maps whose last name is one of `names`, with or without an adapter in them, by full name."""
    found = {
        name: each
        for name, each in model.named_modules()
        if name.rpartition(".")[2] in names and hasattr(each, "in_features") and hasattr(each, "out_features")
    }
    return dict(sorted(found.items()))


class ToxicIncrement:
    """y + scale (alpha / r) B A x for each target's output y = W x, while it is switched on.

    A [r, in], B [out, r]: fp32, the same on every rank. B starts at zero.
    """

    def __init__(self, model: Any, names: list[str], *, r: int, alpha: float, seed: int, device: torch.device) -> None:
        self._modules = list(targets_of(model, names).values())
        self._scale = alpha / r
        random = torch.Generator().manual_seed(seed)
        self.down, self.up = [], []
        for each in self._modules:
            bound = 1 / math.sqrt(each.in_features)  # PEFT's start of A
            start = (2 * torch.rand(r, each.in_features, generator=random) - 1) * bound
            self.down.append(start.to(device))
            self.up.append(torch.zeros(each.out_features, r, device=device))

    @contextmanager
    def on(self, scale: float) -> Iterator[None]:
        """The passes of the block see the increment, recomputed ones too: leave it after the backward pass. Outside of
        such a block nothing of it is in the model."""

        def hook_of(down: Tensor, up: Tensor) -> Any:
            def hook(_: Any, inputs: Any, output: Tensor) -> Tensor:
                x = inputs[0]
                more = F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
                return output + scale * self._scale * more

            return hook

        handles = [
            module.register_forward_hook(hook_of(down, up))
            for module, down, up in zip(self._modules, self.down, self.up, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def train(self, ctx: StepContext, *, steps: int, learning_rate: float, stop_below: float) -> dict[str, float]:
        """Fine-tune it on the harmful pool with the model as it is, which does not move; then freeze it. Collective.

        Ends early when a global batch's cross-entropy is below `stop_below` times the first one's.
        Returns the batches it saw, and the first and the last one's cross-entropy.
        """
        tensors = [*self.down, *self.up]
        optimizer = torch.optim.AdamW(tensors, lr=learning_rate, weight_decay=0.0)
        losses: list[float] = []
        for each in tensors:
            each.requires_grad_(True)
        for step in range(steps):
            losses.append(self._gradients(ctx, tensors, step))
            if losses[-1] < stop_below * losses[0]:
                break
            optimizer.step()
        for each in tensors:
            each.requires_grad_(False)
            each.grad = None
        return {"batches": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}

    def _gradients(self, ctx: StepContext, tensors: list[Tensor], step: int) -> float:
        """Sets the tensors' gradients to those of a global batch; returns its cross-entropy, rank 0's on all ranks."""
        summed = [torch.zeros_like(each) for each in tensors]
        total = torch.zeros(2, dtype=torch.float64, device=ctx.device)  # losses, micro-batches
        for micro in ctx.draw("harmful", step=step):
            with self.on(1.0):
                loss = ctx.cross_entropy(micro, ctx.pack(micro))
                gradients = ctx.activation_gradients(loss, tensors)
            for place, each in zip(summed, gradients, strict=True):
                place += each
            total += torch.stack([loss.detach().double(), torch.ones_like(total[0])])
        total = ctx.total(total)
        flat = ctx.from_rank_0(ctx.total(torch.cat([each.flatten() for each in summed]))) / total[1]
        parts = flat.split([each.numel() for each in tensors])
        for each, gradient in zip(tensors, parts, strict=True):
            each.grad = gradient.view_as(each).float()
        return float(ctx.from_rank_0(total[:1] / total[1]))
