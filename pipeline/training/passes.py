"""Extra passes of a step that several methods share: where attention outputs would hurt most if they moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.packing import PackedBatch
from pipeline.training.generators import rng_state, set_rng_state
from pipeline.training.method import MicroBatch, StepContext

SCOPES = ("micro_batch", "global")


def blocks(model: Any, role: str) -> dict[str, nn.Module]:
    """The module named `role` (self_attn, mlp) of every decoder layer, by its full name, in the order of the layers.

    Found by its name, not by its class: class names change between versions and kernels.
    Errors: ValueError if the model does not have exactly one a layer.
    """
    found = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] == role}
    layers = model.config.get_text_config().num_hidden_layers
    if len(found) != layers:
        raise ValueError(
            f"{len(found)} modules are named {role}, and there are {layers} layers: this --method needs one in each"
        )
    return found


def missing_blocks(model: Any, role: str) -> list[str]:
    """The error of `blocks`, for `Method.refuse_modules`."""
    try:
        blocks(model, role)
    except ValueError as error:
        return [str(error)]
    return []


def row_means(losses: Tensor, batch: PackedBatch) -> Tensor:
    """The mean [texts] of the token losses [N] of each of a packed row's texts, with its graph."""
    ends = torch.tensor(batch.bounds[1 : batch.texts + 1], device=losses.device)
    text = torch.bucketize(batch.predict, ends, right=True)
    sums = torch.zeros(batch.texts, dtype=losses.dtype, device=losses.device).index_add(0, text, losses)
    return sums / torch.bincount(text, minlength=batch.texts)


@contextmanager
def shifted(modules: Sequence[nn.Module], shifts: list[Tensor]) -> Iterator[None]:
    """Add shifts[i] to the output of modules[i] (the first of a tuple), in the recomputation of checkpointing as well:
    leave the block after the backward pass.

    An empty `shifts` is filled with zeros to take the gradient of: [1,T,D] in the output's dtype.
    """
    fill = not shifts
    made: dict[int, Tensor] = {}

    def hook_of(place: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            moved = output[0] if isinstance(output, tuple) else output
            if fill and place not in made:
                made[place] = torch.zeros_like(moved, requires_grad=True)
                if len(made) == len(modules):
                    shifts.extend(made[each] for each in range(len(modules)))
            moved = moved + (made[place] if fill else shifts[place])
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook

    handles = [module.register_forward_hook(hook_of(place)) for place, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def shift_gradients(
    ctx: StepContext, modules: Sequence[nn.Module], micro: MicroBatch, batch: PackedBatch
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The cross-entropy, and its gradient with respect to each module's output [1,T,D]; no weight's gradient."""
    shifts: list[Tensor] = []
    with shifted(modules, shifts):
        ce = ctx.cross_entropy(micro, batch)
        gradients = ctx.activation_gradients(ce, shifts)
    return ce.detach(), gradients


def squared_sum(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements (scalar, fp32)."""
    return torch.stack([each.float().square().sum() for each in tensors]).sum()


def worst_shift_backward(
    ctx: StepContext, modules: Sequence[nn.Module], *, rho: float, scope: str
) -> tuple[Tensor, Tensor]:
    """The training rows' cross-entropy with each module's output a_l moved to where it hurts most, to first order:

        a_l + eps_l,   eps_l = rho g_l / ( sqrt(sum_k ||g_k||^2) + 1e-7 ),   g_l = d CE / d a_l

    eps is a constant of the backward pass that follows. Two forwards a micro-batch, one backward to activations, one
    to weights; both see the same dropout.

    Returns the means over this rank's micro-batches of the cross-entropy with the shift and of that without.
    scope: the norm is over a micro-batch's tokens and layers, or (global) over the whole global batch's, for which the
    gradients of all this rank's micro-batches are held at once.
    """
    drawn = [(micro, ctx.pack(micro)) for micro in ctx.draw("train")]
    losses, clean = [], []
    for group in [drawn] if scope == "global" else [[each] for each in drawn]:
        first = []
        for micro, batch in group:
            dropout = rng_state()
            first.append((micro, batch, dropout, *shift_gradients(ctx, modules, micro, batch)))
        squared = squared_sum([each for *_, gradients in first for each in gradients])
        if scope == "global":
            squared = ctx.total(squared)
        scale = rho / (squared.sqrt() + 1e-7)
        moved = torch.zeros_like(squared)
        for micro, batch, dropout, ce, gradients in first:
            shifts = [(scale * each.float()).to(each.dtype) for each in gradients]
            moved += squared_sum(shifts)
            set_rng_state(dropout)
            with shifted(modules, shifts):
                loss = ctx.cross_entropy(micro, batch)
                ctx.backward(loss, micro, batch, last=micro.last)
            losses.append(loss.detach())
            clean.append(ce)
        ctx.log(perturbation_norm=(ctx.total(moved) if scope == "global" else moved).sqrt())
    return torch.stack(losses).mean(), torch.stack(clean).mean()
