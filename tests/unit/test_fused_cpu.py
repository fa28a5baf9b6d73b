"""The fused attention backward on a CPU against a full softmax in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.sink import fused, fused_cpu
from pipeline.sink.backends import blocked, cpu_flash, sdpa
from pipeline.sink.layout import Scoring
from tests.unit.test_fused import CASES, Case, exact

LIMITS = {torch.float32: 3e-6, torch.float64: 1e-12}  # relative errors in norm
PLAIN = {name: case for name, case in CASES.items() if not (case.window or case.softcap or case.learned)}


def errors(case: Case, *inputs: torch.Tensor) -> list[float]:
    """Relative errors of dq, dk and dv, in norm."""
    q, k, v, grad_out, grad_p = (each.to(case.dtype) for each in inputs)
    wanted, _, _ = exact(case, q, k, v, grad_out, grad_p)
    out, lse = cpu_flash(q, k, v, case.segments, case.scoring, 0)
    found = fused_cpu.attention_backward(
        q, k, v, out, lse, grad_out, grad_p, case.segments, case.position, case.scoring
    )
    return [
        ((each - want).norm() / want.norm().clamp_min(1e-30)).item() for each, want in zip(found, wanted, strict=True)
    ]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN.keys())
def test_gradients_equal_those_of_the_dense_formula(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    assert max(errors(case, *case.inputs())) < LIMITS[dtype]


@pytest.mark.parametrize("part", ["attention", "sink"])
def test_each_part_alone(part: str) -> None:
    """The sink's gradient where the output has none, as in a model's last layer; and the attention's alone."""
    case = Case((50, 2, 21))
    q, k, v, grad_out, grad_p = case.inputs()
    if part == "sink":
        assert max(errors(case, q, k, v, torch.zeros_like(grad_out), grad_p)[:2]) < LIMITS[case.dtype]
    else:
        assert max(errors(case, q, k, v, grad_out, torch.zeros_like(grad_p))) < LIMITS[case.dtype]


def test_nothing_cancels_where_the_sink_takes_nearly_all_the_mass() -> None:
    """The sink's gradient at p of about 0.9999, of which a plain sum over the keys would leave three digits."""
    case = Case((64,))
    q, k, v, grad_out, grad_p = case.inputs()
    direction = torch.nn.functional.normalize(torch.ones(case.dim), dim=0)
    q, k = q / 5 + 8 * direction, k / 5
    k[0] += 4.5 * direction
    _, lse = cpu_flash(q, k, v, case.segments, case.scoring, 0)
    logit = case.scoring.scale * (q * k[0].repeat_interleave(2, dim=0)).sum(-1).t()
    assert (logit - lse)[:, 1:].exp().mean() > 0.9999
    dq, dk, _ = errors(case, q, k, v, torch.zeros_like(grad_out), grad_p)
    assert dq < 3e-6
    assert dk < 1e-2  # dk_s holds 1 - p = 1e-4, of which the log-sum-exp in fp32 leaves three digits


def test_it_stands_behind_the_cpu_kernel_in_exact_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.zeros(3, 2, 64)
    assert fused.choose_backward(q, q, Scoring(1.0), cpu_flash) is fused_cpu.attention_backward
    assert fused.choose_backward(q.double(), q.double(), Scoring(1.0), cpu_flash) is fused_cpu.attention_backward
    assert fused.choose_backward(q.bfloat16(), q.bfloat16(), Scoring(1.0), cpu_flash) is None, "16 bits cancel in it"
    for other in (sdpa, blocked):
        assert fused.choose_backward(q, q, Scoring(1.0), other) is None
