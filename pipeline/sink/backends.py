"""One function per flash kernel, behind one signature.

Shapes: T packed tokens, H query heads, G key/value heads (H a multiple of G), D head dimension, S segments.

    attend(q [T,H,D], k [T,G,D], v [T,G,D], segments, scale, lse_from) -> out [T,H,D], lse [H, T-lse_from]

Attention is causal inside each segment. `lse` is the natural log of each query's softmax denominator, fp32, of the
tokens from
`lse_from` on (the reference texts); it carries no gradient: every kernel here returns it but drops its gradient in
silence
(flash-attention#1817), so `column.py` computes the gradient by formula.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1024  # query rows a blocked log-sum-exp holds at once: memory O(BLOCK x segment)


@dataclass(frozen=True)
class Segments:
    """Boundaries of the texts in a packed row: `bounds` on the host, `cu_seqlens` [S+1] int32 on the device."""

    bounds: tuple[int, ...]
    cu_seqlens: Tensor

    @classmethod
    def from_bounds(cls, bounds: Sequence[int], device: torch.device | str) -> Segments:
        """Segments whose boundaries are the host integers 0 = b_0 < b_1 < ... = T."""
        return cls(tuple(bounds), torch.tensor(tuple(bounds), dtype=torch.int32, device=device))

    @property
    def longest(self) -> int:
        """Tokens in the longest segment."""
        return max(end - start for start, end in self.spans)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(start, end) of each segment."""
        return list(zip(self.bounds[:-1], self.bounds[1:], strict=True))


Backend = Callable[[Tensor, Tensor, Tensor, Segments, float, int], tuple[Tensor, Tensor]]


def cpu_flash(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, lse_from: int
) -> tuple[Tensor, Tensor]:
    """PyTorch's own CPU flash kernel, one call a segment (it has no variable-length form)."""
    outs, lses = [], []
    for start, end in segments.spans:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(x[start:end].transpose(0, 1)[None] for x in (q, k, v)), 0.0, True, scale=scale
        )
        outs.append(out[0].transpose(0, 1))
        if end > lse_from:
            lses.append(lse[0, :, max(lse_from - start, 0) :])
    lse = torch.cat(lses, dim=-1) if lses else q.new_empty(q.shape[1], 0, dtype=torch.float32)
    return torch.cat(outs), lse


def flash_attention_2(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, lse_from: int
) -> tuple[Tensor, Tensor]:
    """Dao's flash-attn 2, variable length. Its LSE is [H, T] fp32 in the versions that pack it (>= 2.6)."""
    from flash_attn import flash_attn_varlen_func

    cu, longest = segments.cu_seqlens, segments.longest
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=True, return_attn_probs=True
    )
    return out, lse[:, lse_from:].detach()


def varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, lse_from: int) -> tuple[Tensor, Tensor]:
    """torch.nn.attention.varlen: flash attention 2 inside PyTorch, CUDA only. Its LSE is [H, T], although its
    documentation says [T, H]."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    cu, longest = segments.cu_seqlens, segments.longest
    out, lse = varlen_attn(
        q, k, v, cu, cu, longest, longest,
        return_aux=AuxRequest(lse=True), scale=scale, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert lse.shape == (q.shape[1], q.shape[0]), f"varlen_attn returned an LSE of shape {tuple(lse.shape)}"
    return out, lse[:, lse_from:].detach()


def sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, lse_from: int) -> tuple[Tensor, Tensor]:
    """scaled_dot_product_attention on any device. It returns no LSE, so the reference texts' is computed beside it, in
    blocks."""
    outs, lses = [], []
    for start, end in segments.spans:
        q_HTD, k_GTD, v_GTD = (x[start:end].transpose(0, 1) for x in (q, k, v))
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q_HTD[None], k_GTD[None], v_GTD[None], is_causal=True, scale=scale, enable_gqa=gqa
        )
        outs.append(out[0].transpose(0, 1))
        if end > lse_from:
            lses.append(_blocked_lse(q_HTD, k_GTD, scale, max(lse_from - start, 0)))
    lse = torch.cat(lses, dim=-1) if lses else q.new_empty(q.shape[1], 0, dtype=torch.float32)
    return torch.cat(outs), lse


@torch.no_grad()
def _blocked_lse(q_HTD: Tensor, k_GTD: Tensor, scale: float, first: int) -> Tensor:
    """Causal log-sum-exp [H, T-first] fp32 of one segment's queries from `first` on."""
    heads, length, _ = q_HTD.shape
    k_HTD = k_GTD.repeat_interleave(heads // k_GTD.shape[0], dim=0).float()
    rows = []
    for low in range(first, length, BLOCK):
        high = min(low + BLOCK, length)
        scores = scale * q_HTD[:, low:high].float() @ k_HTD[:, :high].transpose(1, 2)
        future = torch.ones(high - low, high, dtype=torch.bool, device=q_HTD.device).triu(low + 1)
        rows.append(scores.masked_fill(future, -torch.inf).logsumexp(-1))
    return torch.cat(rows, dim=-1)


BACKENDS: dict[str, Backend] = {
    "cpu_flash": cpu_flash,
    "flash_attention_2": flash_attention_2,
    "varlen": varlen,
    "sdpa": sdpa,
}


def choose(requested: str, device_type: str) -> tuple[str, str]:
    """The backend's name for `--attention` on a device, and the reason, for the start-up summary.

    Errors: ValueError if the requested one cannot run on the device or is not installed, with what would.
    """
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if requested == "auto":
        if device_type == "cpu":
            return "cpu_flash", "PyTorch's CPU flash kernel"
        if device_type != "cuda":
            return "sdpa", f"no flash kernel returns a log-sum-exp on {device_type}"
        if has_flash:
            return "flash_attention_2", "flash-attn is installed"
        return "varlen", "flash-attn is not installed; PyTorch's own flash attention 2"
    if requested == "cpu_flash" and device_type != "cpu":
        raise ValueError(
            f"--attention cpu_flash runs on the CPU only, and the device is {device_type}: use --attention auto"
        )
    if requested in ("flash_attention_2", "varlen") and device_type != "cuda":
        raise ValueError(
            f"--attention {requested} needs a CUDA device, and the device is {device_type}: use --attention auto"
        )
    if requested == "flash_attention_2" and not has_flash:
        raise ValueError(
            "--attention flash_attention_2: the package flash-attn is not installed: run `make setup-gpu`"
        )
    return requested, "asked for by --attention"
