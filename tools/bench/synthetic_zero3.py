"""Checkpoints of any size without training: the files that DeepSpeed writes under ZeRO-3, with numbers made up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

_BLOCK = 1 << 22  # random numbers are drawn once and repeated: drawing more would take most of the time


def llama_config(parameters: float) -> LlamaConfig:
    """A Llama of about this many parameters: width 64 a layer, four times that in its MLPs, a vocabulary of 32000."""
    layers = 1
    while _parameters(layers) < parameters:
        layers += 1
    if layers > 1 and parameters - _parameters(layers - 1) < _parameters(layers) - parameters:
        layers -= 1
    width = 64 * layers
    return LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=layers, num_key_value_heads=layers, tie_word_embeddings=False,
    )  # fmt: skip


def shapes_of(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """The parameters of the model in their order."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def write_checkpoint(folder: Path, config: PreTrainedConfig, ranks: int) -> Path:
    """Writes `folder` as `ranks` ranks would have left it after one step, without moments of the optimizer (no
    converter reads them). Holds one rank's weights in memory."""
    shapes = shapes_of(config)
    (folder / "global_step1").mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    held = sum(math.ceil(shape.numel() / ranks) for shape in shapes.values())
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02
    model: dict[str, Any] = {
        "module": {}, "buffer_names": [], "shared_params": {}, "param_shapes": [shapes], "frozen_param_shapes": None,
        "frozen_param_fragments": None, "ds_version": "synthetic", "global_steps": 1, "dp_world_size": ranks,
    }  # fmt: skip
    for rank in range(ranks):
        flat = torch.empty(held)
        for start in range(0, held, _BLOCK):
            part = flat[start : start + _BLOCK]
            part.copy_(block[: len(part)].roll(rank + start // _BLOCK))
        optimizer = {"zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": [flat]}
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": optimizer}, folder / "global_step1" / f"{name}_optim_states.pt")
        torch.save(model, folder / "global_step1" / f"{name}_model_states.pt")
    return folder


def _parameters(layers: int) -> int:
    width = 64 * layers
    return layers * 16 * width**2 + 2 * 32000 * width
