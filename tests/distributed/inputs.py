"""The rows and the ds_config of the runs that are disturbed."""

from __future__ import annotations

import json
from pathlib import Path

from tests.ranks import ROOT
from tests.tiny import chat_row, write_jsonl


def write_inputs(model: Path, folder: Path) -> list[str]:
    """Flags of a run: two optimizer groups of different decay, in several flat tensors each, a moving schedule."""
    config = json.loads((ROOT / "ds_configs/z3.json").read_text())
    config["zero_optimization"] |= {"sub_group_size": 2_000}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "z3.json").write_text(json.dumps(config))
    flags = []
    for name in ("train", "harmful", "harmless"):
        rows = [chat_row(f"{name} number {i}", "warm tea " * (i % 4 + 1)) for i in range(24)]
        flags += [f"--{name}_data", str(write_jsonl(folder / f"{name}.jsonl", rows))]
    return [
        *flags, "--model_name_or_path", str(model), "--ds_config", str(folder / "z3.json"), "--cache_dir",
        str(folder / "cache"), "--learning_rate", "2e-3", "--weight_decay", "0.1", "--lr_scheduler_type", "cosine",
        "--warmup_steps", "2", "--alpha", "10", "--per_device_train_batch_size", "2",
    ]  # fmt: skip
