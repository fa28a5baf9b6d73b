"""A model whose weights are sharded over the ranks, for forward passes alone (ZeRO-3 without an optimizer)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from pipeline.config import TrainArguments
from pipeline.training.distributed import World
from pipeline.training.ds_config import load_ds_config, resolve_ds_config

# What a DeepSpeed file says about training; the dtype of inference is the caller's.
TRAINING_KEYS = (
    "optimizer", "bf16", "gradient_clipping", "gradient_accumulation_steps", "train_batch_size",
    "train_micro_batch_size_per_gpu",
)  # fmt: skip


def inference_config(path: str, *, hidden_size: int, bf16: bool, here: World) -> dict[str, Any]:
    """The DeepSpeed file at `path` without what it says about training, its "auto" values filled.

    Errors: Problems, as training has them, and ValueError for a ZeRO stage other than 3.
    """
    config = load_ds_config(path)
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage != 3:
        raise ValueError(f"--ds_config {path}: zero_optimization.stage is {stage}, and weights are sharded by stage 3")
    config = {key: value for key, value in config.items() if key not in TRAINING_KEYS}
    config["zero_optimization"] = {
        key: value for key, value in config["zero_optimization"].items() if key != "offload_optimizer"
    }
    flags = asdict(TrainArguments(per_device_train_batch_size=1, bf16=bf16))
    resolved, _ = resolve_ds_config(config, {**flags, "world_size": here.size, "hidden_size": hidden_size}, set())
    return resolved


def sharded(load: Callable[[], Any], config: dict[str, Any]) -> Any:
    """The DeepSpeed engine of the model that `load` reads, in evaluation mode; call it like the model, and `destroy()`
    it before the next. Collective."""
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    alive = HfDeepSpeedConfig(config)  # transformers loads shard by shard while this object lives
    model = load()
    del alive
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


def on_main(here: World, action: Callable[[], None]) -> None:
    """Run `action` on rank 0 while the others wait. Errors: its ValueError, on every rank."""
    problem: list[str | None] = [None]
    if here.main:
        try:
            action()
        except ValueError as error:
            problem = [str(error)]
    if here.size > 1:
        dist.broadcast_object_list(problem)
    if problem[0] is not None:
        raise ValueError(problem[0])
