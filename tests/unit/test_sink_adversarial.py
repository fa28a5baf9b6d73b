"""Inputs that break sink statistics: texts without a query after the sink, windows that leave it, probabilities that
underflow, half precision, strided tensors, no positive head, subsets of layers and heads, and 32k tokens in 2 GB."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.sink import attention
from pipeline.sink.backends import KERNELS
from pipeline.sink.column import blocked_sink_gradient, sink_gradient, sink_logprob
from pipeline.sink.divergence import SinkStep
from pipeline.sink.layout import Scoring, Segments
from tests.ranks import ROOT
from tests.unit.test_families import LENGTHS, small_model
from tests.unit.test_sink_properties import dense, dense_sink

LONG_WORKER = Path(__file__).with_name("long_reference_worker.py")
ALPHA = 300.0
HALF = [torch.float16, torch.bfloat16]
SCORINGS = {
    "plain": Scoring(0.25),
    "window": Scoring(0.25, window=5),
    "softcap": Scoring(0.25, softcap=2.0),
    "sink_logits": Scoring(0.25, sink_logits=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}

pytestmark = pytest.mark.filterwarnings("ignore:attention kernel .* does not compute")


def row(lengths: list[int]) -> tuple[Tensor, Tensor, Segments]:
    """Random token ids of several texts in one row, with positions and segments."""
    ids = torch.randint(4, 128, (1, sum(lengths)), generator=torch.Generator().manual_seed(3))
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return ids, torch.cat([torch.arange(n) for n in lengths])[None], Segments.from_bounds(bounds, "cpu")


def train_once(
    model: Any, lengths: list[int], *, users: int = 1, harmful: int = 1, alpha: float = ALPHA, **flags: Any
) -> tuple[SinkStep, dict[str, Tensor]]:
    """One packed row's gradient of CE + alpha R: `users` texts of the user's, then `harmful` harmful ones,
    then harmless ones."""
    ids, positions, segments = row(lengths)
    start = segments.bounds[users]
    sink = SinkStep(
        Segments.from_bounds([each - start for each in segments.bounds[users:]], "cpu"), start=start, harmful=harmful,
        layers=3, heads=4, alpha=alpha, **flags,
    )  # fmt: skip
    model.zero_grad()
    out = model(
        input_ids=ids, position_ids=positions, segments=segments, sink=sink, logits_to_keep=torch.arange(start - 1),
        use_cache=False,
    )  # fmt: skip
    sink.tap(F.cross_entropy(out.logits[0], ids[0, 1:start])).backward()
    return sink, {name: each.grad.clone() for name, each in model.named_parameters()}


def own(family: str, kernel: str = "cpu_flash") -> Any:
    model = small_model(family)
    model.set_attn_implementation(attention.register(kernel))
    return model


def inputs(scoring: Scoring, length: int = 24, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of 4 query and 2 key/value heads, fp32."""
    generator = torch.Generator().manual_seed(0)
    return tuple(2 * torch.randn(length, heads, dim, generator=generator) for heads in (4, 2, 2))  # type: ignore[return-value]


def sink_part(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scoring: Scoring, position: int = 0) -> Any:
    """(log p, its gradient for dL/dp = 1) as a layer computes them: two calls of the CPU kernel or of the portable
    path, or the portable gradient where the formula does not hold."""
    attend = KERNELS["blocked" if scoring.needs(segments) else "cpu_flash"].attend
    _, lse = attend(q, k, v, segments, scoring, 0)
    log_p = sink_logprob(q, k, lse, segments, position, scoring)
    ones = torch.ones_like(log_p)
    if scoring.softcap is None and scoring.sink_logits is None:
        return log_p, sink_gradient(q, k, log_p, ones, segments, position, scoring, attend)
    return log_p, blocked_sink_gradient(q, k, ones, segments, position, scoring)


@pytest.mark.parametrize("family", ["llama-3", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize(
    ("lengths", "position"),
    [([12, 1, 1], 0), ([12, 2, 3], 5), ([12, 3, 2], 2)],
    ids=["one token each", "the sink is beyond both texts", "the sink is the last token"],
)
def test_texts_without_a_query_after_the_sink_contribute_nothing(
    family: str, lengths: list[int], position: int
) -> None:
    model = own(family)
    sink, found = train_once(model, lengths, position=position)
    _, wanted = train_once(model, lengths, position=position, alpha=0.0)
    assert torch.equal(sink.divergence(), torch.zeros(3, 4))
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        assert torch.equal(gradient, wanted[name]), name


def test_a_short_text_is_left_out_of_its_kinds_mean() -> None:
    """Harmful texts of 2 and 9 tokens with the sink at position 2: the mean is the longer one's, not half of it."""
    model = own("llama-3")
    both, _ = train_once(model, [12, 2, 9, 13], harmful=2, position=2)
    other = row([12, 2, 9, 13])
    ids = torch.cat([other[0][:, :12], other[0][:, 14:]], dim=1)
    positions = torch.cat([torch.arange(n) for n in (12, 9, 13)])[None]
    alone = SinkStep(
        Segments.from_bounds([0, 9, 22], "cpu"), start=12, harmful=1, layers=3, heads=4, alpha=0.0, position=2
    )
    model(
        input_ids=ids, position_ids=positions, segments=Segments.from_bounds([0, 12, 21, 34], "cpu"), sink=alone,
        use_cache=False,
    )  # fmt: skip
    torch.testing.assert_close(both.divergence(), alone.divergence(), rtol=1e-5, atol=1e-7)
    assert both.divergence().abs().max() > 0.01


def test_a_window_that_no_later_query_shares_with_the_sink_gives_no_penalty() -> None:
    """A window of one token: every query sees itself alone, p is 0, and the gradient is the cross-entropy's."""
    model = own("mistral")
    model.config.sliding_window = 1
    sink, found = train_once(model, LENGTHS, users=2)
    _, wanted = train_once(model, LENGTHS, users=2, alpha=0.0)
    assert torch.equal(sink.divergence(), torch.zeros(3, 4))
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_queries_whose_window_has_left_the_sink_count_in_the_mean_with_zero() -> None:
    q, k, v = inputs(SCORINGS["window"])
    segments = Segments.from_bounds([0, 24], "cpu")
    log_p, (grad_q, _) = sink_part(q, k, v, segments, SCORINGS["window"], position=2)
    seen = torch.zeros(24, dtype=torch.bool)
    seen[3:7] = True  # the window of 5 holds key 2 for queries 3 to 6
    assert log_p[:, seen].isfinite().all()
    assert (log_p[:, ~seen] == -torch.inf).all()
    assert (grad_q[~seen] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("name", SCORINGS)
@pytest.mark.parametrize("strength", [-200.0, 20.0], ids=["p underflows", "p is 1"])
def test_a_sink_key_of_huge_norm_has_no_gradient_and_no_nan(dtype: torch.dtype, name: str, strength: float) -> None:
    """Against the sink key (log p below -300: p is 0) or all for it (p = 1), the mean is flat."""
    scoring = SCORINGS[name]
    if scoring.softcap is not None:
        scoring = replace(scoring, softcap=500.0)  # a cap of 2 keeps p away from 0 and 1
    q, k, v = inputs(scoring)
    q[:, :, 0] = 10 + q[:, :, 0].abs()
    k[0] = 0
    k[0, :, 0] = strength
    segments = Segments.from_bounds([0, 24], "cpu")
    log_p, grads = sink_part(q.to(dtype), k.to(dtype), v.to(dtype), segments, scoring)
    later = log_p[:, 1 : 5 if scoring.window else None]
    if strength < 0:
        assert later.max() < -300
        assert (log_p.exp() == 0).all()
    else:
        assert later.exp().min() > 0.999
    # The terms that cancel sum to about 150. PyTorch's CPU kernel has an LSE error of 6e-5 in half precision.
    largest = 1e-3 if dtype == torch.float32 else 2e-2
    for grad in grads:
        if grad is not None:
            assert grad.isfinite().all()
            assert grad.abs().max() < largest


@pytest.mark.parametrize("size", [1e4, -1e4, -torch.inf], ids=["huge", "tiny", "none"])
def test_learned_sinks_of_any_size_are_finite(size: float) -> None:
    """A huge learned sink takes all the mass: p, its gradient and the output are 0. One of -inf or next to it is not
    there."""
    q, k, v = (each.requires_grad_() for each in inputs(SCORINGS["plain"]))
    logits = torch.full((4,), size).requires_grad_()
    scoring = Scoring(0.25, sink_logits=logits)
    segments = Segments.from_bounds([0, 10, 24], "cpu")
    out, lse = KERNELS["blocked"].attend(q, k, v, segments, scoring, 0)
    grads = torch.autograd.grad(out.square().sum(), [q, k, v, logits])
    log_p, sink_grads = sink_part(q.detach(), k.detach(), v.detach(), segments, replace(scoring))
    assert all(each.isfinite().all() for each in (*grads, *sink_grads, out))
    assert not log_p.isnan().any()
    if size > 0:
        assert (out == 0).all()
        assert (log_p.exp() == 0).all()
        assert all((each == 0).all() for each in sink_grads)
        return
    wanted, wanted_lse = KERNELS["blocked"].attend(q, k, v, segments, Scoring(0.25), 0)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    assert (grads[3] == 0).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", SCORINGS)
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype, name: str) -> None:
    """Against fp64 on the same rounded q and k: p within 1e-4 of itself, the gradient within 1 % (it is rounded)."""
    scoring = SCORINGS[name]
    q, k, v = (each.to(dtype) for each in inputs(scoring))
    segments = Segments.from_bounds([0, 10, 24], "cpu")
    log_p, grads = sink_part(q, k, v, segments, scoring)
    assert log_p.dtype == torch.float32
    exact = [each.double().requires_grad_() for each in (q, k)]
    logits = scoring.sink_logits
    if logits is not None:
        exact.append(logits.double().requires_grad_())
        scoring = replace(scoring, sink_logits=exact[2])
    p = dense_sink(dense(exact[0], exact[1], v.double(), segments, scoring)[2], 0)
    torch.testing.assert_close(log_p.exp().double(), p, rtol=1e-4, atol=1e-7)
    for found, wanted in zip((g for g in grads if g is not None), torch.autograd.grad(p.sum(), exact), strict=True):
        assert found.dtype in (dtype, torch.float32)
        assert (found.double() - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("name", SCORINGS)
def test_strided_inputs_give_the_same_numbers(name: str) -> None:
    """Transposed views, every second row of a wider tensor, and one key head expanded to all."""
    scoring = SCORINGS[name]
    q, k, v = inputs(scoring)
    k = k[:, :1].expand(-1, 2, -1)
    segments = Segments.from_bounds([0, 10, 24], "cpu")
    wanted = sink_part(q, k.contiguous(), v, segments, scoring)
    strided = q.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.zeros(48, 2, 16)
    wide[::2] = v
    assert not any(each.is_contiguous() for each in (strided, k, wide[::2]))
    log_p, grads = sink_part(strided, k, wide[::2], segments, scoring)
    torch.testing.assert_close(log_p, wanted[0])
    for found, want in zip(grads, wanted[1], strict=True):
        torch.testing.assert_close(found, want)


def same(found: torch.Tensor, wanted: torch.Tensor, name: str) -> bool:
    """Bit for bit; a learned sink's gradient is a sum over all tokens, which a watched layer takes in two parts."""
    if name.endswith("sinks"):
        return torch.allclose(found, wanted, rtol=1e-6, atol=0)
    return torch.equal(found, wanted)


@pytest.mark.parametrize("family", ["llama-3", "mistral", "gemma2", "gpt_oss"])
def test_without_a_positive_head_the_gradient_is_plain_cross_entropys_bit_for_bit(family: str) -> None:
    """A harmful text of one token has a mean of 0, so every head's divergence is negative."""
    model = own(family)
    sink, found = train_once(model, [11, 1, 13])
    assert (sink.divergence() < 0).all()
    ids, positions, segments = row([11, 1, 13])
    model.zero_grad()
    out = model(
        input_ids=ids, position_ids=positions, segments=segments, logits_to_keep=torch.arange(10), use_cache=False
    )
    F.cross_entropy(out.logits[0], ids[0, 1:11]).backward()
    for name, each in model.named_parameters():
        assert same(found[name], each.grad, name), name


@pytest.mark.parametrize("family", ["llama-3", "mistral", "gemma2", "gpt_oss"])
def test_a_subset_of_layers_and_heads_is_penalised_alone(family: str) -> None:
    """R is the mean over the subset, and its gradient the eager formula's; no other head or later layer has one."""
    layers, heads = [0, 1], [0, 1, 3]
    model = own(family)
    sink, found = train_once(model, [12, 9, 13], only_layers=layers, only_heads=heads)
    _, plain = train_once(model, [12, 9, 13], alpha=0.0)

    eager = small_model(family)
    eager.set_attn_implementation("eager")
    ids, _, segments = row([12, 9, 13])
    means = []
    for start, end in segments.spans[1:]:
        maps = eager(input_ids=ids[:, start:end], output_attentions=True, use_cache=False).attentions
        means.append(torch.stack([maps[layer][0, heads, 1:, 0].mean(-1) for layer in layers]))
    divergence = means[0] - means[1]
    assert (divergence > 0).any()
    logits = eager(input_ids=ids[:, :12], use_cache=False).logits
    (F.cross_entropy(logits[0, :-1], ids[0, 1:12]) + ALPHA * torch.relu(divergence).mean()).backward()
    torch.testing.assert_close(sink.divergence(), divergence.detach(), rtol=1e-4, atol=1e-6)
    for name, each in eager.named_parameters():
        assert (found[name] - each.grad).norm() <= 1e-4 * each.grad.norm() + 1e-7, name

    outside = [name for name in found if ".layers.2." in name or "lm_head" in name or "model.norm" in name]
    assert outside
    for name in outside:
        if not model.config.tie_word_embeddings or "layers" in name or "norm" in name:
            assert same(found[name], plain[name], name), f"{name} lies above the chosen layers"
    rows = found["model.layers.1.self_attn.q_proj.weight"].view(4, 16, 64)
    without = plain["model.layers.1.self_attn.q_proj.weight"].view(4, 16, 64)
    torch.testing.assert_close(rows[2], without[2], rtol=1e-5, atol=1e-7)
    if family == "llama-3":
        assert not torch.allclose(rows[heads], without[heads])


def peaks_mib(*sizes: str) -> list[float]:
    """Peak resident memory, above the imports', of one layer's forward pass and sink gradient, in MiB: each size's or
    an earlier one's, if that was larger."""
    done = subprocess.run(
        [sys.executable, str(LONG_WORKER), *sizes], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM from /proc")
def test_a_reference_of_32k_tokens_takes_less_than_2_gb() -> None:
    """One layer of 9 query and 3 key/value heads of 64 in fp32; a score matrix would be 39 GB.

    Three query heads and their key/value head take less than a quarter of 2 GB, and three such groups less than four
    times as much as one, which 8k tokens show in a sixteenth of the time.
    """
    group_short, layer_short, group_long = peaks_mib("8192x1", "8192x3", "32768x1")
    assert group_long < 2048 / 4
    assert layer_short < 4 * group_short
