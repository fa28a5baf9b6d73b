"""The transformers attention implementation: a flash backend, and the sink penalty on the reference texts of a packed
row.

`register(backend)` makes it known to transformers under a name to pass as `attn_implementation`; the mask function of
the same name
returns no T x T mask, so that a padded batch arrives as its 2-D mask and is unpadded here, and nothing is silently
unmasked
(transformers#46132).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.sink.backends import BACKENDS, Backend, Segments
from pipeline.sink.divergence import SinkPenalty, SinkStep


def register(backend: str) -> str:
    """Register the attention of one backend with transformers and return its `attn_implementation` name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    # transformers takes any name with "flash" in it for a kernel of its own to import.
    name = "sink_" + backend.replace("flash_attention", "fa").replace("flash", "fused")
    AttentionInterface.register(name, partial(sink_attention, attend=BACKENDS[backend]))
    AttentionMaskInterface.register(name, flash_attention_mask)
    return name


def sink_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attend: Backend,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    segments: Segments | None = None,
    sink: SinkStep | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention, transformers' signature: query [B,H,T,D], key/value [B,G,T,D] after RoPE -> ([B,T,H,D], None).

    A packed row ([1,T]) comes with `segments` (or transformers' `cu_seq_lens_q`); any other batch is B texts, with a
    2-D mask [B,T] if padded. `sink`: the statistics of this forward pass; the layer's index is `module.layer_idx`.
    Errors: ValueError if the layer asks for something the kernels here do not compute, naming it.
    """
    batch, _heads, length, dim = query.shape
    if key.shape[2] != length:
        raise ValueError("sink attention does not take a key/value cache: generate with attn_implementation='sdpa'")
    if dropout:
        raise ValueError(f"attention_dropout {dropout} is not supported beside the sink statistics: set it to 0")
    segments = segments or _segments(batch, length, attention_mask, cu_seq_lens_q, query.device)
    _refuse_unsupported(segments, sliding_window, softcap, s_aux)
    scale = dim**-0.5 if scaling is None else scaling

    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B*T,H,D]
    kept = None
    if attention_mask is not None and segments.bounds[-1] < batch * length:
        kept = attention_mask.flatten().nonzero()[:, 0]
        q, k, v = (x[kept] for x in (q, k, v))
    total = q.shape[0]
    start = total if sink is None else sink.start
    out, lse = attend(q, k, v, segments, scale, start)
    if sink is not None:
        layer = module.layer_idx
        out = SinkPenalty.apply(out, q[start:], k[start:], lse, sink, layer, scale, attend)  # type: ignore[no-untyped-call]
    if kept is not None:
        out = out.new_zeros(batch * length, *out.shape[1:]).index_copy(0, kept, out)
    return out.view(batch, length, *out.shape[1:]), None


def _segments(
    batch: int, length: int, mask: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> Segments:
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q describes one packed row, and the batch holds {batch}")
        return Segments(tuple(cu_seqlens.tolist()), cu_seqlens)
    if mask is None:
        return Segments.from_bounds(range(0, (batch + 1) * length, length), device)
    if mask.dim() != 2:
        raise ValueError(f"sink attention takes a 2-D padding mask [batch, tokens], not {mask.dim()} dimensions")
    lengths = mask.sum(-1).tolist()
    bounds = [0]
    for each in lengths:
        bounds.append(bounds[-1] + int(each))
    return Segments.from_bounds(bounds, device)


def _refuse_unsupported(
    segments: Segments, sliding_window: int | None, softcap: float | None, s_aux: Tensor | None
) -> None:
    if sliding_window is not None and sliding_window < segments.longest:
        raise ValueError(
            f"this model's sliding window of {sliding_window} tokens is shorter than a text of {segments.longest}: "
            "shorten --max_length and --reference_max_length to the window"
        )
    if softcap is not None:
        raise ValueError(
            f"this model caps its attention logits (softcap {softcap}), "
            "which no kernel here computes with its gradient"
        )
    if s_aux is not None:
        raise ValueError("this model has learned sink logits (s_aux), which the kernels here leave out of the softmax")
