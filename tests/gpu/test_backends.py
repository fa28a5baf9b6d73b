"""Every CUDA backend that runs on this GPU against a full softmax in fp32: output, log-sum-exp, and the sink gradient;
packed, windowed and capped."""

from __future__ import annotations

import pytest
import torch

from pipeline.sink.backends import KERNELS
from pipeline.sink.column import blocked_sink_gradient, sink_gradient, sink_logprob
from pipeline.sink.layout import Scoring, Segments

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

HEADS, GROUPS, DIM, SCALE = 8, 2, 64, 64**-0.5
BOUNDS = (0, 130, 131, 400)
SCORINGS = {
    "plain": Scoring(SCALE),
    "window": Scoring(SCALE, window=50),
    "softcap": Scoring(SCALE, softcap=2.0),
}


def full_softmax(q: torch.Tensor, k: torch.Tensor, scoring: Scoring) -> tuple[torch.Tensor, torch.Tensor]:
    """(P [H,n,n], LSE [H,n]) of one causal segment."""
    scores = scoring.scale * torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(HEADS // GROUPS, dim=1))
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    back = torch.arange(len(q), device=q.device)[:, None] - torch.arange(len(q), device=q.device)
    scores = scores.masked_fill((back < 0) | (back >= (scoring.window or len(q))), -torch.inf)
    return scores.softmax(-1), scores.logsumexp(-1)


# Every kernel with every rule that it computes; a layer with another rule takes the blocked path.
COMPUTED = [
    (name, rule)
    for name, kernel in KERNELS.items()
    if kernel.device != "cpu"
    for rule, scoring in SCORINGS.items()
    if not scoring.needs(Segments.from_bounds(BOUNDS, "cpu")) - kernel.computes
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "rule"), COMPUTED)
def test_output_lse_and_sink_gradient(name: str, dtype: torch.dtype, rule: str) -> None:
    kernel, scoring = KERNELS[name], SCORINGS[rule]
    if reason := kernel.refusal("cuda", half=True):
        pytest.skip(reason)
    segments = Segments.from_bounds(BOUNDS, "cuda")
    torch.manual_seed(0)
    q, k, v = (torch.randn(BOUNDS[-1], each, DIM, device="cuda", dtype=dtype) for each in (HEADS, GROUPS, GROUPS))
    out, lse = kernel.attend(q, k, v, segments, scoring, 0)
    exact_q, exact_k = q.float().requires_grad_(), k.float().requires_grad_()
    loss = torch.zeros((), device="cuda")
    for start, end in segments.spans:
        p, wanted_lse = full_softmax(exact_q[start:end], exact_k[start:end], scoring)
        wanted = torch.einsum("hnm,mhd->nhd", p, v[start:end].float().repeat_interleave(HEADS // GROUPS, dim=1))
        torch.testing.assert_close(out[start:end].float(), wanted, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse[:, start:end], wanted_lse, rtol=1e-3, atol=1e-3)
        if end - start > 1:
            loss = loss + p[:, 1:, 0].mean(-1).sum()
    loss.backward()
    log_p = sink_logprob(q, k, lse, segments, 0, scoring)
    grad_p = torch.zeros_like(log_p)
    for start, end in segments.spans:
        if end - start > 1:
            grad_p[:, start + 1 : end] = 1 / (end - start - 1)
    if scoring.softcap is None:
        grad_q, grad_k = sink_gradient(q, k, log_p, grad_p, segments, 0, scoring, kernel.attend)
    else:
        grad_q, grad_k, _ = blocked_sink_gradient(q, k, grad_p, segments, 0, scoring)
    for found, exact in ((grad_q, exact_q), (grad_k, exact_k)):
        assert (found.float() - exact.grad).norm() < 0.01 * exact.grad.norm()
