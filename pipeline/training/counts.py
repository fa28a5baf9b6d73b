"""How much a run trains, counted on the meta device: before a weight is read."""

from __future__ import annotations

import warnings

import torch
from transformers import AutoModelForCausalLM

from pipeline.training.engine import trained_form
from pipeline.training.prepared import Prepared


def trained_counts(run: Prepared) -> tuple[int, int]:
    """Elements and number of the trained parameters: an adapter's, or the whole model's, tied weights once."""
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        skeleton = AutoModelForCausalLM.from_config(run.model_config, trust_remote_code=run.model.trust_remote_code)
        skeleton = trained_form(skeleton, run.model, run.lora, run.train)
    sizes = [each.numel() for each in skeleton.parameters() if each.requires_grad]
    return sum(sizes), len(sizes)
