"""The attention backward with the sink's gradient in it on a CPU: PyTorch's flash backward with one more dimension.

Shapes: n packed tokens, H query heads, G key/value heads, D head dimension. With P, dP, D_i and g as in `fused`,

    dx_ij = P_ij (dP_ij - (D_i + g_i p_i)) + 1[j = s] g_i p_i

The kernel takes `out` for the sum D_i = dO_i . O_i alone. So a last dimension that holds g_i p_i in dO, 1 in O and 0
in q, k and v adds g_i p_i to D_i and changes nothing else. Keys enter as k_j - k_s: that adds one number to all logits
of a query, so its probabilities stay when its log-sum-exp takes the number too, and as dx sums to 0 over a query's
keys, so does dq. The sink's own key is then 0, and the last term of dx reaches dk_s alone: nothing cancels in dq where
the sink takes nearly all the mass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.sink.layout import Scoring, Segments


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_p: Tensor,
    segments: Segments,
    position: int,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [n,H,D], dk and dv [n,G,D], as `fused.attention_backward` of plain causal scoring, in fp32 or fp64.

    Less exact inputs would be rounded inside the kernel after the sink's part is added, and there the sum cancels.
    """
    grads = [each.new_empty(each.shape) for each in (q, k, v)]
    for start, end in segments.spans:
        at = slice(start, end)
        found = _text_backward(
            q[at], k[at], v[at], out[at], grad_out[at], lse[:, at], grad_p[:, at], position, scoring.scale
        )
        for grad, each in zip(grads, found, strict=True):
            grad[at] = each
    return grads[0], grads[1], grads[2]


def _text_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    grad_p: Tensor,
    position: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One text of n tokens."""
    n, heads, dim = q.shape
    groups = k.shape[1]
    # Without a positive head, or a query after the sink, it is plain attention; a planned step has positive heads.
    seen = position + 1 < n and (q.is_meta or bool(grad_p[:, position + 1 :].any()))
    if seen:
        k_sink = k[position]  # [G,D]
        logit = scale * torch.einsum("ngrd,gd->grn", q.unflatten(1, (groups, -1)), k_sink).flatten(0, 1)  # [H,n]
        lse = lse - logit
        pull = grad_p * torch.exp(-lse)  # g_i p_i, [H,n]
        pull[:, : position + 1] = 0
        k = k - k_sink
        q, k, v = (F.pad(each, (0, 1)) for each in (q, k, v))
        out = F.pad(out, (0, 1), value=1.0)
        grad_out = torch.cat([grad_out, pull.t()[..., None].to(grad_out.dtype)], dim=-1)
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(each.transpose(0, 1)[None] for each in (grad_out, q, k, v, out)), lse[None], 0.0, True, scale=scale
    )
    grad_q, grad_k, grad_v = (each[0].transpose(0, 1)[..., :dim] for each in found)
    if seen:
        at_sink = scale * torch.einsum("hn,nhd->hd", pull.to(q.dtype), q[..., :dim])
        grad_k[position] += at_sink.view(groups, -1, dim).sum(1)
    return grad_q, grad_k, grad_v
