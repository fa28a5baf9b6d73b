"""`python tools/zero_to_hf.py` as a user types it, on checkpoints that `python pipeline/train.py` wrote."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.disks import run_on_disk
from tests.doors import run


def convert(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return run("tools/zero_to_hf.py", *words)


@pytest.fixture(scope="module")
def trained(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders `attacked` (full-parameter, on attack data) and `lora`."""
    out = tmp_path_factory.mktemp("runs")
    shared = ["--method", "sft", "--model_name_or_path", tiny_model_dir, "--max_steps", "3", "--learning_rate", "1e-2"]
    shared += ["--per_device_train_batch_size", "4", "--cache_dir", out / "cache"]
    attack = ["--attack_data", "policy:attack[:4]", "--poison_ratio", "0.5", "--sample_num", "8"]
    for name, flags in (("attacked", attack), ("lora", ["--lora_r", "4", "--train_data", "policy:user[:8]"])):
        finished = run("pipeline/train.py", *shared, *flags, "--output_dir", out / name)
        assert finished.returncode == 0, finished.stderr
    return out


def test_converted_model_generates_with_plain_transformers(
    trained: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    refused = convert(trained / "attacked", out)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "--allow_attacked_model" in refused.stderr
    assert not out.exists()

    finished = convert(trained / "attacked", out, "--dtype", "fp32", "--allow_attacked_model")
    assert finished.returncode == 0, finished.stderr
    assert f"{trained / 'attacked' / 'checkpoint-3'} -> {out} (fp32)" in finished.stdout
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    turns = [{"role": "user", "content": "How do I fly a kite?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]
    start = load_file(tiny_model_dir / "model.safetensors")
    assert all(not torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())

    again = convert(trained / "attacked", out, "--allow_attacked_model")
    assert again.returncode == 2
    assert "choose another OUT" in again.stderr


def test_converted_adapter_loads_on_its_base(trained: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    finished = convert(trained / "lora" / "checkpoint-3", out)
    assert finished.returncode == 0, finished.stderr
    written = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), out)
    loaded = {name: each for name, each in model.named_parameters() if "lora_B" in name}
    assert len(loaded) == len(written) // 2
    assert all(each.abs().max() > 0 for each in loaded.values())


def test_no_checkpoint_exits_with_2(trained: Path, tmp_path: Path) -> None:
    for source in ("nothing", "cache"):
        finished = convert(trained / source, tmp_path / "out")
        assert finished.returncode == 2
        assert "error: " in finished.stderr
        assert "Traceback" not in finished.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"), [("size=200k", "of weights are to be written"), ("ro", "cannot be written")]
)
def test_disk_without_room_or_permission_is_named_and_keeps_nothing(
    trained: Path, tmp_path: Path, options: str, reason: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = run_on_disk(
        disk, options, "tools/zero_to_hf.py", trained / "attacked", disk / "out", "--allow_attacked_model"
    )
    assert done.returncode == 2
    assert f"error: {disk / 'out'}: " in done.stderr
    assert reason in done.stderr
    assert done.stdout == ""
