"""The transformers attention implementation: a kernel, and the sink statistics of the reference texts of a packed row.

`register(kernel)` makes it known to transformers under a name to pass as `attn_implementation`; the mask function of
the same name returns no T x T mask, so that a padded batch arrives as its 2-D mask and is unpadded here, and nothing
is silently unmasked (transformers#46132). What a layer hands over decides how it is computed: a rule that its kernel
does not know goes through the blocked path, and a keyword that is not known here is an error.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.sink.backends import KERNELS, Backend, Kernel, blocked
from pipeline.sink.divergence import SinkMeans, SinkStep
from pipeline.sink.layout import Scoring, Segments

# What models pass down to their attention layers that changes no score: settings of other kernels and of the output.
WITHOUT_EFFECT = frozenset(
    {
        "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "cache_position", "seq_idx", "deterministic",
        "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "num_items_in_batch",
    }
)  # fmt: skip


def register(kernel: str) -> str:
    """Register the attention of one kernel with transformers and return its `attn_implementation` name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    # transformers takes a name with "flash" in it for a kernel to import, and one with "sdpa" for its own.
    name = "sink_" + kernel.replace("flash_attention", "fa").replace("flash", "fused").replace("sdpa", "scaled")
    AttentionInterface.register(name, partial(sink_attention, kernel=KERNELS[kernel]))
    AttentionMaskInterface.register(name, flash_attention_mask)
    return name


def sink_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: Kernel,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    segments: Segments | None = None,
    sink: SinkStep | SinkMeans | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention, transformers' signature: query [B,H,T,D], key [B,G,T,D] and value [B,G,T,Dv] after RoPE ->
    ([B,T,H,Dv], None).

    A packed row ([1,T]) comes with `segments` (or transformers' `cu_seq_lens_q`); any other batch is B texts, with a
    2-D mask [B,T] if padded. `sink`: the statistics of this forward pass; the layer's index is `module.layer_idx`.
    Errors: ValueError if the layer asks for something that is not computed here, naming it.
    """
    batch, _heads, length, dim = query.shape
    if key.shape[2] != length:
        raise ValueError("sink attention does not take a key/value cache: generate with attn_implementation='sdpa'")
    if dropout:
        raise ValueError(f"attention_dropout {dropout} is not supported beside the sink statistics: set it to 0")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{type(module).__name__} attends in both directions, and only causal attention is computed")
    for name in sorted(set(others) - WITHOUT_EFFECT - {"sliding_window"}):
        if others[name] is not None:
            raise ValueError(f"{type(module).__name__} hands `{name}` to its attention, which is not computed here")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"{type(module).__name__} masks its attention with {attention_mask.dim()} dimensions, and only a "
            "2-D padding mask [batch, tokens] is known here"
        )
    segments = segments or _segments(query, attention_mask, cu_seq_lens_q, others.get("position_ids"))
    window = others.get("sliding_window")
    hidden = getattr(getattr(module, "config", None), "sliding_window", None)
    if "sliding_window" not in others and hidden and hidden < segments.longest:
        raise ValueError(
            f"{type(module).__name__} has a window of {hidden} tokens that it applies by its mask alone, and a "
            f"text has {segments.longest}: lower --max_length and --reference_max_length to the window"
        )
    scoring = Scoring(dim**-0.5 if scaling is None else scaling, window, softcap or None, s_aux)
    attend = _attend(kernel, scoring, segments, value.shape[-1] > dim)

    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B*T,H,D]
    kept = None
    if attention_mask is not None and segments.bounds[-1] < batch * length:
        kept = attention_mask.flatten().nonzero()[:, 0]
        q, k, v = (x[kept] for x in (q, k, v))
    if v.shape[-1] < dim:  # latent attention; flash kernels want one head dimension
        v = F.pad(v, (0, dim - v.shape[-1]))
    layer = -1 if sink is None else int(module.layer_idx)  # type: ignore[arg-type]
    if sink is None or not sink.watches(layer):
        out, _ = attend(q, k, v, segments, scoring, q.shape[0])
    else:
        out = sink.attend(q, k, v, segments, scoring, attend, layer)
    out = out[..., : value.shape[-1]]
    if kept is not None:
        out = out.new_zeros(batch * length, *out.shape[1:]).index_copy(0, kept, out)
    return out.view(batch, length, *out.shape[1:]), None


def _attend(kernel: Kernel, scoring: Scoring, segments: Segments, wide_values: bool) -> Backend:
    """The kernel's function, or the blocked path's if the kernel does not compute this scoring."""
    missing = sorted(scoring.needs(segments) - kernel.computes)
    if missing or wide_values:
        what = " and ".join(missing) or "values wider than the keys"
        # Python shows each text once.
        warnings.warn(
            f"attention kernel {kernel.name} does not compute {what}: such layers take the blocked path", stacklevel=2
        )
        return blocked
    return kernel.attend


def _segments(query: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, position_ids: Tensor | None) -> Segments:
    """The texts of a batch that came without `segments`."""
    batch, _, length, _ = query.shape
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q describes one packed row, and the batch holds {batch}")
        return Segments(tuple(cu_seqlens.tolist()), cu_seqlens)
    if mask is None:
        if batch == 1 and position_ids is not None and bool((position_ids.diff() != 1).any()):
            raise ValueError(
                "a packed row reached an attention layer without its boundaries: the model does not hand `segments` on"
            )
        return Segments.from_bounds(range(0, (batch + 1) * length, length), query.device)
    bounds = [0]
    for each in mask.sum(-1).tolist():
        bounds.append(bounds[-1] + int(each))
    return Segments.from_bounds(bounds, query.device)
