"""Models and settings that would train wrongly here, refused by name before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def attention_refusals(config: Any, longest: int) -> list[str]:
    """What the attention kernels and the packed rows cannot do right for this model, whatever the method.

    config: the transformers configuration of the (text) model; longest: tokens of the longest text.
    """
    reasons = []
    name = config.model_type
    cls: Any = _model_class(config)
    if getattr(config, "is_encoder_decoder", False):
        reasons.append(f"{name} is an encoder-decoder, and only causal language models are trained here")
    elif cls is not None and not getattr(cls, "_supports_attention_backend", False):
        reasons.append(f"{name} does not compute its attention through transformers' attention interface")
    elif cls is not None and not getattr(cls, "_supports_flash_attn", False):
        # transformers says so of models whose masks a kernel is not told about.
        reasons.append(f"{name} masks its attention in a way that flash kernels are not told about")
    if getattr(cls, "_is_stateful", False):
        reasons.append(f"{name} has recurrent layers, whose state would run on from text to text of a packed row")
    if getattr(config, "use_bidirectional_attention", False) in (True, "all"):
        reasons.append(f"{name} attends in both directions (use_bidirectional_attention)")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        reasons.append(
            f"{name} has layers of {', '.join(sorted(kinds))}, which would mix the texts of a packed row and have no "
            "attention sink"
        )
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        if kind not in ("dynamic", "longrope"):
            continue
        switch = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if longest > switch:
            reasons.append(
                f"{name} uses {kind} rotary scaling, which switches at {switch} tokens, and the longest text has "
                f"{longest}: a packed row would rotate its short texts as if they were long; lower --max_length"
            )
    return reasons


def sink_refusals(config: Any, ds_config: Mapping[str, Any]) -> list[str]:
    """Why sink statistics would be wrong with this model or DeepSpeed configuration; empty if they are right."""
    reasons = []
    if getattr(config, "quantization_config", None):
        reasons.append(f"{config.model_type} is quantised, and the penalty trains q and k: give the unquantised model")
    if int(ds_config.get("sequence_parallel_size", 1) or 1) > 1:
        reasons.append(
            "ds_config sequence_parallel_size > 1 splits a text over ranks, and the sink mean needs it whole"
        )
    if (ds_config.get("compile") or {}).get("deepcompile"):
        reasons.append(
            "ds_config compile.deepcompile rewrites the graph that the sink penalty is injected into: turn it off"
        )
    return reasons


def _model_class(config: Any) -> type | None:
    """The causal language model of a configuration; None for code that comes with a model."""
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """The rotary settings of a model: one, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [each for each in rope.values() if isinstance(each, dict)]
