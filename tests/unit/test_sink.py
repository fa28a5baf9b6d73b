"""The sink engine against eager attention: value, gradient, packing, grouped heads, every checkpointing, every CPU
backend."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import BloomConfig, Gemma2Config, Llama4TextConfig, MistralConfig, Qwen3NextConfig, T5Config

from pipeline.sink import attention, backends
from pipeline.sink.column import blocked_sink_gradient, sink_gradient, sink_logprob
from pipeline.sink.divergence import SinkStep, penalty
from pipeline.sink.layout import Scoring, Segments
from pipeline.sink.support import attention_refusals, sink_refusals
from tests.tiny import tiny_llama, tiny_qwen2

ALPHA = 300.0
CPU_BACKENDS = ["cpu_flash", "sdpa", "blocked"]


def packed(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, Segments]:
    """Random token ids of several texts in one row, with positions and segments."""
    ids = torch.randint(4, 500, (1, sum(lengths)), generator=torch.Generator().manual_seed(3))
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return ids, torch.cat([torch.arange(n) for n in lengths])[None], Segments.from_bounds(bounds, "cpu")


def sharpened(model: Any) -> Any:
    """Larger weights, so that attention is far from uniform and heads differ."""
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                each.mul_(20)
    return model.train()


def eager_gradients(
    model: Any, ids: torch.Tensor, segments: Segments, texts: int, position: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """R and the gradient of CE + alpha R, every text alone."""
    model.set_attn_implementation("eager")
    nll, trained, means = torch.zeros(()), 0, []
    for i, (start, end) in enumerate(segments.spans):
        text = ids[:, start:end]
        out = model(input_ids=text, output_attentions=i >= texts, use_cache=False)
        if i < texts:
            nll = nll + F.cross_entropy(out.logits[0, :-1], text[0, 1:], reduction="sum")
            trained += end - start - 1
        else:
            means.append(torch.stack([a[0, :, position + 1 :, position].mean(-1) for a in out.attentions]))
    r = torch.relu(means[0] - means[1]).mean()
    model.zero_grad()
    (nll / trained + ALPHA * r).backward()
    return r.item(), {name: each.grad.clone() for name, each in model.named_parameters()}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "nonreentrant", "reentrant"])
@pytest.mark.parametrize(("build", "position"), [(tiny_llama, 0), (tiny_llama, 2), (tiny_qwen2, 0)])
def test_packed_loss_penalty_and_gradient_equal_eager(
    backend: str, reentrant: bool | None, build: Any, position: int
) -> None:
    ids, positions, segments = packed([11, 7, 9, 13])
    wanted_r, wanted = eager_gradients(sharpened(build()), ids, segments, texts=2, position=position)
    model = sharpened(build())
    model.set_attn_implementation(attention.register(backend))
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    sink = SinkStep(
        Segments.from_bounds([0, 9, 22], "cpu"), start=18, harmful=1, layers=2, heads=4, alpha=ALPHA, position=position
    )
    predict = torch.tensor([*range(10), *range(11, 17)])
    out = model(
        input_ids=ids, position_ids=positions, segments=segments, sink=sink, logits_to_keep=predict, use_cache=False
    )
    ce = F.cross_entropy(out.logits[0], ids[0, predict + 1])
    sink.tap(ce).backward()
    assert penalty(sink.divergence()).item() == pytest.approx(wanted_r, rel=1e-5)
    assert wanted_r > 0
    for name, each in model.named_parameters():
        assert (each.grad - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-7, name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_padded_batch_gives_the_logits_of_eager_attention(backend: str) -> None:
    ids = torch.randint(4, 500, (3, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    mask[2, :4] = 0
    model = sharpened(tiny_llama()).eval()
    model.set_attn_implementation("eager")
    wanted = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation(attention.register(backend))
    found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["two calls", "blocked"])
@pytest.mark.parametrize("mean_p", [0.5, 0.95, 0.99])
def test_bf16_sink_gradient_is_within_one_percent_of_fp64(mean_p: float, path: str) -> None:
    """Where the sink takes nearly all the mass, plain differences cancel in bf16; the shifted values and 1 - p by
    expm1 do not."""
    n, heads, groups, dim, scale = 256, 4, 2, 64, 64**-0.5
    generator = torch.Generator().manual_seed(0)
    q64, k64 = (torch.randn(n, each, dim, generator=generator, dtype=torch.float64) for each in (heads, groups))
    direction = torch.randn(dim, generator=generator, dtype=torch.float64)
    direction /= direction.norm()
    q64 += 8 * direction
    low, high = 0.0, 40.0
    for _ in range(40):  # the sink key's strength at which the mean mass is mean_p
        strength = (low + high) / 2
        k = k64.clone()
        k[0] += strength * direction
        mass = dense_sink(q64.bfloat16().double(), k.bfloat16().double(), scale)[:, 1:].mean()
        low, high = (strength, high) if mass < mean_p else (low, strength)
    q, k = q64.bfloat16(), k.bfloat16()
    assert mass == pytest.approx(mean_p, abs=0.01)

    q_exact, k_exact = q.double().requires_grad_(), k.double().requires_grad_()
    dense_sink(q_exact, k_exact, scale)[:, 1:].mean(-1).sum().backward()
    segments = Segments.from_bounds([0, n], "cpu")
    scoring = Scoring(scale)
    _, lse = backends.cpu_flash(q, k, k, segments, scoring, 0)
    log_p = sink_logprob(q, k, lse, segments, 0, scoring)
    grad_p = torch.full((heads, n), 1 / (n - 1))
    if path == "two calls":
        grad_q, grad_k = sink_gradient(q, k, log_p, grad_p, segments, 0, scoring, backends.cpu_flash)
    else:
        grad_q, grad_k, _ = blocked_sink_gradient(q, k, grad_p, segments, 0, scoring)
    assert (grad_q - q_exact.grad).norm() < 0.01 * q_exact.grad.norm()
    assert (grad_k - k_exact.grad).norm() < 0.01 * k_exact.grad.norm()


def dense_sink(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """p [H,n] of the first key by a full softmax; the sink's own row included."""
    scores = scale * torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)[:, :, 0]


def test_a_text_without_a_query_after_the_sink_contributes_nothing() -> None:
    model = sharpened(tiny_llama())
    model.set_attn_implementation(attention.register("cpu_flash"))
    ids, positions, segments = packed([6, 1, 8])
    sink = SinkStep(Segments.from_bounds([0, 1, 9], "cpu"), start=6, harmful=1, layers=2, heads=4, alpha=ALPHA)
    out = model(input_ids=ids, position_ids=positions, segments=segments, sink=sink, use_cache=False)
    sink.tap(out.logits[0, :6].sum()).backward()
    assert (sink.divergence() < 0).all()  # 0 minus the harmless text's mean
    assert all(each.grad.isfinite().all() for each in model.parameters())


def test_a_forward_pass_without_its_tap_is_an_error() -> None:
    model = sharpened(tiny_llama())
    model.set_attn_implementation(attention.register("cpu_flash"))
    ids, positions, segments = packed([6, 9, 8])
    sink = SinkStep(Segments.from_bounds([0, 9, 17], "cpu"), start=6, harmful=1, layers=2, heads=4, alpha=ALPHA)
    out = model(input_ids=ids, position_ids=positions, segments=segments, sink=sink, use_cache=False)
    with pytest.raises(RuntimeError, match="went through SinkStep.tap"):
        out.logits.sum().backward()
    sink.tap(torch.zeros((), requires_grad=True))
    with pytest.raises(RuntimeError, match="twice"):
        sink.tap(torch.zeros((), requires_grad=True))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"position_bias": torch.zeros(4)}, "Module hands `position_bias` to its attention"),
        ({"is_causal": False}, "both directions"),
        ({"dropout": 0.1}, "attention_dropout 0.1"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(kwargs: dict[str, Any], message: str) -> None:
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match=message):
        attention.sink_attention(torch.nn.Module(), q, k, k, None, kernel=backends.KERNELS["cpu_flash"], **kwargs)


def test_backend_choice_is_explained_and_an_impossible_one_is_refused() -> None:
    assert backends.choose("auto", "cpu", half=False)[0] == "cpu_flash"
    assert backends.choose("auto", "mps", half=True)[0] == "sdpa"
    name, reason = backends.choose("auto", "cuda", half=True)
    assert name.startswith("flash_attention") or (name == "varlen" and "flash_attention_2" in reason)
    assert backends.choose("auto", "cuda", half=False)[0] == "sdpa"
    for requested, device, half, message in (
        ("varlen", "cpu", True, "needs a CUDA device"),
        ("cpu_flash", "cuda", True, "CPU only"),
        ("varlen", "cuda", False, "add --bf16"),
        ("flash_attention_3", "cuda", True, "flash_attn_interface is not installed: build the folder `hopper`"),
    ):
        with pytest.raises(ValueError, match=message):
            backends.choose(requested, device, half=half)


def test_settings_with_wrong_sink_statistics_are_refused() -> None:
    config = tiny_llama().config
    assert sink_refusals(config, {}) == []
    config.quantization_config = {"quant_method": "bitsandbytes"}
    assert "quantised" in sink_refusals(config, {})[0]
    assert "sequence_parallel_size" in sink_refusals(tiny_llama().config, {"sequence_parallel_size": 2})[0]
    assert "deepcompile" in sink_refusals(tiny_llama().config, {"compile": {"deepcompile": True}})[0]


def test_models_whose_attention_would_be_wrong_are_refused_before_they_are_loaded() -> None:
    config = MistralConfig(sliding_window=64, num_hidden_layers=2)
    assert attention_refusals(config, longest=65) == []
    assert attention_refusals(Gemma2Config(), longest=8192) == []
    assert "layers of linear_attention" in " ".join(attention_refusals(Qwen3NextConfig(), longest=8))
    assert "masks its attention" in attention_refusals(Llama4TextConfig(), longest=8)[0]
    assert "encoder-decoder" in attention_refusals(T5Config(), longest=8)[0]
    assert "attention interface" in attention_refusals(BloomConfig(), longest=8)[0]
    llama = tiny_llama().config
    llama.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert attention_refusals(llama, longest=2048) == [], "no text reaches the length at which it switches"
    assert "dynamic rotary scaling, which switches at 2048" in attention_refusals(llama, longest=2049)[0]


def test_the_cuda_backends_give_the_shapes_of_the_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: torch's varlen on the meta device, and flash-attn's documented call with the CPU kernel behind
    it."""
    segments = Segments((0, 8, 20), torch.empty(3, dtype=torch.int32, device="meta"))
    q, k = (torch.empty(20, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    out, lse = backends.varlen(q, k, k, segments, Scoring(0.125), 8)
    assert (out.shape, lse.shape, lse.dtype) == ((20, 4, 64), (4, 12), torch.float32)

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, softmax_scale: float, causal: bool,
        window_size: tuple[int, int], softcap: float, return_attn_probs: bool,
    ) -> tuple[Any, Any, None]:  # fmt: skip
        assert (max_q, max_k, causal, window_size, softcap, return_attn_probs) == (12, 12, True, (-1, 0), 0.0, True)
        return *backends.cpu_flash(q, k, v, Segments(tuple(cu_q.tolist()), cu_k), Scoring(softmax_scale), 0), None

    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    segments = Segments.from_bounds([0, 8, 20], "cpu")
    q, k = torch.randn(20, 4, 64), torch.randn(20, 2, 64)
    for found, wanted in zip(
        backends.flash_attention_2(q, k, k, segments, Scoring(0.125), 8),
        backends.cpu_flash(q, k, k, segments, Scoring(0.125), 8),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)
