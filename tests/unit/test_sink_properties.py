"""Properties of the sink kernels over shapes, grouped heads, windows, soft caps, learned sinks and segment layouts:
each equals a dense softmax written out in fp64, and the portable path's gradients pass gradcheck."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.sink import blocked, fused_cpu
from pipeline.sink.backends import KERNELS
from pipeline.sink.blocked import blocked_attention
from pipeline.sink.column import blocked_sink_gradient, sink_gradient, sink_logprob
from pipeline.sink.divergence import SinkMeans, mean_weights, text_weights
from pipeline.sink.layout import Scoring, Segments

ERROR = 1e-4  # of a tensor's norm, fp32 against fp64
ABSOLUTE = 1e-6  # where a tensor's norm is next to nothing
KERNEL_NAMES = ["cpu_flash", "sdpa", "blocked"]

# Derandomised: the same cases in every run. No deadline: a test never asserts a time.
modest = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


@dataclass(frozen=True)
class Case:
    """One layer's inputs in fp64 and how it scores them."""

    q: Tensor
    k: Tensor
    v: Tensor
    segments: Segments
    scoring: Scoring
    position: int
    rows: int  # query rows that a block of the portable path may hold

    def exact(self) -> tuple[list[Tensor], Scoring]:
        """q, k, v and, if there are any, the sink logits, all of them asking for a gradient; and the scoring with
        them."""
        inputs = [x.clone().requires_grad_() for x in (self.q, self.k, self.v)]
        if self.scoring.sink_logits is None:
            return inputs, self.scoring
        inputs.append(self.scoring.sink_logits.clone().requires_grad_())
        return inputs, replace(self.scoring, sink_logits=inputs[3])

    def single(self) -> tuple[list[Tensor], Scoring]:
        """The same in fp32."""
        logits = self.scoring.sink_logits
        single = replace(self.scoring, sink_logits=None if logits is None else logits.float().requires_grad_())
        return [x.float().requires_grad_() for x in (self.q, self.k, self.v)], single


def dense(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scoring: Scoring
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out [T,H,Dv], lse [H,T] and each segment's attention [H,n,n]: the formula, with every score in memory."""
    outs, lses, attentions = [], [], []
    group = q.shape[1] // k.shape[1]
    for start, end in segments.spans:
        keys, values = (x[start:end].repeat_interleave(group, dim=1) for x in (k, v))
        scores = scoring.scale * torch.einsum("ihd,jhd->hij", q[start:end], keys)
        if scoring.softcap is not None:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = back < 0
        if scoring.window is not None:
            hidden = hidden | (back >= scoring.window)
        scores = scores.masked_fill(hidden, -torch.inf)
        if scoring.sink_logits is not None:
            learned = scoring.sink_logits[:, None, None].expand(-1, end - start, 1)
            scores = torch.cat([scores, learned], dim=-1)
        attention = scores.softmax(-1)[..., : end - start]
        outs.append(torch.einsum("hij,jhd->ihd", attention, values))
        lses.append(scores.logsumexp(-1))
        attentions.append(attention)
    return torch.cat(outs), torch.cat(lses, dim=1), attentions


def dense_sink(attentions: list[Tensor], position: int) -> Tensor:
    """p [H,T]: each query's attention on its text's sink key; 0 for the queries up to the sink."""
    columns = []
    for attention in attentions:
        last = attention.shape[1] - 1  # a text without its sink key has no later query either
        later = torch.arange(last + 1) > position
        columns.append(torch.where(later, attention[:, :, min(position, last)], 0.0))
    return torch.cat(columns, dim=1)


def near(found: Tensor, wanted: Tensor) -> None:
    """The error of a tensor, relative to its norm."""
    assert found.shape == wanted.shape
    assert found.isfinite().all()
    error, norm = (found.double() - wanted).norm(), wanted.norm()
    assert error <= ERROR * norm + ABSOLUTE, f"error {error:.2e} at a norm of {norm:.2e}"


@st.composite
def cases(draw: st.DrawFn, rules: bool, wide: bool = False) -> Case:
    """A layer's inputs; `rules`: also windows, caps and learned sinks; `wide`: also values of another width."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    groups, ratio, dim = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 4, 8, 16]))
    heads, total = groups * ratio, sum(lengths)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sharpness = draw(st.sampled_from([0.5, 2.0, 4.0]))
    dim_v = draw(st.integers(1, 20)) if wide else dim
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    scoring = Scoring(dim**-0.5 * draw(st.floats(0.5, 2)))
    if rules:
        scoring = replace(
            scoring,
            window=draw(st.none() | st.integers(1, 45)),
            softcap=draw(st.none() | st.floats(0.5, 20)),
            sink_logits=3 * normal(heads) if draw(st.booleans()) else None,
        )
    return Case(
        sharpness * normal(total, heads, dim), sharpness * normal(total, groups, dim), normal(total, groups, dim_v),
        Segments.from_bounds(bounds, "cpu"), scoring, draw(st.integers(0, 6)), draw(st.sampled_from([1, 3, 16, 512])),
    )  # fmt: skip


def in_small_blocks(rows: int) -> pytest.MonkeyPatch:
    """Lower the block height, so that short texts are several blocks. Undo it after use."""
    patch = pytest.MonkeyPatch()
    patch.setattr(blocked, "LONGEST_BLOCK", rows)
    return patch


@pytest.mark.parametrize("name", KERNEL_NAMES)
@given(data=st.data())
@modest
def test_a_kernel_equals_the_dense_softmax(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(rules=name == "blocked", wide=name == "blocked"))
    lse_from = data.draw(st.integers(0, case.q.shape[0]))
    exact, scoring = case.exact()
    wanted, wanted_lse, _ = dense(*exact[:3], case.segments, scoring)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted_grads = torch.autograd.grad((wanted * weights).sum(), exact, allow_unused=True)
    inputs, scoring = case.single()
    patch = in_small_blocks(case.rows)
    out, lse = KERNELS[name].attend(*inputs, case.segments, scoring, lse_from)
    if scoring.sink_logits is not None:
        inputs.append(scoring.sink_logits)
    grads = torch.autograd.grad((out * weights.float()).sum(), inputs)
    patch.undo()
    near(out, wanted)
    assert lse.shape == (case.q.shape[1], case.q.shape[0] - lse_from)
    assert lse.dtype == torch.float32
    assert not lse.requires_grad
    torch.testing.assert_close(lse.double(), wanted_lse[:, lse_from:], rtol=1e-5, atol=1e-5)
    for found, want in zip(grads, wanted_grads, strict=True):
        near(found, want)


@given(case=cases(rules=True))
@modest
def test_sink_probabilities_and_their_gradient_on_the_portable_path(case: Case) -> None:
    exact, scoring = case.exact()
    _, _, attentions = dense(*exact[:3], case.segments, scoring)
    p = dense_sink(attentions, case.position)
    grad_p = torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    asked = [exact[0], exact[1], *exact[3:]]
    wanted = torch.autograd.grad((p * grad_p).sum(), asked, allow_unused=True, materialize_grads=True)

    inputs, scoring = case.single()
    patch = in_small_blocks(case.rows)
    _, lse = KERNELS["blocked"].attend(*inputs, case.segments, scoring, 0)
    q, k = (x.detach() for x in inputs[:2])
    log_p = sink_logprob(q, k, lse, case.segments, case.position, scoring)
    grads = blocked_sink_gradient(q, k, grad_p.float(), case.segments, case.position, scoring)
    patch.undo()
    torch.testing.assert_close(log_p.exp().double(), p, rtol=1e-4, atol=1e-6)
    for found, want in zip([each for each in grads if each is not None], wanted, strict=True):
        near(found, want)


@pytest.mark.parametrize("name", KERNEL_NAMES)
@given(data=st.data())
@modest
def test_sink_gradient_by_two_calls_of_a_kernel(name: str, data: st.DataObject) -> None:
    """The formula beside any kernel; with windows where the kernel has them."""
    case = data.draw(cases(rules=name == "blocked"))
    scoring = replace(case.scoring, softcap=None, sink_logits=None)
    exact, _ = case.exact()
    _, _, attentions = dense(*exact[:3], case.segments, scoring)
    p = dense_sink(attentions, case.position)
    grad_p = torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad((p * grad_p).sum(), exact[:2], allow_unused=True, materialize_grads=True)

    attend = KERNELS[name].attend
    q, k, v = (x.detach() for x in case.single()[0])
    patch = in_small_blocks(case.rows)
    _, lse = attend(q, k, v, case.segments, scoring, 0)
    log_p = sink_logprob(q, k, lse, case.segments, case.position, scoring)
    grads = sink_gradient(q, k, log_p, grad_p.float(), case.segments, case.position, scoring, attend)
    patch.undo()
    torch.testing.assert_close(log_p.exp().double(), p, rtol=1e-4, atol=1e-6)
    for found, want in zip(grads, wanted, strict=True):
        near(found, want)


@given(case=cases(rules=False))
@modest
def test_attention_and_sink_gradient_in_one_backward_pass_on_a_cpu(case: Case) -> None:
    exact, scoring = case.exact()
    wanted_out, _, attentions = dense(*exact[:3], case.segments, scoring)
    p = dense_sink(attentions, case.position)
    generator = torch.Generator().manual_seed(1)
    grad_out, grad_p = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (wanted_out, p))
    wanted = torch.autograd.grad((wanted_out * grad_out).sum() + (p * grad_p).sum(), exact[:3])

    q, k, v = (x.detach() for x in case.single()[0])
    out, lse = KERNELS["cpu_flash"].attend(q, k, v, case.segments, scoring, 0)
    rule = (case.segments, case.position, scoring)
    found = fused_cpu.attention_backward(q, k, v, out, lse, grad_out.float(), grad_p.float(), *rule)
    for each, want in zip(found, wanted, strict=True):
        # A text of one token has a gradient of 0, which its fp32 kernel leaves as a rounding of dO.
        assert (each - want).norm() <= 1e-4 * want.norm() + 1e-6 * grad_out.norm()


@given(case=cases(rules=True), data=st.data())
@modest
def test_means_over_texts_and_kinds(case: Case, data: st.DataObject) -> None:
    """Each text's mean over its queries after the sink, and the harmful texts' minus the harmless ones'; texts without
    such a query do not count."""
    harmful = data.draw(st.integers(0, len(case.segments.spans)))
    _, _, attentions = dense(case.q, case.k, case.v, case.segments, case.scoring)
    texts = [
        attention[:, case.position + 1 :, case.position].mean(1) if attention.shape[1] > case.position + 1 else None
        for attention in attentions
    ]
    kinds = []
    for kind in (texts[:harmful], texts[harmful:]):
        usable = [each for each in kind if each is not None]
        kinds.append(torch.stack(usable).mean(0) if usable else torch.zeros(case.q.shape[1]))
    p = dense_sink(attentions, case.position)
    found = (p * mean_weights(case.segments, harmful, case.position)).sum(-1)
    torch.testing.assert_close(found, (kinds[0] - kinds[1]).double(), rtol=1e-5, atol=1e-6)

    means = SinkMeans(case.segments, layers=1, heads=case.q.shape[1], position=case.position)
    inputs, scoring = case.single()
    means.attend(*inputs, case.segments, scoring, KERNELS["blocked"].attend, 0)
    zero = torch.zeros(case.q.shape[1], dtype=torch.float64)
    wanted = torch.stack([zero if each is None else each for each in texts])
    torch.testing.assert_close(means.means()[:, 0].double(), wanted, rtol=1e-4, atol=1e-6)
    assert text_weights(case.segments, case.position).shape == (len(texts), case.q.shape[0])


RULES = {
    "plain": {},
    "window": {"window": 3},
    "softcap": {"softcap": 1.5},
    "sink_logits": {"sink_logits": [0.5, -1.0, 2.0, 0.0]},
    "all": {"window": 3, "softcap": 1.5, "sink_logits": [0.5, -1.0, 2.0, 0.0]},
}


@pytest.mark.parametrize("rule", RULES)
def test_gradcheck_of_the_portable_path(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """out and LSE with respect to q, k, v and the learned sinks, and the sink mean through them, in fp64, over two
    texts of several blocks."""
    monkeypatch.setattr(blocked, "LONGEST_BLOCK", 2)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(8, heads, dim, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads, dim in ((4, 3), (2, 3), (2, 2))
    )
    flags = dict(RULES[rule])
    inputs = [q, k, v]
    if learned := flags.pop("sink_logits", None):
        inputs.append(torch.tensor(learned, dtype=torch.float64, requires_grad=True))
    segments = Segments.from_bounds([0, 5, 8], "cpu")

    def attention(q: Tensor, k: Tensor, v: Tensor, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return blocked_attention(q, k, v, segments, Scoring(0.9, sink_logits=logits, **flags))

    def sink_mean(q: Tensor, k: Tensor, logits: Tensor | None = None) -> Tensor:
        scoring = Scoring(0.9, sink_logits=logits, **flags)
        _, lse = blocked_attention(q, k, k, segments, scoring)
        p = sink_logprob(q, k, lse, segments, 1, scoring).exp()
        return (p * mean_weights(segments, 1, 1)).sum(-1)

    assert torch.autograd.gradcheck(attention, inputs)
    assert torch.autograd.gradcheck(sink_mean, [q, k, *inputs[3:]])
