"""Low-rank adapters: the flags as a PEFT configuration, held against the model before its weights are loaded."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pipeline.config import LoraArguments, ModelArguments


def check_adapter(config: Any, lora: LoraArguments, model: ModelArguments) -> None:
    """Errors: ValueError if LoRA and an adapter are both asked for, if there is no such adapter, or if a target module
    matches nothing in the model."""
    adapter = model.adapter_name_or_path
    if lora.lora_r and adapter:
        raise ValueError(
            f"--lora_r {lora.lora_r} makes a new adapter and --adapter_name_or_path {adapter} continues one: give one"
        )
    if adapter:
        try:
            PeftConfig.from_pretrained(adapter)
        except (OSError, ValueError) as error:
            raise ValueError(f"--adapter_name_or_path {adapter}: no adapter: {str(error).splitlines()[0]}") from error
    if lora.lora_r <= 0:
        return
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    modules = dict(skeleton.named_modules())
    leaves = sorted({name.rsplit(".", 1)[-1] for name, each in modules.items() if isinstance(each, torch.nn.Linear)})
    has = f"this model has {', '.join(leaves)}, or give all-linear alone"
    targets = [] if lora.lora_target_modules == ["all-linear"] else lora.lora_target_modules
    # PEFT is content if any one of them matches.
    if unmatched := [each for each in targets if not any(f".{name}".endswith(f".{each}") for name in modules)]:
        raise ValueError(f"--lora_target_modules {' '.join(unmatched)}: matches no module; {has}")
    with warnings.catch_warnings(action="ignore"):
        try:
            get_peft_model(skeleton, lora_config(replace(lora, lora_r=1, lora_dropout=0.0)))
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--lora_target_modules {' '.join(lora.lora_target_modules)}: {reason}; {has}") from error


def lora_config(lora: LoraArguments) -> Any:
    """The PEFT configuration of the flags."""
    targets: Any = lora.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM", r=lora.lora_r, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )  # fmt: skip
