"""Every CUDA backend that is installed against a full softmax in fp32: output, log-sum-exp, and the sink gradient."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from pipeline.sink import backends
from pipeline.sink.backends import Segments
from pipeline.sink.column import sink_gradient, sink_logprob

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

HEADS, GROUPS, DIM, SCALE = 8, 2, 64, 64**-0.5
BOUNDS = (0, 130, 131, 400)
BACKENDS = [
    pytest.param(
        "flash_attention_2",
        marks=pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed"),
    ),
    "varlen",
    "sdpa",
]


def full_softmax(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(P [H,n,n], LSE [H,n]) of one causal segment."""
    scores = SCALE * torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(HEADS // GROUPS, dim=1))
    scores = scores.masked_fill(torch.ones(scores.shape[1:], device=q.device).triu(1).bool(), -torch.inf)
    return scores.softmax(-1), scores.logsumexp(-1)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_lse_and_sink_gradient(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(BOUNDS[-1], each, DIM, device="cuda", dtype=dtype) for each in (HEADS, GROUPS, GROUPS))
    segments = Segments.from_bounds(BOUNDS, "cuda")
    attend = backends.BACKENDS[name]
    out, lse = attend(q, k, v, segments, SCALE, 0)
    exact_q, exact_k = q.float().requires_grad_(), k.float().requires_grad_()
    loss = torch.zeros((), device="cuda")
    for start, end in segments.spans:
        p, wanted_lse = full_softmax(exact_q[start:end], exact_k[start:end])
        wanted = torch.einsum("hnm,mhd->nhd", p, v[start:end].float().repeat_interleave(HEADS // GROUPS, dim=1))
        torch.testing.assert_close(out[start:end].float(), wanted, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse[:, start:end], wanted_lse, rtol=1e-3, atol=1e-3)
        if end - start > 1:
            loss = loss + p[:, 1:, 0].mean(-1).sum()
    loss.backward()
    log_p = sink_logprob(q, k, lse, segments, 0, SCALE)
    grad_p = torch.zeros_like(log_p)
    for start, end in segments.spans:
        if end - start > 1:
            grad_p[:, start + 1 : end] = 1 / (end - start - 1)
    grad_q, grad_k = sink_gradient(q, k, log_p, grad_p, segments, 0, SCALE, attend)
    for found, exact in ((grad_q, exact_q), (grad_k, exact_k)):
        assert (found.float() - exact.grad).norm() < 0.01 * exact.grad.norm()
