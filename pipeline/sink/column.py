"""The sink column: how much each query attends to the sink key, exactly, with its exact gradient and nothing
quadratic.

Shapes: n reference tokens in all, H query heads, G key/value heads, D head dimension; fp32 unless said. For a query i
of a segment whose sink key is at position s, with x_is their logit: p_i = exp(x_is - LSE_i).

The gradient goes through the LSE as well. With c_i = scale * dL/dp_i * p_i it is

    dq_i = c_i (k_s - Kbar_i),  Kbar_i = sum_j P_ij k_j
    dk_j = - sum_i P_ij c_i q_i  (j != s),   dk_s = sum_i c_i (1 - p_i) q_i

Both sums are attention: the forward of a flash call with V = K - k_s gives Kbar_i - k_s, and the dV of its backward
with dO = c q gives sum_i P_ij c_i q_i. V = K - k_s (not K), c divided by its maximum before it is cast, and dk_s
written from 1 - p = -expm1(x_is - LSE_i) keep bf16 from cancelling on heads whose sink takes nearly all the mass.

A soft cap multiplies each summand by a slope of its own, and a learned sink logit has a gradient too: there the
gradient is taken through the blocked path (`blocked_sink_gradient`), which needs no formula of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.sink.backends import Backend
from pipeline.sink.blocked import blocked_attention
from pipeline.sink.layout import Scoring, Segments


def sink_logprob(q: Tensor, k: Tensor, lse: Tensor, segments: Segments, position: int, scoring: Scoring) -> Tensor:
    """log p_i of every query, [H, n] in lse's dtype. Queries up to the sink itself (i <= s), and those whose window
    has left it, hold -inf, so that p is 0 there.

    q [n,H,D] and k [n,G,D] in any float dtype, lse [H,n]; `position` s counts from each segment's start.
    """
    group = q.shape[1] // k.shape[1]
    columns = []
    for start, end in segments.spans:
        length = end - start
        first = min(position + 1, length)
        last = length if scoring.window is None else max(first, min(length, position + scoring.window))
        column = lse.new_full((q.shape[1], length), -torch.inf)
        if first < last:
            k_s = k[start + position].to(lse.dtype).repeat_interleave(group, dim=0)  # [H,D]
            seen = slice(start + first, start + last)
            logit = scoring.capped(scoring.scale * torch.einsum("nhd,hd->hn", q[seen].to(lse.dtype), k_s))
            column = torch.cat([column[:, :first], logit - lse[:, seen], column[:, last:]], dim=1)
        columns.append(column)
    return torch.cat(columns, dim=1)


def sink_gradient(
    q: Tensor,
    k: Tensor,
    log_p: Tensor,
    grad_p: Tensor,
    segments: Segments,
    position: int,
    scoring: Scoring,
    attend: Backend,
) -> tuple[Tensor, Tensor]:
    """The gradient of sum_hi grad_p[h,i] p[h,i] with respect to q [n,H,D] and k [n,G,D], in their dtypes, by two flash
    calls. For scoring without a soft cap or learned sink logits."""
    n, heads, dim = q.shape
    groups = k.shape[1]
    c_nH = (scoring.scale * grad_p * log_p.exp()).transpose(0, 1)  # [n,H]
    # One scale a key/value head, because its heads' contributions are summed in the kernel.
    largest = c_nH.abs().amax(0).view(groups, -1).amax(1).clamp_min(torch.finfo(torch.float32).tiny)  # [G]
    largest_H = largest.repeat_interleave(heads // groups)
    k_sink = torch.cat(
        [k[min(start + position, end - 1)].expand(end - start, -1, -1) for start, end in segments.spans]
    )

    with torch.enable_grad():
        value = (k - k_sink).detach().requires_grad_()
        shifted_mean, _ = attend(q.detach(), k.detach(), value, segments, scoring, n)  # Kbar_i - k_s
    grad_out = ((c_nH / largest_H)[:, :, None] * q.float()).to(q.dtype)
    (grad_value,) = torch.autograd.grad(shifted_mean, value, grad_out)

    grad_q = (-c_nH[:, :, None] * shifted_mean.detach().float()).to(q.dtype)
    grad_k = -grad_value.float() * largest[:, None]
    # expm1(-inf) = -1 on rows without a sink, where c is 0.
    at_sink = (c_nH * -torch.expm1(log_p).transpose(0, 1))[:, :, None] * q.float()  # c_i (1 - p_i) q_i, [n,H,D]
    for start, end in segments.spans:
        if start + position < end:
            grad_k[start + position] = at_sink[start:end].sum(0).view(groups, -1, dim).sum(1)
    return grad_q, grad_k.to(k.dtype)


def blocked_sink_gradient(
    q: Tensor, k: Tensor, grad_p: Tensor, segments: Segments, position: int, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same gradient on any device for every kind of scoring, and that of the learned sink logits [H] or None."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.enable_grad():
        inputs = [x.detach().to(exact).requires_grad_() for x in (q, k)]
        logits = scoring.sink_logits
        if logits is not None:
            inputs.append(logits.detach().to(exact).requires_grad_())
            scoring = Scoring(scoring.scale, scoring.window, scoring.softcap, inputs[2])
        # Values of no dimension: only the log-sum-exp is wanted.
        _, lse = blocked_attention(inputs[0], inputs[1], inputs[1][..., :0], segments, scoring)
        p = sink_logprob(inputs[0], inputs[1], lse, segments, position, scoring).exp()
        # The log-sum-exp is named as well, because p is a constant where no query sees its sink.
        found = torch.autograd.grad((p * grad_p.to(exact)).sum() + 0 * lse.sum(), inputs)
    grad_logits = None if logits is None else found[2].to(logits.dtype)
    return found[0].to(q.dtype), found[1].to(k.dtype), grad_logits
