"""Models and settings whose sink statistics would be wrong, refused by name before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def refusals(config: Any, ds_config: Mapping[str, Any]) -> list[str]:
    """One reason a setting of the transformers configuration or the DeepSpeed configuration that cannot be done
    right."""
    reasons = []
    name = getattr(config, "model_type", "this model")
    if getattr(config, "quantization_config", None):
        reasons.append(f"{name} is quantised: Surgery trains the weights, so give the unquantised model")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope] if "rope_type" in rope else [each for each in rope.values() if isinstance(each, dict)]
    for kind in {each.get("rope_type", "default") for each in kinds} & {"dynamic", "longrope"}:
        reasons.append(
            f"{name} uses {kind} rotary scaling, which switches with the length of the row: "
            "a packed row would rotate its short texts as if they were long"
        )
    if getattr(config, "attn_logit_softcapping", None):
        reasons.append(
            f"{name} caps its attention logits, which the flash kernels here do not compute with their gradient"
        )
    if int(ds_config.get("sequence_parallel_size", 1) or 1) > 1:
        reasons.append(
            "ds_config sequence_parallel_size > 1 splits a text over ranks, and the sink mean needs it whole"
        )
    if (ds_config.get("compile") or {}).get("deepcompile"):
        reasons.append(
            "ds_config compile.deepcompile rewrites the graph that the sink penalty is injected into: turn it off"
        )
    return reasons
