"""The fused attention backward on a GPU against autograd through the dense formula in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.unit.test_fused import CASES, LIMITS, Case, backward, changed_elements, errors, sink_errors

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PACKED = Case((130, 1, 700, 64), heads=8, groups=2, dim=64)
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradients_equal_those_of_the_dense_formula_in_fp32(case: Case) -> None:
    assert max(errors(case, device="cuda")) < 1e-5  # exp2 is an approximation there, to 2 ulp


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("window", "softcap", "position"),
    [(None, None, 0), (300, None, 0), (None, 5.0, 0), (200, 5.0, 70)],
    ids=["packed", "windowed", "capped", "all"],
)
def test_gradients_in_16_bits(
    dim: int, dtype: torch.dtype, window: int | None, softcap: float | None, position: int
) -> None:
    case = replace(PACKED, dim=dim, dtype=dtype, window=window, softcap=softcap, position=position)
    assert max(errors(case, device="cuda")) < LIMITS[dtype]


@pytest.mark.parametrize("mean_p", [0.5, 0.95, 0.99])
def test_bf16_sink_gradient_is_within_one_percent_of_fp64(mean_p: float) -> None:
    assert max(sink_errors(mean_p, device="cuda")) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=["fp32", "bf16", "fp16"])
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    case = replace(PACKED, dtype=dtype, window=300)
    inputs = case.inputs()
    first, second = (backward(case, *inputs, device="cuda") for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("at", ["the other heads", "queries without a sink"])
def test_no_penalty_gives_the_bits_of_plain_attention(at: str) -> None:
    case = replace(PACKED, dtype=torch.bfloat16, window=300, position=2)
    assert changed_elements(case, at, device="cuda") == [0, 0, 0]
