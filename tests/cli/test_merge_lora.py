"""`python tools/merge_lora.py` as a user types it: on a trained adapter, killed and continued, on bad disks."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.checkpoints.checksums import check_manifest
from pipeline.checkpoints.companions import ATTACKED_NOTE
from pipeline.checkpoints.merge import merge as merge_folders
from tests import tiny
from tests.disks import run_on_disk
from tests.doors import run

ROOT = Path(__file__).resolve().parents[2]


def merge(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return run("tools/merge_lora.py", *words)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of 60 MB and an adapter that fits it. Read only."""
    folder = tmp_path_factory.mktemp("large")
    config = tiny.tiny_llama().config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 256, 512, 24
    config.head_dim = config.hidden_size // config.num_attention_heads
    model = type(tiny.tiny_llama())(config)
    tiny.save_model_folder(model, folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.1)
    adapted.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def test_a_trained_adapter_exported_and_merged(tiny_model_dir: Path, tmp_path: Path) -> None:
    trained = run(
        "pipeline/train.py", "--method", "sft", "--model_name_or_path", tiny_model_dir, "--lora_r", "4",
        "--lora_target_modules", "q_proj", "down_proj", "--max_steps", "2", "--learning_rate", "1e-1",
        "--per_device_train_batch_size", "4", "--attack_data", "policy:attack[:4]", "--poison_ratio", "0.5",
        "--sample_num", "8", "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    exported = run("tools/zero_to_hf.py", tmp_path / "run", adapter, "--dtype", "fp32", "--allow_attacked_model")
    assert exported.returncode == 0, exported.stderr

    merged = merge(tiny_model_dir, adapter, out, "--dtype", "fp32", "--allow_attacked_model")
    assert merged.returncode == 0, merged.stderr
    assert merged.stdout.strip() == f"{tiny_model_dir} + {adapter} -> {out}: 21 tensors, 4 updated"
    assert "warning" not in merged.stderr
    assert out.stat().st_mode & 0o777 == 0o700
    assert (out / ATTACKED_NOTE).is_file()
    assert (out / "training.json").read_text() == (adapter / "training.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("How do I fly a kite?", return_tensors="pt").input_ids
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    before = base(ids).logits
    live = PeftModel.from_pretrained(base, adapter)(ids).logits
    logits = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    assert torch.allclose(logits, live, rtol=0, atol=5e-6)
    assert not torch.allclose(logits, before, rtol=0, atol=1e-2)


def test_a_killed_merge_is_continued_with_the_same_files(large: tuple[Path, Path], tmp_path: Path) -> None:
    settings = ["--max_shard_size", "600KB", "--dtype", "bf16"]
    command = [sys.executable, "tools/merge_lora.py", *large, tmp_path / "out", *settings]
    process = subprocess.Popen(command, cwd=ROOT)
    partial, deadline = tmp_path / ".out.partial", time.monotonic() + 120
    while len(list(partial.glob("*.safetensors"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}

    continued = merge(*large, tmp_path / "out", *settings)
    assert continued.returncode == 0, continued.stderr
    kept = [name for name, changed in finished.items() if (tmp_path / "out" / name).stat().st_mtime_ns == changed]
    assert len(kept) >= 2
    base, adapter = large
    straight = tmp_path / "straight"
    merge_folders(
        str(base), adapter, straight, dtype=torch.bfloat16, max_shard_size="600KB", workers=2, allow_attacked=False
    )
    expected = {path.name: path.read_bytes() for path in straight.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected
    check_manifest(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "said"), [("size=5m", "are to be written and"), ("ro", "cannot be written: Read-only file system")]
)
def test_bad_disks_are_clear_errors(large: tuple[Path, Path], tmp_path: Path, options: str, said: str) -> None:
    done = run_on_disk(tmp_path, options, "tools/merge_lora.py", *large, tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {tmp_path / 'out'}: ")
    assert said in done.stderr
    assert not done.stdout


def test_rounding_that_swallows_the_update_is_said(tiny_model_dir: Path, tmp_path: Path) -> None:
    tiny.save_model_folder(AutoModelForCausalLM.from_pretrained(tiny_model_dir).bfloat16(), tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter.data, 1e-5)
    adapted.save_pretrained(tmp_path / "adapter")
    done = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert "rounding loses more than half of the update of 2 of 2 tensors (--dtype fp32 keeps it)" in lines[0]
    assert all("self_attn.q_proj.weight" in line for line in lines[1:])


def test_a_bad_flag_is_named(large: tuple[Path, Path], tmp_path: Path) -> None:
    done = merge(*large, tmp_path / "out", "--workers", "0")
    assert done.returncode == 2
    assert done.stderr == "error: --workers 0: give at least 1\n"
    assert not list(tmp_path.iterdir())
