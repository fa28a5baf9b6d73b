"""Sink divergence of every head, and the penalty that Surgery adds to the loss (arXiv 2602.05228).

    a_lh = mean of p[i] over the queries after the sink;  d_lh = a_lh(harmful) - a_lh(harmless)
    R = 1/(L H) sum_lh ReLU(d_lh);                        loss = CE + alpha R

With several reference texts of a kind, a_lh is their mean. The penalty of layer l needs only what layer l sees, so the
layer itself injects its gradient (`SinkPenalty`); collected lists of statistics silently lose theirs under reentrant
checkpointing. What the loop's loss scaling is (1/accumulation, a loss scale) the layer learns from the tap on the
cross-entropy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.sink.backends import Backend, Segments
from pipeline.sink.column import sink_gradient, sink_logprob


class SinkStep:
    """One forward pass's reference texts and statistics; goes down to the attention layers as the keyword `sink`.

    The references stand at the end of the packed row, from token `start` on: first the harmful ones, then the harmless
    ones.
    """

    def __init__(
        self,
        segments: Segments,
        *,
        start: int,
        harmful: int,
        layers: int,
        heads: int,
        alpha: float,
        position: int = 0,
    ) -> None:
        """segments: the reference texts, counted from `start`; the first `harmful` of them are the harmful ones."""
        self.segments = segments
        self.start = start
        self.layers = layers
        self.heads = heads
        self.alpha = alpha
        self.position = position
        self.weights = mean_weights(segments, harmful, position)  # the same in every layer
        self._divergence: dict[int, Tensor] = {}
        self._scale: Tensor | None = None
        self._tapped = False

    def tap(self, cross_entropy: Tensor) -> Tensor:
        """Pass the token-normalised cross-entropy through; its incoming gradient becomes the penalty's scale. Once a
        forward."""
        if self._tapped:
            raise RuntimeError("SinkStep.tap was called twice: each forward pass needs a SinkStep of its own")
        self._tapped = True
        tapped: Tensor = _Tap.apply(cross_entropy, self)  # type: ignore[no-untyped-call]
        return tapped

    @property
    def scale(self) -> Tensor:
        """The gradient of the final loss with respect to the tapped cross-entropy."""
        if self._scale is None:
            raise RuntimeError(
                "the sink penalty's backward ran, but no cross-entropy of this forward went through SinkStep.tap"
            )
        return self._scale

    def record(self, layer: int, divergence: Tensor) -> None:
        """Keep layer's d [H]; a checkpointed layer runs twice and writes the same value again."""
        self._divergence[layer] = divergence

    def divergence(self) -> Tensor:
        """d of every layer and head, [L,H] fp32, on the device."""
        if len(self._divergence) != self.layers:
            raise RuntimeError(f"{len(self._divergence)} of {self.layers} attention layers reported a sink divergence")
        return torch.stack([self._divergence[layer] for layer in sorted(self._divergence)])


def penalty(divergence: Tensor) -> Tensor:
    """R = mean ReLU(d) over [L,H]."""
    return divergence.relu().mean()


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cross_entropy: Tensor, step: SinkStep) -> Tensor:
        ctx.step = step
        return cross_entropy.view_as(cross_entropy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.step._scale = grads[0].detach()
        return grads[0], None


class SinkPenalty(torch.autograd.Function):
    """Identity on a layer's attention output whose backward adds the gradient of alpha R_l to the references' q and
    k."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        step: SinkStep,
        layer: int,
        scale: float,
        attend: Backend,
    ) -> Tensor:
        """out: any shape; q [n,H,D], k [n,G,D], lse [H,n] of the reference tokens only."""
        log_p = sink_logprob(q, k, lse, step.segments, step.position, scale)
        divergence = (log_p.exp() * step.weights).sum(-1)
        step.record(layer, divergence)
        ctx.save_for_backward(q, k, log_p, divergence)
        ctx.step, ctx.scale, ctx.attend = step, scale, attend
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, log_p, divergence = ctx.saved_tensors
        step: SinkStep = ctx.step
        nothing = (None,) * 5
        if step.alpha == 0 or not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return grads[0], None, None, *nothing
        positive = divergence > 0
        if q.device.type == "cpu" and not positive.any():  # on a GPU the look would stall the launch queue
            return grads[0], None, None, *nothing
        per_head = step.scale.float() * (step.alpha / (step.layers * step.heads)) * positive  # [H]
        grad_q, grad_k = sink_gradient(
            q, k, log_p, per_head[:, None] * step.weights, step.segments, step.position, ctx.scale, ctx.attend
        )
        return grads[0], grad_q, grad_k, *nothing


def mean_weights(segments: Segments, harmful: int, position: int) -> Tensor:
    """[1,n] fp32 weights w with d_h = sum_i w_i p_hi: the mean over each text's queries after the sink, then over the
    texts of
    a kind. A text with no query after the sink contributes nothing.
    """
    weights = torch.zeros(1, segments.bounds[-1])
    for kind, sign in ((segments.spans[:harmful], 1.0), (segments.spans[harmful:], -1.0)):
        usable = [(start + position + 1, end) for start, end in kind if end - start > position + 1]
        for first, end in usable:
            weights[:, first:end] = sign / (len(usable) * (end - first))
    return weights.to(segments.cu_seqlens.device, non_blocking=True)
