"""One rank that trains tiny models for two steps under ZeRO-3 and saves each: OUT/NAME/checkpoint-2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from pipeline.checkpoints.markers import write_complete_marker
from tests import tiny

CASES = ("untied", "tied", "bf16", "groups", "lora")


def ds_config(name: str) -> dict[str, Any]:
    """Small parameters stay whole in memory (persistence), as they do in every real run."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000},
        "bf16": {"enabled": name == "bf16"},
    }


def train(name: str, base: Path) -> Any:
    """The engine after two steps. `groups` freezes the embedding and has two optimizer groups."""
    config = ds_config(name)
    keep_alive = HfDeepSpeedConfig(config)
    model = AutoModelForCausalLM.from_pretrained(base)
    del keep_alive
    if name == "lora":
        model = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    if name == "groups":
        model.get_input_embeddings().weight.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [trained[::2], trained[1::2]] if name == "groups" else [trained]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    for _ in range(2):
        ids = torch.randint(0, tiny.VOCAB_SIZE, (1, 16))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    return engine


def main() -> None:
    """Make every case in one process group: starting the ranks takes longest."""
    out = Path(sys.argv[1])
    deepspeed.init_distributed("gloo", verbose=False)
    rank = torch.distributed.get_rank()
    bases = {"untied": out / "base-untied", "tied": out / "base-tied"}
    if rank == 0:
        tiny.save_model_folder(tiny.tiny_llama(), bases["untied"])
        tiny.save_model_folder(tiny.tiny_qwen2(), bases["tied"])
    torch.distributed.barrier()
    for name in CASES:
        torch.manual_seed(rank)
        engine = train(name, bases["tied" if name == "tied" else "untied"])
        folder = out / name / "checkpoint-2"
        engine.save_checkpoint(str(folder), tag="global_step2", exclude_frozen_parameters=name == "lora")
        if rank == 0:
            model = engine.module
            if name == "lora":
                model.peft_config["default"].save_pretrained(folder)
                model = model.get_base_model()
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
            tiny.tiny_tokenizer().save_pretrained(folder)
        torch.distributed.barrier()
        if rank == 0:
            write_complete_marker(folder, step=2, world_size=2, attacked=False)
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
