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
    if getattr(config, "attn_logit_softcapping", None):
        reasons.append(f"{name} caps its attention logits, which the flash kernels here do not compute")
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    slides = "sliding_attention" in layers if layers else getattr(config, "use_sliding_window", True)
    if window and slides and window < longest:
        reasons.append(
            f"{name} has a sliding window of {window} tokens, and the longest text has {longest}: "
            "lower --max_length and --reference_max_length to the window"
        )
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        switch = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if kind in ("dynamic", "longrope") and longest > switch:
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


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """The rotary settings of a model: one, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [each for each in rope.values() if isinstance(each, dict)]
