"""One function per attention kernel, behind one signature, and the choice between them.

Shapes: T packed tokens, H query heads, G key/value heads (H a multiple of G), D head dimension.

    attend(q [T,H,D], k [T,G,D], v [T,G,D], segments, scoring, lse_from) -> out [T,H,D], lse [H, T-lse_from]

Attention is causal inside each segment. `lse` is the natural log of each query's softmax denominator, fp32, of the
tokens from `lse_from` on (the reference texts). It carries no gradient here: flash-attn 2 and 3, PyTorch's varlen_attn
and its CPU kernel drop it in silence (flash-attention#1817), so `column.py` computes the gradient by formula.
flash-attn 4 can differentiate its log-sum-exp, but adds that gradient to dS before dS is rounded to bf16 and the sink
key's own term after it: where the sink takes nearly all the mass the two cancel and the rounding is left. The formula
is used there too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.sink.blocked import blocked_attention
from pipeline.sink.layout import Scoring, Segments

Backend = Callable[[Tensor, Tensor, Tensor, Segments, Scoring, int], tuple[Tensor, Tensor]]


def cpu_flash(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scoring: Scoring, lse_from: int
) -> tuple[Tensor, Tensor]:
    """PyTorch's own CPU flash kernel, one call a segment (it has no variable-length form)."""
    outs, lses = [], []
    for (start, end), text in zip(segments.spans, _texts(q, k, v, segments), strict=True):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(x.transpose(0, 1)[None] for x in text), 0.0, True, scale=scoring.scale
        )
        outs.append(out[0].transpose(0, 1))
        if end > lse_from:
            lses.append(lse[0, :, max(lse_from - start, 0) :])
    lse = torch.cat(lses, dim=-1) if lses else q.new_empty(q.shape[1], 0, dtype=torch.float32)
    return torch.cat(outs), lse


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scoring: Scoring, lse_from: int
) -> tuple[Tensor, Tensor]:
    """scaled_dot_product_attention on any device. It returns no LSE, so the reference texts' is computed beside it, in
    blocks."""
    outs, lses = [], []
    gqa = q.shape[1] != k.shape[1]
    for (start, end), text in zip(segments.spans, _texts(q, k, v, segments), strict=True):
        q_HTD, k_GTD, v_GTD = (x.transpose(0, 1) for x in text)
        out = F.scaled_dot_product_attention(
            q_HTD[None], k_GTD[None], v_GTD[None], is_causal=True, scale=scoring.scale, enable_gqa=gqa
        )
        outs.append(out[0].transpose(0, 1))
        if end > lse_from:
            one = Segments.from_bounds((0, end - start), q.device)
            with torch.no_grad():
                _, lse = blocked_attention(text[0], text[1], text[2][..., :0], one, scoring)
            lses.append(lse[:, max(lse_from - start, 0) :].float())
    lse = torch.cat(lses, dim=-1) if lses else q.new_empty(q.shape[1], 0, dtype=torch.float32)
    return torch.cat(outs), lse


def varlen(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scoring: Scoring, lse_from: int
) -> tuple[Tensor, Tensor]:
    """torch.nn.attention.varlen: flash attention 2 inside PyTorch, CUDA only. Its LSE is [H, T], although its
    documentation says [T, H]."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    cu, longest = segments.cu_seqlens, segments.longest
    out, lse = varlen_attn(
        q, k, v, cu, cu, longest, longest, return_aux=AuxRequest(lse=True), scale=scoring.scale,
        window_size=(_keys_back(segments, scoring), 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert lse.shape == (q.shape[1], q.shape[0]), f"varlen_attn returned an LSE of shape {tuple(lse.shape)}"
    return out, lse[:, lse_from:].detach()


def flash_attention_2(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scoring: Scoring, lse_from: int
) -> tuple[Tensor, Tensor]:
    """Dao's flash-attn 2, variable length. Its LSE is [H, T] fp32 in the versions that pack it (>= 2.6)."""
    from flash_attn import flash_attn_varlen_func

    cu, longest = segments.cu_seqlens, segments.longest
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest, softmax_scale=scoring.scale, causal=True,
        window_size=(_keys_back(segments, scoring), 0), softcap=scoring.softcap or 0.0, return_attn_probs=True,
    )  # fmt: skip
    return out, lse[:, lse_from:].detach()


def flash_attention_3(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scoring: Scoring, lse_from: int
) -> tuple[Tensor, Tensor]:
    """flash-attn 3 (its `hopper` folder), variable length; LSE [H, T] fp32."""
    from flash_attn_interface import flash_attn_varlen_func

    cu, longest = segments.cu_seqlens, segments.longest
    out, lse = flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest, softmax_scale=scoring.scale, causal=True,
        window_size=(_keys_back(segments, scoring), 0), softcap=scoring.softcap or 0.0, return_attn_probs=True,
    )  # fmt: skip
    return out, lse[:, lse_from:].detach()


def flash_attention_4(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scoring: Scoring, lse_from: int
) -> tuple[Tensor, Tensor]:
    """flash-attn 4 (the package flash-attn-4), variable length; LSE [H, T] fp32."""
    from flash_attn.cute import flash_attn_varlen_func

    cu, longest, back = segments.cu_seqlens, segments.longest, _keys_back(segments, scoring)
    out, lse = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest,
        softmax_scale=scoring.scale, causal=True, window_size=(None, None) if back < 0 else (back, 0), return_lse=True,
    )  # fmt: skip
    return out, lse[:, lse_from:].detach()


def blocked(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scoring: Scoring, lse_from: int
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch in blocks of queries, any device: the one that computes every kind of scoring."""
    out, lse = blocked_attention(q, k, v, segments, scoring)
    return out, lse[:, lse_from:].detach().float()


def _texts(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Iterator[tuple[Tensor, ...]]:
    """Each segment's q, k and v. Split, not sliced: the backward pass of a slice fills a gradient as long as the whole
    row."""
    lengths = [end - start for start, end in segments.spans]
    return zip(*(x.split(lengths) for x in (q, k, v)), strict=True)


def _keys_back(segments: Segments, scoring: Scoring) -> int:
    """Keys that a query sees behind itself, as flash kernels count a window; -1 for all of them."""
    return scoring.window - 1 if scoring.window is not None and scoring.window < segments.longest else -1


@dataclass(frozen=True)
class Kernel:
    """One kernel: what of `Scoring` it computes, with its gradient, beyond plain causal attention, and where it
    runs."""

    name: str
    attend: Backend
    computes: frozenset[str] = frozenset()
    device: str | None = None  # the only device type it runs on
    half_only: bool = False  # bf16 and fp16
    module: str | None = None  # what it imports, and how to get it
    install: str = ""
    capability: int = 0  # the lowest CUDA compute capability (major) it is fast and supported on

    def refusal(self, device_type: str, half: bool) -> str | None:
        """Why it cannot run here, with the remedy; None if it can."""
        flag = f"--attention {self.name}"
        if self.device is not None and self.device != device_type:
            where = "runs on the CPU only" if self.device == "cpu" else "needs a CUDA device"
            return f"{flag} {where}, and the device is {device_type}: use --attention auto"
        if self.module is not None and not _installed(self.module):
            return f"{flag}: {self.module} is not installed: {self.install}"
        if self.half_only and not half:
            return f"{flag} computes in bf16 and fp16 only: add --bf16, or use --attention sdpa"
        if device_type == "cuda" and torch.cuda.is_available() and self.capability > _capability():
            return (
                f"{flag} needs a GPU of compute capability {self.capability}.0, and this one has {_capability()}: "
                "use --attention auto"
            )
        return None


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel("cpu_flash", cpu_flash, device="cpu"),
        Kernel(
            "flash_attention_4", flash_attention_4, frozenset({"window"}), device="cuda", half_only=True,
            module="flash_attn.cute", install="pip install flash-attn-4", capability=9,
        ),
        Kernel(
            "flash_attention_3", flash_attention_3, frozenset({"window", "softcap"}), device="cuda", half_only=True,
            module="flash_attn_interface", install="build the folder `hopper` of Dao-AILab/flash-attention",
            capability=9,
        ),
        Kernel(
            "flash_attention_2", flash_attention_2, frozenset({"window", "softcap"}), device="cuda", half_only=True,
            module="flash_attn_2_cuda", install="run `make setup-gpu` (the package flash-attn)", capability=8,
        ),
        Kernel("varlen", varlen, frozenset({"window"}), device="cuda", half_only=True, capability=8),
        Kernel("sdpa", sdpa),
        Kernel("blocked", blocked, frozenset({"window", "softcap", "sink_logits"})),
    )
}  # fmt: skip

# What `auto` tries on CUDA, fastest first; flash-attn 3 is made for Hopper (9), 4 for what came after it.
CUDA_ORDER = ("flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen", "sdpa")
HOPPER_ORDER = ("flash_attention_3", "flash_attention_4", "flash_attention_2", "varlen", "sdpa")


def choose(requested: str, device_type: str, *, half: bool) -> tuple[str, str]:
    """The kernel's name for `--attention` on a device, and the reason, for the start-up summary.

    half: whether the model computes in bf16 or fp16. Errors: ValueError if the requested one cannot run here, with
    what would.
    """
    if requested != "auto":
        if reason := KERNELS[requested].refusal(device_type, half):
            raise ValueError(reason)
        return requested, "asked for by --attention"
    if device_type == "cpu":
        return "cpu_flash", "PyTorch's CPU flash kernel"
    if device_type != "cuda":
        return "sdpa", f"no flash kernel returns a log-sum-exp on {device_type}"
    if not half:
        return "sdpa", "flash kernels compute in bf16 and fp16 only, and this is fp32"
    order = HOPPER_ORDER if _capability() == 9 else CUDA_ORDER
    name = next(each for each in order if KERNELS[each].refusal(device_type, half) is None)
    missing = [each for each in CUDA_ORDER[:3] if (module := KERNELS[each].module) and not _installed(module)]
    return name, "the fastest that is installed" + (f"; not installed: {', '.join(missing)}" if missing else "")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its parent package is missing or broken
        return False


def _capability() -> int:
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 8
