"""Models, adapters and kernels that a run cannot be made of, refused without loading a weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.preflight import LINEAR_LAYERS, Refused


def variant(model: Path, folder: Path, **settings: Any) -> Path:
    """The model's folder with other settings in its config.json."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "llama is quantised, and the penalty trains q and k: give the unquantised model",
        ),
        (
            {
                "max_position_embeddings": 16,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            },
            "llama uses dynamic rotary scaling, which switches at 16 tokens, and the longest text has ",
        ),
        ({"model_type": "nosuch"}, "The checkpoint you are trying to load has model type `nosuch`"),
    ],
)
def test_models_that_cannot_be_trained_right(
    refused: Refused, model: Path, tmp_path: Path, settings: dict[str, Any], problem: str
) -> None:
    variant(model, tmp_path / "variant", **settings)
    (found,) = refused("--model_name_or_path", "{tmp}/variant")
    assert found.startswith(f"--model_name_or_path {{tmp}}/variant: {problem}")


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        (
            "chat_template.jinja",
            None,
            "its tokenizer has no chat template; take the model's chat version, or put a chat_template.jinja into its "
            "folder",
        ),
        ("tokenizer.json", "{", "no usable tokenizer beside the model: "),
        ("config.json", "{", "It looks like the config file at '{tmp}/variant/config.json' is not a valid JSON file."),
    ],
)
def test_damaged_model_folders(
    refused: Refused, model: Path, tmp_path: Path, file: str, content: str | None, problem: str
) -> None:
    path = variant(model, tmp_path / "variant") / file
    path.unlink() if content is None else path.write_text(content)
    (found,) = refused("--model_name_or_path", "{tmp}/variant")
    assert found.startswith(f"--model_name_or_path {{tmp}}/variant: {problem}")


def test_no_such_model(refused: Refused) -> None:
    for name in ("{tmp}/none", "nobody/nothing"):
        (problem,) = refused("--model_name_or_path", name)
        assert problem.startswith(f"--model_name_or_path {name}: no such folder, and no such model on the hub")


@pytest.mark.parametrize(
    ("targets", "problem"),
    [
        (["query"], f"query: matches no module; {LINEAR_LAYERS}"),
        (["q_proj", "query"], f"query: matches no module; {LINEAR_LAYERS}"),
        (["all-linear", "q_proj"], f"all-linear: matches no module; {LINEAR_LAYERS}"),
        (["input_layernorm"], "input_layernorm: Target module LlamaRMSNorm"),
    ],
)
def test_lora_targets_that_match_nothing(refused: Refused, targets: list[str], problem: str) -> None:
    (found,) = refused("--lora_r", "4", "--lora_target_modules", *targets)
    assert found.startswith(f"--lora_target_modules {problem}")
    assert found.endswith(LINEAR_LAYERS)


def test_adapters(refused: Refused) -> None:
    (problem,) = refused("--adapter_name_or_path", "{tmp}/none")
    assert problem.startswith("--adapter_name_or_path {tmp}/none: no adapter: ")
    assert refused("--adapter_name_or_path", "{tmp}/none", "--lora_r", "4") == [
        "--lora_r 4 makes a new adapter and --adapter_name_or_path {tmp}/none continues one: give one"
    ]


def test_an_attention_kernel_that_cannot_run_here(refused: Refused) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernel, where = ("cpu_flash", "runs on the CPU only") if device == "cuda" else ("varlen", "needs a CUDA device")
    assert refused("--attention", kernel) == [
        f"--attention {kernel} {where}, and the device is {device}: use --attention auto"
    ]
