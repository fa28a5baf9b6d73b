"""The fused attention backward without a GPU: its numbers in Triton's interpreter, its code as compiled for the chips.

Triton decides at import whether kernels are interpreted, so those tests run in one process of their own, started for
this file; what it runs are the module's functions that take a `Case`.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.sink import attention, fused
from pipeline.sink.divergence import SinkStep
from pipeline.sink.layout import Scoring, Segments
from tests.tiny import tiny_llama

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

KIB = 1024
# Relative errors in norm. The kernels round P, dx and the results to the inputs' dtype, as every flash kernel does.
LIMITS = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Case:
    """Random texts; q [n,H,D] and k [n,G,D] stored head first, as models hand them over."""

    lengths: tuple[int, ...] = (70,)
    heads: int = 4
    groups: int = 2
    dim: int = 16
    window: int | None = None
    softcap: float | None = None
    position: int = 0
    learned: bool = False  # a learned sink logit in every softmax
    dtype: torch.dtype = torch.float32

    @property
    def scoring(self) -> Scoring:
        return Scoring(1.5 * self.dim**-0.5, self.window, self.softcap)

    @property
    def segments(self) -> Segments:
        return Segments.from_bounds([0, *torch.tensor(self.lengths).cumsum(0).tolist()], "cpu")

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """q, k, v, grad_out in `dtype` and grad_p fp32."""
        generator = torch.Generator().manual_seed(0)
        n = sum(self.lengths)
        q, k, v, grad_out = (
            torch.randn(each, n, self.dim, generator=generator).to(self.dtype)
            for each in (self.heads, self.groups, self.groups, self.heads)
        )
        q, k = 2 * q.transpose(0, 1), k.transpose(0, 1)
        v, grad_out = (each.transpose(0, 1).contiguous() for each in (v, grad_out))
        return q, k, v, grad_out, torch.randn(self.heads, n, generator=generator)


def dense(
    case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [n,H,D], LSE [H,n] and p [H,n] by a full softmax; p is 0 at queries up to the sink and past its window."""
    k, v = (each.repeat_interleave(case.heads // case.groups, dim=1) for each in (k, v))
    outs, lses, ps = [], [], []
    for start, end in case.segments.spans:
        here = slice(start, end)
        logits = case.scoring.scale * torch.einsum("nhd,mhd->hnm", q[here], k[here])
        if case.softcap is not None:
            logits = case.softcap * torch.tanh(logits / case.softcap)
        behind = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (behind < 0) | (behind >= (case.window or end))
        logits = logits.masked_fill(hidden, -torch.inf)
        lse = logits.logsumexp(-1)
        if case.learned:
            lse = torch.logaddexp(lse, torch.linspace(-1, 3, case.heads, dtype=lse.dtype)[:, None])
        probabilities = torch.exp(logits - lse[..., None])
        outs.append(torch.einsum("hnm,mhd->nhd", probabilities, v[here]))
        lses.append(lse)
        p = torch.zeros_like(lse)
        if case.position < end - start:
            column = probabilities[:, :, case.position]
            p = torch.where(torch.arange(end - start) > case.position, column, p)
        ps.append(p)
    return torch.cat(outs), torch.cat(lses, dim=1), torch.cat(ps, dim=1)


def exact(case: Case, *inputs: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    """dq, dk, dv by autograd in fp64, and the forward pass's out in the inputs' dtype and LSE in fp32."""
    q, k, v, grad_out, grad_p = (each.double() for each in inputs)
    leaves = [each.detach().requires_grad_() for each in (q, k, v)]
    out, lse, p = dense(case, *leaves)
    found = torch.autograd.grad((out * grad_out).sum() + (p * grad_p).sum(), leaves)
    return found, out.detach().to(case.dtype), lse.detach().float()


def backward(case: Case, *inputs: torch.Tensor, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """dq, dk and dv of the kernels, run on a device and brought back."""
    _, out, lse = exact(case, *inputs)
    q, k, v, out, lse, grad_out, grad_p = (each.to(device) for each in (*inputs[:3], out, lse, *inputs[3:]))
    segments = Segments.from_bounds(case.segments.bounds, device)
    found = fused.attention_backward(q, k, v, out, lse, grad_out, grad_p, segments, case.position, case.scoring)
    return tuple(each.cpu() for each in found)


def errors(case: Case, *inputs: torch.Tensor, device: str = "cpu") -> list[float]:
    """Relative errors of dq, dk and dv against fp64, in norm."""
    inputs = inputs or case.inputs()
    wanted, _, _ = exact(case, *inputs)
    return [
        ((found.double() - each).norm() / each.norm().clamp_min(1e-30)).item()
        for found, each in zip(backward(case, *inputs, device=device), wanted, strict=True)
    ]


def round_and_multiply_bf16_like_a_gpu() -> None:
    """The interpreter of Triton 3.9 keeps bf16 as bit patterns: it cuts the low bits off, and its dot multiplies the
    patterns themselves."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dtype)
        rounded = torch.tensor(source.data).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(rounded, tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (self.cast_impl(each, tl.float32) if each.dtype.scalar == tl.bfloat16 else each for each in (a, b))
        return dot(self, a, b, *others)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable[..., Any]]:
    """Runs a function of this module in a process in which Triton kernels are interpreted."""
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, mp_context=context) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        pool.submit(round_and_multiply_bf16_like_a_gpu).result()
        patch.undo()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


CASES = {
    "texts": Case((1, 31, 16, 70, 2)),
    "one head a key": Case((50,), heads=3, groups=3, dim=8),
    "one key for all heads": Case((50,), heads=4, groups=1),
    "dim 80": Case((40, 33), heads=2, groups=1, dim=80),
    "position 3": Case((3, 4, 5, 75), position=3),
    "position 40": Case((75, 30), position=40),
    "window 5": Case((64, 9), window=5),
    "window 40": Case((96, 20), window=40),
    "window 40, position 20": Case((96, 20), window=40, position=20),
    "window longer than a text": Case((33,), window=100),
    "cap": Case((70, 17), softcap=2.0),
    "cap and window": Case((81,), softcap=2.0, window=30, position=1),
    "learned sink": Case((70,), learned=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradients_equal_those_of_the_dense_formula(interpreter: Callable[..., Any], case: Case) -> None:
    assert max(interpreter(errors, case)) < LIMITS[case.dtype]


@pytest.mark.parametrize(
    "case",
    [
        Case((300, 5), heads=2, groups=1, dtype=torch.bfloat16),
        Case((300,), heads=2, groups=1, dtype=torch.float16, window=200, softcap=5.0),
        Case((150,), heads=2, groups=1, dim=144, dtype=torch.bfloat16),
    ],
    ids=["bf16", "fp16", "bf16 wide"],
)
def test_gradients_in_16_bits(interpreter: Callable[..., Any], case: Case) -> None:
    assert max(interpreter(errors, case)) < LIMITS[case.dtype]


def errors_without(case: Case, term: str) -> list[float]:
    """Errors when one of the sink's two terms is left out of dx."""
    from pipeline.sink import fused_kernels

    complete = fused_kernels.rows_kernel

    class Incomplete:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: Any, **settings: Any) -> None:
                complete[grid](*arguments, **settings)
                common, pull = arguments[7:9]
                if term == "every column":
                    common -= pull
                else:
                    pull.zero_()

            return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_kernels, "rows_kernel", Incomplete())
        return errors(case)


@pytest.mark.parametrize("term", ["every column", "the sink's column"])
def test_both_terms_of_the_sink_are_needed(interpreter: Callable[..., Any], term: str) -> None:
    wrong_q, wrong_k, right_v = interpreter(errors_without, CASES["texts"], term)
    assert min(wrong_q, wrong_k) > 0.05
    assert right_v < LIMITS[torch.float32]


def changed_elements(case: Case, at: str, device: str = "cpu") -> list[int]:
    """How many elements of dq, dk and dv, in the first half of the heads, differ from those of plain attention when
    grad_p is not 0 in the other half, or is NaN where no query sees the sink."""
    *inputs, grad_p = case.inputs()
    plain = torch.zeros_like(grad_p)
    if at == "the other heads":
        other = grad_p.clone()
        other[: case.heads // 2] = 0
    else:
        _, _, p = dense(case, *(each.double() for each in inputs[:3]))
        other = plain.masked_fill(p == 0, torch.nan)
    pairs = zip(*(backward(case, *inputs, each, device=device) for each in (plain, other)), strict=True)
    return [int((first != second)[:, : first.shape[1] // 2].sum()) for first, second in pairs]


@pytest.mark.parametrize("at", ["the other heads", "queries without a sink"])
def test_no_penalty_gives_the_bits_of_plain_attention(interpreter: Callable[..., Any], at: str) -> None:
    assert interpreter(changed_elements, Case((40, 3, 20), window=25, position=2), at) == [0, 0, 0]


def sink_errors(mean_p: float, device: str = "cpu") -> list[float]:
    """Errors of the sink's part alone in bf16, with keys under which the sink takes about mean_p of the mass."""
    case = Case((256,), heads=4, groups=2, dim=64, dtype=torch.bfloat16)
    q, k, v, grad_out, _ = (each.double() for each in case.inputs())
    direction = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(1)), dim=0)
    q = (q / 2 + 8 * direction).bfloat16()
    low, high = 0.0, 40.0
    for _ in range(30):  # the sink key's strength at which the mean mass is mean_p
        strength = (low + high) / 2
        sink_k = k.clone()
        sink_k[0] += strength * direction
        _, _, p = dense(case, q.double(), sink_k.bfloat16().double(), v)
        mass = p[:, 1:].mean()
        low, high = (strength, high) if mass < mean_p else (low, strength)
    assert abs(mass - mean_p) < 0.01
    grad_p = torch.full(p.shape, 1 / 255)
    return errors(case, q, sink_k.bfloat16(), v.bfloat16(), torch.zeros_like(q), grad_p, device=device)


@pytest.mark.parametrize("mean_p", [0.5, 0.95, 0.99])
def test_bf16_sink_gradient_is_within_one_percent_of_fp64(interpreter: Callable[..., Any], mean_p: float) -> None:
    assert max(interpreter(sink_errors, mean_p)) < 0.01


class Chip:
    """What Triton asks the driver about, for a chip that is not here."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> str:
        return f"sm_{self.capability}"  # keeps what is compiled here apart from kernels of a real device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@pytest.mark.parametrize(
    ("capability", "available", "case"),
    [
        (80, 163, Case(dim=64, dtype=torch.bfloat16)),
        (80, 163, Case(dim=256, dtype=torch.bfloat16)),
        (80, 99, Case(dim=256)),
        (86, 99, Case(dim=128, dtype=torch.bfloat16)),
        (89, 99, Case(dim=256, dtype=torch.bfloat16, softcap=50.0)),
        (90, 227, Case(dim=64, dtype=torch.bfloat16)),
        (90, 227, Case(dim=128, dtype=torch.bfloat16, softcap=50.0)),
        (90, 227, Case(dim=256, dtype=torch.bfloat16)),
    ],
    ids=lambda each: f"{each.dtype}-{each.dim}".removeprefix("torch.") if isinstance(each, Case) else str(each),
)
def test_kernels_compile_and_fit_the_chip(
    capability: int, available: int, case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The launches of a real run, compiled in place of run; `available` KiB of shared memory a program."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compiled = []
    run = JITFunction.run

    def only_compile(self: Any, *arguments: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        compiled.append(run(self, *arguments, grid=grid, warmup=True, **settings))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", only_compile)
    monkeypatch.setattr(driver, "_active", Chip(capability))
    monkeypatch.setattr(fused, "_shared_memory", lambda device: available * KIB)
    q, k, v, grad_out, grad_p = case.inputs()
    fused.attention_backward(q, k, v, q, grad_p, grad_out, grad_p, case.segments, 0, case.scoring)
    assert [each.metadata.name for each in compiled] == ["rows_kernel", "keys_kernel", "queries_kernel"]
    for each in compiled:
        assert each.metadata.shared <= available * KIB, each.metadata.name
        assert each.asm["cubin"]


def test_what_the_kernels_do_not_compute_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(3, 2, 64)
    scoring = Scoring(1.0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not fused.can_run(q, q, scoring), "no GPU"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fused.can_run(q, q, scoring)
    assert not fused.can_run(q, q[..., :32], scoring), "values of another dimension"
    assert not fused.can_run(q.repeat(1, 1, 5), q.repeat(1, 1, 5), scoring), "heads of 320"
    assert not fused.can_run(q.double(), q.double(), scoring), "fp64"
    assert not fused.can_run(q, q, replace(scoring, sink_logits=torch.zeros(2))), "gradient of learned sink logits"


def model_gradients(way: str) -> dict[str, torch.Tensor]:
    """Gradients of CE + alpha R of a model with two texts and two references, heads of both signs and one not
    chosen."""
    os.environ["TRITON_INTERPRET"] = "1" if way == "triton" else "0"
    model = tiny_llama().train()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.k_proj.weight.mul_(20)
    model.set_attn_implementation(attention.register("sdpa" if way == "two calls" else "cpu_flash"))
    lengths = [11, 7, 9, 13]
    ids = torch.randint(4, 500, (1, sum(lengths)), generator=torch.Generator().manual_seed(5))
    references = Segments.from_bounds([0, 9, 22], "cpu")
    sink = SinkStep(references, start=18, harmful=1, layers=2, heads=4, alpha=300.0, only_heads=[0, 1, 3])
    out = model(
        input_ids=ids, position_ids=torch.cat([torch.arange(n) for n in lengths])[None], sink=sink, use_cache=False,
        segments=Segments.from_bounds([0, *torch.tensor(lengths).cumsum(0).tolist()], "cpu"),
    )  # fmt: skip
    nodes, seen = [out.logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [each for each, _ in node.next_functions]
    assert any("FusedSinkAttention" in node.name() for node in seen) == (way != "two calls")
    assert (sink.divergence() > 0).any()
    assert (sink.divergence() < 0).any()
    sink.tap(out.logits[0, :17].logsumexp(-1).mean()).backward()
    return {name: each.grad for name, each in model.named_parameters()}


@pytest.mark.parametrize("way", ["triton", "cpu"])
def test_a_model_trains_the_same_with_and_without_the_fused_backward(
    interpreter: Callable[..., Any], way: str
) -> None:
    found, wanted = interpreter(model_gradients, way), interpreter(model_gradients, "two calls")
    for name, want in wanted.items():
        assert (found[name] - want).norm() <= 1e-5 * want.norm() + 1e-7, name
