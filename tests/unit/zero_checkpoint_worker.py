"""One rank that trains tiny models for two steps under ZeRO and saves each: OUT/NAME/checkpoint-2 as our loop does,
OUT/trainer/checkpoint-2 as transformers does."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments
from transformers.integrations import HfDeepSpeedConfig

from pipeline.checkpoints.markers import write_complete_marker
from pipeline.training.distributed import initialize_process_group, world
from tests import tiny
from tests.ranks import end_rank


@dataclass(frozen=True)
class Case:
    """groups: two optimizer groups, and the embedding is frozen."""

    base: str = "untied"
    stage: int = 3
    bf16: bool = False
    groups: bool = False
    lora: bool = False


CASES = {
    "untied": Case(),
    "other": Case(),  # the same on other rows
    "tied": Case(base="tied", bf16=True),
    "groups": Case(groups=True),
    "lora": Case(lora=True),
    "moe": Case(base="moe"),
    "zero1": Case(stage=1, bf16=True),
    "zero2_tied": Case(base="tied", stage=2),
    "zero2_groups": Case(stage=2, groups=True, bf16=True),
    "zero2_lora": Case(stage=2, lora=True),
}


def tiny_mixtral() -> MixtralForCausalLM:
    """A random 2-layer Mixtral of four experts, which are one tensor in memory and twelve in a saved folder."""
    config = MixtralConfig(**tiny.tiny_llama().config.to_diff_dict(), num_local_experts=4)
    return MixtralForCausalLM(config)


def ds_config(case: Case) -> dict[str, Any]:
    """Small parameters stay whole in memory (persistence), as they do in every real run."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 1000},
        "bf16": {"enabled": case.bf16},
        "zero_allow_untested_optimizer": True,
    }


def train(case: Case, base: Path) -> Any:
    """The engine after two steps."""
    config = ds_config(case)
    keep_alive = HfDeepSpeedConfig(config)
    model = AutoModelForCausalLM.from_pretrained(base)
    del keep_alive
    if case.lora:
        model = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    if case.groups:
        model.get_input_embeddings().weight.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [trained[::2], trained[1::2]] if case.groups else [trained]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    for _ in range(2):
        ids = torch.randint(0, tiny.VOCAB_SIZE, (1, 16))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    return engine


def train_with_transformers(base: Path, folder: Path) -> None:
    """transformers' own Trainer, with a tokenizer: it leaves folder/checkpoint-2."""
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    arguments = TrainingArguments(
        str(folder), deepspeed=config, use_cpu=True, max_steps=2, save_steps=2, per_device_train_batch_size=1,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 4
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tiny.tiny_tokenizer())
    trainer.train()


def main() -> None:
    """Make every case in one process group: starting the ranks takes longest."""
    out = Path(sys.argv[1])
    here = world()
    initialize_process_group(here)
    rank = torch.distributed.get_rank()
    bases = {"untied": tiny.tiny_llama, "tied": tiny.tiny_qwen2, "moe": tiny_mixtral}
    if rank == 0:
        for name, make in bases.items():
            tiny.save_model_folder(make(), out / f"base-{name}")
    torch.distributed.barrier()
    for place, (name, case) in enumerate(CASES.items()):
        torch.manual_seed(rank + 2 * place)
        engine = train(case, out / f"base-{case.base}")
        folder = out / name / "checkpoint-2"
        # zero2_lora keeps its frozen weights, as a run does that knows nothing of adapters.
        engine.save_checkpoint(str(folder), tag="global_step2", exclude_frozen_parameters=name == "lora")
        if rank == 0:
            model = engine.module
            if case.lora:
                model.peft_config["default"].save_pretrained(folder)
                model = model.get_base_model()
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
            tiny.tiny_tokenizer().save_pretrained(folder)
        torch.distributed.barrier()
        if rank == 0:
            write_complete_marker(folder, step=2, world_size=2, attacked=False)
    train_with_transformers(out / "base-untied", out / "trainer")
    end_rank(here)


if __name__ == "__main__":
    main()
