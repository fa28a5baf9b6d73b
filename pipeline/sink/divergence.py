"""Sink divergence of every head, and the penalty that Surgery adds to the loss (arXiv 2602.05228).

    a_lh = mean of p[i] over the queries after the sink;  d_lh = a_lh(harmful) - a_lh(harmless)
    R = 1/(L H) sum_lh ReLU(d_lh);                        loss = CE + alpha R

With several reference texts of a kind, a_lh is their mean. The penalty of layer l needs only what layer l sees, so the
layer itself injects its gradient (`SinkPenalty`); collected lists of statistics silently lose theirs under reentrant
checkpointing. What the loop's loss scaling is (1/accumulation, a loss scale) the layer learns from the tap on the
cross-entropy.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from pipeline.sink.backends import Backend
from pipeline.sink.column import sink_logprob
from pipeline.sink.fused import choose_backward
from pipeline.sink.injection import FusedSinkAttention, SinkPenalty
from pipeline.sink.layout import Scoring, Segments


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
        only_layers: Collection[int] | None = None,
        only_heads: Collection[int] | None = None,
    ) -> None:
        """segments: the reference texts, counted from `start`; the first `harmful` of them are the harmful ones.

        layers, heads: how many the model has. only_layers, only_heads: the ones that R is the mean over (all), counted
        from 0; a head number means that head of every such layer.
        """
        self.segments = segments
        self.start = start
        self.layers = sorted(range(layers) if only_layers is None else only_layers)
        self.heads = sorted(range(heads) if only_heads is None else only_heads)
        self.alpha = alpha
        self.position = position
        device = segments.cu_seqlens.device
        self.weights = mean_weights(segments, harmful, position).to(device, non_blocking=True)  # [1,n], every layer's
        self._chosen = torch.zeros(heads, dtype=torch.bool)
        self._chosen[self.heads] = True
        self._chosen = self._chosen.to(device, non_blocking=True)
        self._divergence: dict[int, Tensor] = {}
        self._positive: dict[int, list[int]] | None = None
        self._scale: Tensor | None = None
        self._tapped = False

    def watches(self, layer: int) -> bool:
        """Whether a layer's sinks are asked for."""
        return layer in self.layers

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scoring: Scoring, attend: Backend, layer: int
    ) -> Tensor:
        """A watched layer's attention, [T,H,D], whose backward pass adds the gradient of alpha R_l to q and k."""
        # Split, not sliced: the backward pass of a slice fills a gradient as long as the whole row.
        (user_q, q), (user_k, k), (user_v, v) = (x.split([self.start, len(x) - self.start]) for x in (q, k, v))
        out = []
        if self.start:
            out.append(attend(user_q, user_k, user_v, segments.until(self.start), scoring, self.start)[0])
        backward = choose_backward(q, v, scoring, attend) if self.alpha else None
        if backward is not None:
            out.append(
                FusedSinkAttention.apply(  # type: ignore[no-untyped-call]
                    q, k, v, self, scoring, attend, backward, layer
                )
            )
        else:
            plain, lse = attend(q, k, v, self.segments, scoring, 0)
            out.append(
                SinkPenalty.apply(  # type: ignore[no-untyped-call]
                    plain, q, k, scoring.sink_logits, lse, self, scoring, attend, layer
                )
            )
        return torch.cat(out)

    def tap(self, cross_entropy: Tensor) -> Tensor:
        """Pass the token-normalised cross-entropy through; its incoming gradient becomes the penalty's scale. Once a
        forward."""
        if self._tapped:
            raise RuntimeError("SinkStep.tap was called twice: each forward pass needs a SinkStep of its own")
        self._tapped = True
        tapped: Tensor = _Tap.apply(cross_entropy, self)  # type: ignore[no-untyped-call]
        return tapped

    def record(self, layer: int, divergence: Tensor) -> None:
        """Keep layer's d [H]; a layer that is checkpointed runs again in the backward pass, and writes the same
        value.

        Errors: ValueError if the layer has another number of heads than the model says, or attends twice.
        """
        if len(divergence) != len(self._chosen):
            raise ValueError(
                f"attention layer {layer} has {len(divergence)} heads, and the model's configuration says "
                f"{len(self._chosen)}: its sink divergence cannot be averaged over heads"
            )
        if layer in self._divergence and self._scale is None:
            raise ValueError(f"attention layer {layer} attends twice in a forward pass, so its heads have no one sink")
        self._divergence[layer] = divergence

    def divergence(self) -> Tensor:
        """d of every chosen layer and head, [L,H] fp32, on the device."""
        if missing := [layer for layer in self.layers if layer not in self._divergence]:
            raise RuntimeError(f"attention layers {missing} reported no sink divergence")
        return torch.stack([self._divergence[layer] for layer in self.layers])[:, self.heads]

    def positive_heads(self, layer: int) -> list[int]:
        """The chosen heads of a layer with d > 0: the only ones with a gradient. One read from the device a
        forward."""
        if self._positive is None:
            found = (self.divergence() > 0).tolist()
            self._positive = {
                each: [head for head, positive in zip(self.heads, row, strict=True) if positive]
                for each, row in zip(self.layers, found, strict=True)
            }
        return self._positive[layer]

    def grad_p(self, divergence: Tensor) -> Tensor:
        """dL/dp of a layer's references, [H,n] fp32, from its d [H]: 0 for heads that are not positive or not
        chosen."""
        if self._scale is None:
            raise RuntimeError(
                "the sink penalty's backward ran, but no cross-entropy of this forward went through SinkStep.tap"
            )
        per_head = self._scale.float() * (self.alpha / (len(self.layers) * len(self.heads)))
        return (per_head * (self._chosen & (divergence > 0)))[:, None] * self.weights


class SinkMeans:
    """One forward pass's mean sink attention of every text, to measure a model; goes down as the keyword `sink`."""

    def __init__(self, segments: Segments, *, layers: int, heads: int, position: int = 0, start: int = 0) -> None:
        """segments: the texts to measure, counted from token `start` of the packed row."""
        self.segments = segments
        self.start = start
        self.layers = layers
        self.position = position
        self._weights = text_weights(segments, position).to(segments.cu_seqlens.device)
        self._means: dict[int, Tensor] = {}

    def watches(self, layer: int) -> bool:
        """Every layer."""
        return True

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scoring: Scoring, attend: Backend, layer: int
    ) -> Tensor:
        """A layer's attention, [T,H,D]; its texts' means are kept."""
        out, lse = attend(q, k, v, segments, scoring, self.start)
        p = sink_logprob(q[self.start :], k[self.start :], lse, self.segments, self.position, scoring).exp()
        self._means[layer] = self._weights @ p.detach().t()
        return out

    def means(self) -> Tensor:
        """a_lh of every text, [texts,L,H] fp32, on the device. A text without a query after the sink holds 0."""
        if missing := [layer for layer in range(self.layers) if layer not in self._means]:
            raise RuntimeError(f"attention layers {missing} reported no sink attention")
        return torch.stack([self._means[layer] for layer in range(self.layers)], dim=1)


def penalty(divergence: Tensor) -> Tensor:
    """R = mean ReLU(d) over [L,H]."""
    return divergence.relu().mean()


def text_weights(segments: Segments, position: int) -> Tensor:
    """[texts,n] fp32 weights w with a_h(text t) = sum_i w_ti p_hi: the mean over the text's queries after the sink. A
    text without one has no weight."""
    weights = torch.zeros(len(segments.spans), segments.bounds[-1])
    for text, (start, end) in enumerate(segments.spans):
        first = start + position + 1
        weights[text, first:end] = 1 / max(end - first, 1)
    return weights


def mean_weights(segments: Segments, harmful: int, position: int) -> Tensor:
    """[1,n] fp32 weights w with d_h = sum_i w_i p_hi: the mean over the first `harmful` texts minus the mean over the
    others, without those that have no query after the sink."""
    texts = text_weights(segments, position)
    usable = texts.any(dim=1)
    positive, negative = (
        kind.sum(0, keepdim=True) / count.sum().clamp_min(1)
        for kind, count in ((texts[:harmful], usable[:harmful]), (texts[harmful:], usable[harmful:]))
    )
    return positive - negative


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cross_entropy: Tensor, step: SinkStep) -> Tensor:
        ctx.step = step
        return cross_entropy.view_as(cross_entropy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.step._scale = grads[0].detach()
        return grads[0], None
