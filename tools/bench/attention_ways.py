"""One attention layer's forward and backward pass over one reference text, with and without its sink gradient.

The text of N tokens is the harmful one. Its harmless counterpart has two tokens, whose one query either sees nothing
but the sink or nothing of it: so each head can be made positive or negative at no cost.

    attention      the kernel's own forward and backward pass
    two_call       the same, and the sink gradient by two more calls of the kernel (column.py)
    fused          the kernel's forward pass, one backward pass with the sink gradient in it (fused.py)
    fused_plain    the same without a sink gradient: what `fused` is compared with beside `attention`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.builtin_model import resolve_model
from pipeline.sink.backends import KERNELS, Kernel
from pipeline.sink.column import sink_logprob
from pipeline.sink.divergence import SinkStep
from pipeline.sink.fused import choose_backward
from pipeline.sink.injection import FusedSinkAttention, SinkPenalty
from pipeline.sink.layout import Scoring, Segments
from tools.bench.flops import groups_and_dim
from tools.bench.layouts import model_config
from tools.bench.timing import clock, quartiles

POSITIVE = {"all": 1.0, "half": 0.5, "none": 0.0}  # share of heads with a gradient
COUNTERPART = 2  # tokens of the harmless text


@dataclass(frozen=True)
class Shape:
    """Heads of one layer, and tokens of the reference text."""

    tokens: int
    heads: int
    groups: int
    dim: int

    @classmethod
    def of(cls, name_or_path: str, tokens: int) -> Shape:
        """A model's heads. Errors: ValueError where transformers finds no configuration."""
        config = model_config(resolve_model(name_or_path)).get_text_config()
        return cls(tokens, config.num_attention_heads, *groups_and_dim(config))


class Layer:
    """Inputs of one layer and the ways through it."""

    def __init__(self, shape: Shape, kernel: str, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = shape
        self.kernel: Kernel = KERNELS[kernel]
        self.device = device
        self.dtype = dtype
        self.scoring = Scoring(shape.dim**-0.5)
        self.total = shape.tokens + COUNTERPART
        self.segments = Segments.from_bounds((0, shape.tokens, self.total), device)
        generator = torch.Generator().manual_seed(0)
        self._noise = [torch.randn(self.total, n, shape.dim, generator=generator) for n in (shape.heads, shape.groups)]
        sizes = ((shape.groups, shape.dim), (shape.heads, shape.dim))
        self.v, self.grad_out = (
            torch.randn(self.total, *size, generator=generator).to(device, dtype) for size in sizes
        )
        self.v.requires_grad_()
        self.q_and_k = {name: self._inputs(share) for name, share in POSITIVE.items()}
        self.backward = choose_backward(self.q_and_k["all"][0], self.v, self.scoring, self.kernel.attend)

    def _inputs(self, positive: float) -> tuple[Tensor, Tensor]:
        """q and k in which the sink takes about half of a late query's mass, and a share of heads is positive."""
        q, k = (each.clone() for each in self._noise)
        n, along = self.shape.tokens, math.sqrt(self.shape.dim)
        # The other keys' logits are normal, so that their log-sum-exp is about log n + 1/2.
        pull = math.sqrt((math.log(n) + 0.5) * along)
        q[:n, :, 0] += pull
        k[0, :, 0] += pull
        q[n:], k[n:] = 0, 0
        k[n, :, 0], k[n + 1, :, 0] = along, -along
        heads = torch.arange(self.shape.heads)
        on = (heads + 1) * positive // 1 > heads * positive // 1  # spread over the key/value groups
        q[n + 1, :, 0] = torch.where(on, -20.0, 20.0)  # p of the counterpart's query: 0 or 1
        return tuple(each.to(self.device, self.dtype).requires_grad_() for each in (q, k))  # type: ignore[return-value]

    def step(self) -> SinkStep:
        """The statistics of one forward pass, with the loss's scale already known."""
        step = SinkStep(self.segments, start=0, harmful=1, layers=1, heads=self.shape.heads, alpha=1.0)
        step.tap(torch.ones((), device=self.device, requires_grad=True)).backward()
        return step

    def ways(self) -> Mapping[str, Callable[[], float]]:
        """Each way's forward and backward pass, in seconds; `two_call:half` has half of the heads positive."""
        found = {"attention": self._timed("all", self._attention)}
        found |= {f"two_call:{name}": self._timed(name, self._two_call) for name in POSITIVE}
        if self.backward is not None:
            found["fused_plain"] = self._timed("all", self._fused_plain)
            found |= {f"fused:{name}": self._timed(name, self._fused) for name in POSITIVE}
        return found

    def _timed(self, positive: str, forward: Callable[[Tensor, Tensor, SinkStep], Tensor]) -> Callable[[], float]:
        def run() -> float:
            q, k = self.q_and_k[positive]
            step = self.step()
            for each in (q, k, self.v):
                each.grad = None
            began = clock(self.device)
            forward(q, k, step).backward(self.grad_out)
            return clock(self.device) - began

        return run

    def _attention(self, q: Tensor, k: Tensor, step: SinkStep) -> Tensor:
        return self.kernel.attend(q, k, self.v, self.segments, self.scoring, self.total)[0]

    def _two_call(self, q: Tensor, k: Tensor, step: SinkStep) -> Tensor:
        out, lse = self.kernel.attend(q, k, self.v, self.segments, self.scoring, 0)
        penalised: Tensor = SinkPenalty.apply(  # type: ignore[no-untyped-call]
            out, q, k, None, lse, step, self.scoring, self.kernel.attend, 0
        )
        return penalised

    def _fused(self, q: Tensor, k: Tensor, step: SinkStep) -> Tensor:
        out: Tensor = FusedSinkAttention.apply(  # type: ignore[no-untyped-call]
            q, k, self.v, step, self.scoring, self.kernel.attend, self.backward, 0
        )
        return out

    def _fused_plain(self, q: Tensor, k: Tensor, step: SinkStep) -> Tensor:
        out: Tensor = _FusedPlain.apply(q, k, self.v, self)  # type: ignore[no-untyped-call]
        return out

    def bf16_error(self) -> float:
        """Largest error over heads of the text's mean sink attention in bf16, against a full softmax in fp32 on the
        same rounded q and k."""
        q, k = (each.detach().bfloat16() for each in self.q_and_k["all"])
        _, lse = self.kernel.attend(q, k, self.v.detach().bfloat16(), self.segments, self.scoring, 0)
        n = self.shape.tokens
        found = sink_logprob(q, k, lse, self.segments, 0, self.scoring).exp()[:, 1:n].mean(-1)
        group = self.shape.heads // self.shape.groups
        future = torch.ones(n, n, dtype=torch.bool, device=self.device).triu(1)
        wanted = []
        for head in range(self.shape.heads):
            logits = self.scoring.scale * q[:n, head].float() @ k[:n, head // group].float().t()
            wanted.append(logits.masked_fill_(future, -torch.inf).softmax(-1)[1:, 0].mean())
        return float((found - torch.stack(wanted)).abs().max())


def shares(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, dict[str, float]]]:
    """What each way adds, pair by pair, in parts of `attention`, and of `fused_plain` where that ran."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for baseline, prefix in (("attention", ""), ("fused_plain", "fused:")):
        found[baseline] = {
            way: quartiles([a / b - 1 for a, b in zip(each, seconds[baseline], strict=True)])._asdict()
            for way, each in seconds.items()
            if baseline in seconds and way != baseline and way.startswith(prefix)
        }
    return found


class _FusedPlain(torch.autograd.Function):
    """The fused backward pass with no sink gradient to add."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layer: Layer) -> Tensor:
        out, lse = layer.kernel.attend(q, k, v, layer.segments, layer.scoring, 0)
        ctx.save_for_backward(q, k, v, out, lse, torch.zeros_like(lse))
        ctx.layer = layer
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, grad_p = ctx.saved_tensors
        layer: Layer = ctx.layer
        assert layer.backward is not None
        found = layer.backward(q, k, v, out, lse, grads[0], grad_p, layer.segments, 0, layer.scoring)
        return *found, None
