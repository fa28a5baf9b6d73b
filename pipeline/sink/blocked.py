"""Attention in blocks of queries, in plain PyTorch: any device and float dtype, windows, soft caps and learned sinks.

Shapes: T packed tokens, H query heads, G key/value heads, D and Dv head dimensions. Nothing quadratic is kept: the
forward pass saves the log-sum-exp, the backward pass computes each block's probabilities again. With P = exp(x - LSE),
dP = dO V^T, D_i = dO_i . O_i and E_i the gradient of LSE_i,

    dx_ij = P_ij (dP_ij - D_i + E_i),   times 1 - tanh^2 under a soft cap,

and the learned sink logit of a head, whose value is 0, receives sum_i P_i,sink (E_i - D_i). Computes in fp32, or in
fp64 for fp64 inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.sink.layout import Scoring, Segments

BLOCK_LOGITS = 1 << 23  # logits of all heads that a block may hold: 32 MiB in fp32
LONGEST_BLOCK = 512  # more query rows a block gain nothing


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """q [T,H,D], k [T,G,D], v [T,G,Dv] -> out [T,H,Dv] in q's dtype, LSE [H,T] in fp32 (fp64 for fp64 inputs).

    Both are differentiable in q, k, v and scoring.sink_logits [H].
    """
    out, lse = _Blocked.apply(q, k, v, scoring.sink_logits, segments, scoring)  # type: ignore[no-untyped-call]
    return out, lse


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, segments: Segments, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = torch.empty(*q.shape[:2], v.shape[2], dtype=exact, device=q.device)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=exact, device=q.device)
        for rows, keys in _blocks(q, segments, scoring):
            logits, _ = _logits(q[rows].to(exact), k[keys].to(exact), rows, keys, scoring)
            block_lse = logits.logsumexp(-1)  # [G,H/G,rows]
            if sink_logits is not None:
                block_lse = torch.logaddexp(block_lse, sink_logits.to(exact).view(*block_lse.shape[:2], 1))
            p = torch.exp(logits - block_lse[..., None])
            out[rows] = torch.einsum("ghij,jgd->ighd", p, v[keys].to(exact)).flatten(1, 2)
            lse[:, rows] = block_lse.flatten(0, 1)
        ctx.save_for_backward(q, k, v, sink_logits, out, lse)
        ctx.segments, ctx.scoring, ctx.exact = segments, scoring, exact
        return out.to(q.dtype), lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink_logits, out, lse = ctx.saved_tensors
        scoring, exact = ctx.scoring, ctx.exact
        grad_out, grad_lse = (each.to(exact) for each in grads)
        # What every logit of a query has in common: E_i - D_i, [H,T].
        common = grad_lse - (grad_out * out).sum(-1).t()
        grad_q, grad_k, grad_v = (torch.zeros_like(each, dtype=exact) for each in (q, k, v))
        groups = k.shape[1]
        for rows, keys in _blocks(q, ctx.segments, scoring):
            q_rows, k_keys, v_keys = q[rows].to(exact), k[keys].to(exact), v[keys].to(exact)
            logits, slope = _logits(q_rows, k_keys, rows, keys, scoring)
            p = torch.exp(logits - lse[:, rows].unflatten(0, (groups, -1))[..., None])
            by_group = grad_out[rows].unflatten(1, (groups, -1))  # [rows,G,H/G,Dv]
            grad_v[keys] += torch.einsum("ghij,ighd->jgd", p, by_group)
            grad_logits = torch.einsum("ighd,jgd->ghij", by_group, v_keys)
            grad_logits += common[:, rows].unflatten(0, (groups, -1))[..., None]
            grad_logits *= p
            if slope is not None:
                grad_logits *= slope
            grad_q[rows] = scoring.scale * torch.einsum("ghij,jgd->ighd", grad_logits, k_keys).flatten(1, 2)
            grad_k[keys] += scoring.scale * torch.einsum(
                "ghij,ighd->jgd", grad_logits, q_rows.unflatten(1, (groups, -1))
            )
        grad_sink = None
        if sink_logits is not None:
            p_sink = torch.exp(sink_logits.to(exact)[:, None] - lse)
            grad_sink = (p_sink * common).sum(-1).to(sink_logits.dtype)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_sink, None, None


def _blocks(q: Tensor, segments: Segments, scoring: Scoring) -> Iterator[tuple[slice, slice]]:
    """Blocks of query rows, each with the keys that any of them sees."""
    for start, end in segments.spans:
        rows = min(LONGEST_BLOCK, max(1, BLOCK_LOGITS // (q.shape[1] * (end - start))))
        for low in range(start, end, rows):
            high = min(low + rows, end)
            yield slice(low, high), slice(start + scoring.first_visible(low - start), high)


def _logits(q: Tensor, k: Tensor, rows: slice, keys: slice, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    """Logits [G,H/G,rows,keys], -inf where a key is not seen, and under a soft cap their slope 1 - tanh^2."""
    raw = scoring.scale * torch.einsum("ighd,jgd->ghij", q.unflatten(1, (k.shape[1], -1)), k)
    slope = None
    if scoring.softcap is not None:
        tanh = torch.tanh(raw / scoring.softcap)
        raw, slope = scoring.softcap * tanh, 1 - tanh.square()
    back = torch.arange(rows.start, rows.stop, device=q.device)[:, None] - torch.arange(
        keys.start, keys.stop, device=q.device
    )  # how far each key lies behind each query
    hidden = back < 0
    if scoring.window is not None:
        hidden |= back >= scoring.window
    return raw.masked_fill(hidden, -torch.inf), slope
