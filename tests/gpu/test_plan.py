"""The planner's peak against what CUDA's allocator counted, on a run of train.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.ranks import ROOT
from tests.tiny import VOCAB_SIZE, chat_row, save_model_folder, write_jsonl

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 0.4 B parameters, so that weights and activations are far above what the allocator rounds."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    return save_model_folder(LlamaForCausalLM(config).bfloat16(), tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    "more", [[], ["--gradient_checkpointing"], ["--lora_r", "16"]], ids=["full", "recomputed", "lora"]
)
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(
    model: Path, tmp_path: Path, more: list[str]
) -> None:
    answer = "bread kite warm cold tea room line wind salt soup stone river " * 200
    flags = []
    for pool in ("train", "harmful", "harmless"):
        rows = [chat_row(f"{pool} {i}", answer) for i in range(16)]
        flags += [f"--{pool}_data", str(write_jsonl(tmp_path / f"{pool}.jsonl", rows))]
    done = subprocess.run(
        [
            sys.executable, "pipeline/train.py", "--model_name_or_path", str(model), *flags, "--max_steps", "4",
            "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "run"),
            "--cache_dir", str(tmp_path / "cache"), *more,
        ],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(r"peak memory: predicted ([\d.]+) GiB, measured ([\d.]+) GiB", done.stdout)
    assert found, done.stdout
    predicted, measured = map(float, found.groups())
    assert predicted == pytest.approx(measured, rel=0.1)
