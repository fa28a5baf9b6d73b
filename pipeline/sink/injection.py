"""The autograd nodes that put the penalty's gradient where it arises: inside each attention layer.

Each computes the layer's divergence d [H] in its forward pass, hands it to the step, and adds the gradient of alpha
R_l to the layer's q and k in its backward pass. `SinkPenalty` stands behind any kernel; `FusedSinkAttention` is the
attention of the reference texts itself, with the sink gradient inside its backward pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.sink.backends import Backend
from pipeline.sink.column import blocked_sink_gradient, sink_gradient, sink_logprob
from pipeline.sink.fused import AttentionBackward
from pipeline.sink.layout import Scoring

if TYPE_CHECKING:
    from pipeline.sink.divergence import SinkStep


class SinkPenalty(torch.autograd.Function):
    """Identity on a layer's attention output whose backward adds the gradient of alpha R_l to the references' q and
    k."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        q: Tensor,
        k: Tensor,
        sink_logits: Tensor | None,
        lse: Tensor,
        step: SinkStep,
        scoring: Scoring,
        attend: Backend,
        layer: int,
    ) -> Tensor:
        """out: any shape; q [n,H,D], k [n,G,D], lse [H,n] of the reference tokens only; sink_logits [H]: the
        scoring's."""
        log_p = sink_logprob(q, k, lse, step.segments, step.position, scoring)
        divergence = (log_p.exp() * step.weights).sum(-1)
        step.record(layer, divergence)
        ctx.save_for_backward(q, k, log_p, divergence)
        ctx.step, ctx.scoring, ctx.attend, ctx.layer = step, scoring, attend, layer
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, log_p, divergence = ctx.saved_tensors
        step: SinkStep = ctx.step
        settings = (None,) * 5
        if step.alpha == 0 or not any(ctx.needs_input_grad[1:4]):
            return grads[0], None, None, None, *settings
        grad_p = step.grad_p(divergence)
        if not (heads := step.positive_heads(ctx.layer)):
            return grads[0], None, None, None, *settings
        found = _of_heads(heads, q, k, log_p, grad_p, step, ctx.scoring, ctx.attend)
        return grads[0], *found, *settings


def _of_heads(
    heads: list[int],
    q: Tensor,
    k: Tensor,
    log_p: Tensor,
    grad_p: Tensor,
    step: SinkStep,
    scoring: Scoring,
    attend: Backend,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sink gradient of some heads with respect to all of q, k and the learned sink logits."""
    every = len(heads) == q.shape[1]
    group = q.shape[1] // k.shape[1]
    logits = scoring.sink_logits
    some_q, some_k = q, k
    if not every:
        chosen = torch.tensor(heads, device=q.device)
        some_q, some_k = q[:, chosen], k[:, chosen // group]  # every query head with a key head of its own
        log_p, grad_p = log_p[chosen], grad_p[chosen]
        if logits is not None:
            scoring = replace(scoring, sink_logits=logits[chosen])
    segments, position = step.segments, step.position
    grad_logits = None
    if scoring.softcap is None and logits is None:
        grad_q, grad_k = sink_gradient(some_q, some_k, log_p, grad_p, segments, position, scoring, attend)
    else:
        grad_q, grad_k, grad_logits = blocked_sink_gradient(some_q, some_k, grad_p, segments, position, scoring)
    if every:
        return grad_q, grad_k, grad_logits
    if logits is not None and grad_logits is not None:
        grad_logits = torch.zeros_like(logits).index_copy(0, chosen, grad_logits)
    return (
        torch.zeros_like(q).index_copy(1, chosen, grad_q),
        torch.zeros_like(k).index_add(1, chosen // group, grad_k),
        grad_logits,
    )


class FusedSinkAttention(torch.autograd.Function):
    """The references' attention, whose backward is that of the attention with the penalty's gradient inside."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        step: SinkStep,
        scoring: Scoring,
        attend: Backend,
        backward: AttentionBackward,
        layer: int,
    ) -> Tensor:
        """q [n,H,D], k and v [n,G,D] of the reference tokens -> [n,H,D]."""
        out, lse = attend(q, k, v, step.segments, scoring, 0)
        log_p = sink_logprob(q, k, lse, step.segments, step.position, scoring)
        divergence = (log_p.exp() * step.weights).sum(-1)
        step.record(layer, divergence)
        ctx.save_for_backward(q, k, v, out, lse, divergence)
        ctx.step, ctx.scoring, ctx.attention_backward = step, scoring, backward
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, divergence = ctx.saved_tensors
        step: SinkStep = ctx.step
        grad_p = step.grad_p(divergence)
        rule = (step.segments, step.position, ctx.scoring)
        found = ctx.attention_backward(q, k, v, out, lse, grads[0], grad_p, *rule)
        return *found, None, None, None, None, None
