"""The sink column: how much each query attends to the sink key, exactly, with its exact gradient and nothing
quadratic.

Shapes: n reference tokens in all, H query heads, G key/value heads, D head dimension; fp32 unless said. For a query i
of a segment whose sink key is at position s: p_i = exp(scale q_i . k_s - LSE_i).

The gradient goes through the LSE as well. With c_i = scale * dL/dp_i * p_i it is

    dq_i = c_i (k_s - Kbar_i),  Kbar_i = sum_j P_ij k_j
    dk_j = - sum_i P_ij c_i q_i  (j != s),   dk_s = sum_i c_i (1 - p_i) q_i

Both sums are attention: the forward of a flash call with V = K - k_s gives Kbar_i - k_s, and the dV of its backward
with dO = c q gives sum_i P_ij c_i q_i. V = K - k_s (not K), c divided by its maximum before it is cast, and dk_s
written from 1 - p = -expm1(s_i - LSE_i) keep bf16 from cancelling on heads whose sink takes nearly all the mass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.sink.backends import Backend, Segments


def sink_logprob(q: Tensor, k: Tensor, lse: Tensor, segments: Segments, position: int, scale: float) -> Tensor:
    """log p_i of every query, [H, n] fp32; queries up to the sink itself (i <= s) hold -inf, so that p is 0 there.

    q [n,H,D] and k [n,G,D] in any float dtype, lse [H,n] fp32; `position` s counts from each segment's start.
    """
    group = q.shape[1] // k.shape[1]
    log_p = torch.full(lse.shape, -torch.inf, dtype=torch.float32, device=q.device)
    for start, end in segments.spans:
        first = start + position + 1
        if first >= end:
            continue  # no query after the sink
        k_s = k[start + position].float().repeat_interleave(group, dim=0)  # [H,D]
        score = scale * torch.einsum("nhd,hd->hn", q[first:end].float(), k_s)
        log_p[:, first:end] = score - lse[:, first:end]
    return log_p


def sink_gradient(
    q: Tensor,
    k: Tensor,
    log_p: Tensor,
    grad_p: Tensor,
    segments: Segments,
    position: int,
    scale: float,
    attend: Backend,
) -> tuple[Tensor, Tensor]:
    """The gradient of sum_hi grad_p[h,i] p[h,i] with respect to q [n,H,D] and k [n,G,D], in their dtypes, by two flash
    calls."""
    n, heads, dim = q.shape
    groups = k.shape[1]
    c_nH = (scale * grad_p * log_p.exp()).transpose(0, 1)  # [n,H]
    # One scale a key/value head, because its heads' contributions are summed in the kernel.
    largest = c_nH.abs().amax(0).view(groups, -1).amax(1).clamp_min(torch.finfo(torch.float32).tiny)  # [G]
    largest_H = largest.repeat_interleave(heads // groups)
    k_sink = torch.cat(
        [k[min(start + position, end - 1)].expand(end - start, -1, -1) for start, end in segments.spans]
    )

    with torch.enable_grad():
        value = (k - k_sink).detach().requires_grad_()
        shifted_mean, _ = attend(q.detach(), k.detach(), value, segments, scale, n)  # Kbar_i - k_s
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
