"""The attention backward with the sink's gradient in it, no flash call of the sink's own: three Triton kernels, or
`fused_cpu`.

Shapes: n packed tokens, H query heads, G key/value heads, D head dimension. p_i = P_is is the probability of the sink
key s of query i's text and g_i = dL/dp_i. Through the softmax it reaches every logit x_ij that the query has, so with
dP_ij = dO_i . v_j and D_i = dO_i . O_i

    dx_ij = P_ij (dP_ij - D_i) + g_i p_i (1[j = s] - P_ij) = P_ij (dP_ij - (D_i + g_i p_i)) + 1[j = s] g_i p_i
    dq_i = scale sum_j dx_ij k_j,   dk_j = scale sum_i dx_ij q_i,   dv_j = sum_i P_ij dO_i

and a soft cap multiplies dx_ij by 1 - tanh^2. Without g this is FlashAttention-2's backward (arXiv 2307.08691).
Learned sink logits act through the LSE alone; their own gradient is not computed here.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.sink import fused_cpu
from pipeline.sink.backends import Backend, cpu_flash
from pipeline.sink.layout import Scoring, Segments

# (q, k, v, out, lse, grad_out, grad_p, segments, position, scoring) -> dq, dk, dv: see `attention_backward`.
AttentionBackward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Segments, int, Scoring], tuple[Tensor, Tensor, Tensor]
]

LARGEST_DIM = 256  # a wider head does not fit a program's registers
ROWS = 32  # queries of a program of rows_kernel
ROOMY = 160 << 10  # bytes of shared memory a program may use on an A100; newer data-center chips have more


class Blocks(NamedTuple):
    """How keys_kernel and queries_kernel cut their work."""

    own: int  # keys (queries) of a program
    passing: int  # queries (keys) it takes at a time
    warps: int
    stages: int  # tiles in flight


# Chosen from what ptxas says (registers, spills, shared memory; tests/unit/test_fused.py compiles them): two sums of
# own x dim in fp32 and two tiles of own x passing fill a program's registers.
HALF = Blocks(128, 64, 8, 2)  # 16-bit heads up to 128, padded to a power of two; 97 KiB, on Hopper 129
WIDE = Blocks(64, 64, 8, 2)  # 16-bit heads up to 256: 137 KiB, on Hopper 193
WIDE_SMALL = Blocks(32, 32, 4, 2)  # the same on chips with 99 KiB a program (RTX, L4, L40): 66 KiB
SINGLE = Blocks(32, 16, 8, 1)  # fp32, without tensor cores: 98 KiB


def choose_backward(q: Tensor, v: Tensor, scoring: Scoring, attend: Backend) -> AttentionBackward | None:
    """What computes the backward of `attend` on these inputs with the sink's gradient inside; None if nothing does."""
    if can_run(q, v, scoring):
        return attention_backward
    if attend is cpu_flash and q.dtype in (torch.float32, torch.float64):
        return fused_cpu.attention_backward
    return None


def can_run(q: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """Whether the kernels give the gradients of these inputs: q [n,H,D], v [n,G,Dv].

    They need Triton and an NVIDIA GPU of compute capability 8.0 or newer, or Triton's interpreter on any device.
    """
    if q.shape[2] > LARGEST_DIM or q.shape[2] != v.shape[2] or scoring.sink_logits is not None:
        return False
    if q.device.type == "meta":  # a planned step: in 16 bits it stands for one on a GPU
        return q.element_size() == 2
    if importlib.util.find_spec("triton") is None or q.dtype == torch.float64:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    nvidia = q.device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(q.device) >= (8, 0)


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
    """dq [n,H,D], dk and dv [n,G,D] in the inputs' dtype: of the attention's output and of the sink's probability.

    q [n,H,D], k and v [n,G,D], out and grad_out [n,H,D] in one dtype (fp32, bf16, fp16); lse and grad_p [H,n] fp32:
    the log-sum-exp of the forward pass and dL/dp. `position` s counts from each text's start; grad_p is ignored at
    queries up to s and at those whose window has left s. Where it is 0 the result is that of plain attention.
    """
    if q.device.type == "meta":
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    from pipeline.sink.fused_kernels import keys_kernel, queries_kernel, rows_kernel

    tokens, heads, dim = q.shape
    groups = k.shape[1]
    q, k, v = (each if each.stride(2) == 1 else each.contiguous() for each in (q, k, v))
    out, grad_out, lse, grad_p = (each.contiguous() for each in (out, grad_out, lse, grad_p))
    lse_log2, common, pull = (torch.empty_like(lse) for _ in range(3))
    grad_q, grad_k, grad_v = (each.new_empty(each.shape) for each in (q, k, v))

    longest, texts, cu_seqlens = segments.longest, len(segments.spans), segments.cu_seqlens
    q_and_k = (*q.stride()[:2], *k.stride()[:2])
    qkv = (*q_and_k, *v.stride()[:2])
    window = longest if scoring.window is None else scoring.window
    rule = (tokens, position, window, scoring.scale, scoring.softcap or 1.0)
    width = max(16, 1 << (dim - 1).bit_length())  # tiles have powers of two for sides
    shape = {
        "RATIO": heads // groups,
        "DIM": dim,
        "WIDTH": width,
        "CAPPED": scoring.softcap is not None,
        "enable_fp_fusion": True,  # a multiplication and an addition in one instruction
    }
    rows_kernel[(-(-longest // ROWS), heads, texts)](
        q, k, out, grad_out, lse, grad_p, lse_log2, common, pull, cu_seqlens, *q_and_k, *rule, **shape, OWN=ROWS
    )
    blocks = choose_blocks(width, q.dtype, _shared_memory(q.device))
    cut = {
        "OWN": blocks.own,
        "PASSING": blocks.passing,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
    numbers = (lse_log2, common, pull)
    count = -(-longest // blocks.own)
    keys_kernel[(count, groups, texts)](
        q, k, v, grad_out, *numbers, grad_k, grad_v, cu_seqlens, *qkv, *rule, **shape, **cut
    )
    queries_kernel[(count, heads, texts)](q, k, v, grad_out, *numbers, grad_q, cu_seqlens, *qkv, *rule, **shape, **cut)
    return grad_q, grad_k, grad_v


def choose_blocks(width: int, dtype: torch.dtype, shared_memory: int) -> Blocks:
    """Blocks for heads padded to `width` on a chip whose programs may use so many bytes of shared memory."""
    if dtype == torch.float32:
        return SINGLE
    if width <= 128:
        return HALF
    return WIDE if shared_memory >= ROOMY else WIDE_SMALL


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return ROOMY  # the interpreter has no limit
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined,no-any-return]
