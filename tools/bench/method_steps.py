"""The runs that the methods' benchmark compares, and their figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.config import DataArguments, LoraArguments, ModelArguments, TrainArguments, parse
from pipeline.methods import METHODS, load_method
from pipeline.training.distributed import World
from pipeline.training.engine import build_engine
from pipeline.training.preflight import prepare
from pipeline.training.prepared import Prepared
from pipeline.training.zero3 import Shards
from tools.bench.layouts import model_config, words_of, write_rows
from tools.bench.memory import live_bytes
from tools.bench.product_step import ProductStep
from tools.bench.timing import Seconds, interleave, ratio


def measure(
    arguments: Any, model: str, bf16: bool, folder: Path, here: World, device: torch.device
) -> dict[str, dict[str, Any]]:
    """For every method: seconds of its steps and passes, their ratios to SFT's, peak and kept bytes."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    runs = resolve(arguments, model, bf16, folder, here)
    # Surgery's engine has the attention that can measure sinks; to all others it is the kernel alone.
    engine = build_engine(runs["surgery"], device)
    unset_hf_deepspeed_config()
    steps = {name: ProductStep.of(run, engine) for name, run in runs.items()}
    steps["sft"]()  # what the first step allocates for good is nobody's
    memory = {}
    for name, step in steps.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        before = live_bytes(device)
        runs[name].method.begin(Shards(engine.deepspeed))
        step()
        kept = live_bytes(device) - before
        step.at = 1  # T-Vaccine scores its layers at step 0, which it does every 200 steps
        memory[name] = {"peak_bytes": step.peak(), "kept_bytes": kept}
    seconds = interleave(steps, arguments.repeats)
    engine.deepspeed.destroy()
    return {
        name: {
            "seconds": {kind: [getattr(s, kind) for s in each] for kind in Seconds._fields},
            "ratio": {
                kind: ratio([getattr(s, kind) for s in each], [getattr(s, kind) for s in seconds["sft"]])._asdict()
                for kind in Seconds._fields
            },
            **memory[name],
        }
        for name, each in seconds.items()
    }


def resolve(arguments: Any, model: str, bf16: bool, folder: Path, here: World) -> dict[str, Prepared]:
    """Every method's run over rows of one length, SFT first, nothing loaded yet.

    Errors: ValueError where the product refuses the settings.
    """
    words = words_of(model, arguments.tokens)
    layers = model_config(model).get_text_config().num_hidden_layers
    found = {}
    for name in METHODS:
        method = load_method(name)
        pools = ("train", *method.pools)
        for pool in pools:
            # Rows of a paired pool answer the prompts of the training rows.
            prompts = "train" if pool == method.paired else pool
            write_rows(folder / f"{name}-{pool}.jsonl", (prompts, pool), arguments.texts, arguments.tokens, words)
        # A learning rate of 0 costs what any other does, and leaves the same weights to every step.
        flags = {
            "method": name, "model_name_or_path": model, "ds_config": arguments.ds_config, "bf16": bf16,
            "attention": arguments.attention, "max_steps": 2, "learning_rate": 0, "lora_r": arguments.lora_r,
            "output_dir": folder / f"{name}-run", "cache_dir": folder / "cache", "max_length": arguments.tokens,
            "per_device_train_batch_size": arguments.texts,
            **{f"{pool}_data": folder / f"{name}-{pool}.jsonl" for pool in pools},
            **({"lora_target_modules": "all-linear"} if arguments.lora_r else {}),
            **_fitted(name, arguments.inner_steps, layers),
        }  # fmt: skip
        parsed = parse(
            [ModelArguments, DataArguments, LoraArguments, TrainArguments, method.Config],
            [word for flag, value in flags.items() for word in (f"--{flag}", str(value))],
            description="benchmark",
        )
        found[name] = prepare(parsed, name, method(parsed[method.Config]), here)
    return found


def _fitted(method: str, inner_steps: int, layers: int) -> dict[str, int]:
    """Settings that are not a method's defaults: of TAR's inner loop, and of T-Vaccine on a small model."""
    if method == "tar":
        return {"inner_steps": inner_steps, "tamper_every": min(4, inner_steps)}
    return {"perturbed_layers": min(8, layers)} if method == "t_vaccine" else {}
