"""How much a run trains, counted on the meta device: before a weight is read."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pipeline.training.engine import trained_form
from pipeline.training.prepared import Prepared


def skeleton(run: Prepared) -> Any:
    """The model as it is trained, without weights."""
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        model = AutoModelForCausalLM.from_config(run.model_config, trust_remote_code=run.model.trust_remote_code)
        return trained_form(model, run.model, run.lora, run.train)


def trained_counts(model: Any) -> tuple[int, int]:
    """Elements and number of the trained parameters: an adapter's, or the whole model's, tied weights once."""
    sizes = [each.numel() for each in model.parameters() if each.requires_grad]
    return sum(sizes), len(sizes)
