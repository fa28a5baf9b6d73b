"""LoRA adapters with random weights, and merging them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pipeline.checkpoints.merge import Merged, merge

OPTIONS: dict[str, Any] = {"dtype": None, "max_shard_size": "5GB", "workers": 1, "allow_attacked": False}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(
    base: Path, folder: Path, *, size: float = 0.05, dtype: torch.dtype = torch.float32, **chosen: Any
) -> Path:
    """An adapter of `base` with random weights of this standard deviation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        chosen = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"} | chosen
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**chosen))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter.data, std=size)
        model.to(dtype).save_pretrained(folder)
    return folder


def merge_into(base: Path, adapter: Path, out: Path, dtype: torch.dtype | None = None, **chosen: Any) -> Merged:
    return merge(str(base), adapter, out, **OPTIONS | {"dtype": dtype} | chosen)
