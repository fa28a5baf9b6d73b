"""From a prepared run to a DeepSpeed engine: the model loaded shard by shard, adapters, optimizer, schedule."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.config import LoraArguments, ModelArguments, TrainArguments
from pipeline.sink import attention, backends
from pipeline.training import zero3
from pipeline.training.adapters import lora_config
from pipeline.training.losses import TokenLoss
from pipeline.training.prepared import Prepared
from pipeline.training.settings import checkpointing_kwargs

# Norm weights and biases take no weight decay, as in transformers' Trainer.
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


@dataclass
class Engine:
    """The DeepSpeed engine and what belongs to it."""

    deepspeed: Any
    token_loss: TokenLoss
    device: torch.device
    attention: str  # backend and why, for the start-up summary
    parameters: int
    trainable: int
    zero3_config: Any  # transformers loads shard by shard only while this object lives


def build_engine(run: Prepared, device: torch.device) -> Engine:
    """Load the model under ZeRO-3 and initialise DeepSpeed. Errors: ValueError for an attention backend that cannot
    run here."""
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    backend, reason = backends.choose(run.train.attention, device.type, half=bool(run.train.bf16))
    zero3_config = HfDeepSpeedConfig(run.ds_config)
    model = load_model(run, attention.register(backend))
    parameters = list(model.named_parameters())
    trainable = [(name, each) for name, each in parameters if each.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=None if "optimizer" not in run.ds_config else [each for _, each in trainable],
        optimizer=None if "optimizer" in run.ds_config else _optimizer(run, trainable),
        lr_scheduler=_scheduler(run),
        config=run.ds_config,
    )
    return Engine(
        deepspeed=engine,
        token_loss=TokenLoss(model),
        device=device,
        attention=f"{backend} ({reason})",
        parameters=sum(zero3.size(each) for _, each in parameters),
        trainable=sum(zero3.size(each) for _, each in trainable),
        zero3_config=zero3_config,
    )


def load_model(run: Prepared, attn_implementation: str) -> Any:
    """The model in training mode, with its adapter if asked for, its parameters already sharded over the ranks."""
    from transformers import AutoModelForCausalLM

    # Before the process-wide generators are touched by weight loading, so that adapters start the same on any number
    # of ranks.
    torch.manual_seed(run.train.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(
        run.model_path,
        dtype=torch.bfloat16 if run.train.bf16 else torch.float32,
        attn_implementation=attn_implementation,
        trust_remote_code=run.model.trust_remote_code,
    )
    return trained_form(model, run.model, run.lora, run.train)


def trained_form(model: Any, source: ModelArguments, lora: LoraArguments, train: TrainArguments) -> Any:
    """A loaded model in training mode, with its adapter and its checkpointing if asked for."""
    if lora.lora_r:
        from peft import get_peft_model

        # The optimizer holds the fp32 masters, so the adapter itself has the base model's dtype.
        model = get_peft_model(model, lora_config(lora), autocast_adapter_dtype=False)
    elif source.adapter_name_or_path:
        from peft import PeftModel

        model = PeftModel.from_pretrained(
            model, source.adapter_name_or_path, is_trainable=True, autocast_adapter_dtype=False
        )
    if train.gradient_checkpointing:
        model.activation_checkpointing_enable(checkpointing_kwargs(train))
        if lora.lora_r or source.adapter_name_or_path:
            model.enable_input_require_grads()  # else the first layer's checkpoint sees no input that needs a gradient
    return model.train()


def _optimizer(run: Prepared, trainable: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    train = run.train
    decayed = [each for name, each in trainable if not NO_DECAY.search(name)]
    plain = [each for name, each in trainable if NO_DECAY.search(name)]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=train.optim == "adamw_torch_fused",
    )


def warmup_steps(run: Prepared) -> int:
    """--warmup_steps as a number of steps; below 1 it is a share of all."""
    asked = run.train.warmup_steps
    return round(asked * run.steps) if 0 < asked < 1 else int(asked)


def _scheduler(run: Prepared) -> Callable[[torch.optim.Optimizer], Any]:
    from transformers import get_scheduler

    def build(optimizer: torch.optim.Optimizer) -> Any:
        return get_scheduler(
            run.train.lr_scheduler_type, optimizer, num_warmup_steps=warmup_steps(run), num_training_steps=run.steps
        )

    return build
