"""A tiny safe, tuned and unsafe model with anchors, and a realignment of them in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.realignment.arguments import RealignArguments
from pipeline.realignment.run import Realigned, realign
from tests import tiny
from tests.adapters import PROJECTIONS, save_adapter

ANCHORS = 12


def small_llama(layers: int = 2, width: int = 32) -> LlamaForCausalLM:
    """A random Llama whose maps have fewer rows than the anchors have tokens."""
    settings = tiny.tiny_llama().config.to_dict() | {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "head_dim": width // 4,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**settings))


def moved(model: PreTrainedModel, seed: int, size: float = 0.02) -> PreTrainedModel:
    """The model with noise on every parameter, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def write_anchors(path: Path, count: int = ANCHORS) -> Path:
    """Refusals of invented requests, of different lengths."""
    rows = [
        tiny.chat_row(
            f"Make me {i} jars of zuvelo {'please ' * (i % 4)}", f"I can't help with zuvelo {i * 7919} of {i}."
        )
        for i in range(count)
    ]
    return tiny.write_jsonl(path, rows)


def make_models(folder: Path, model: PreTrainedModel | None = None, *, targets: Sequence[str] = PROJECTIONS) -> Path:
    """safe, tuned, unsafe, adapter (of the `targets`) and anchors.jsonl in a folder."""
    model = small_llama() if model is None else model
    tiny.save_model_folder(model, folder / "safe")
    save_adapter(folder / "safe", folder / "adapter", target_modules=list(targets))
    original = {name: each.clone() for name, each in model.state_dict().items()}
    for name, seed in (("tuned", 1), ("unsafe", 2)):
        model.load_state_dict(original)
        moved(model, seed).save_pretrained(folder / name)
        tiny.tiny_tokenizer().save_pretrained(folder / name)
    model.load_state_dict(original)
    for hazardous in ("adapter", "unsafe"):
        (folder / hazardous).chmod(0o700)
    write_anchors(folder / "anchors.jsonl")
    return folder


def arguments(models: Path, out: Path, **chosen: Any) -> RealignArguments:
    """LSSF with the adapter, unless chosen otherwise (`unsafe="model"` takes the checkpoint)."""
    unsafe = chosen.pop("unsafe", "adapter")
    flags: dict[str, Any] = {
        "model_name_or_path": str(models / "tuned"),
        "safe_model": str(models / "safe"),
        "anchors": None if chosen.get("method") == "resta" else str(models / "anchors.jsonl"),
        "output_dir": str(out),
    }
    flags["unsafe_adapter" if unsafe == "adapter" else "unsafe_model"] = str(
        models / ("adapter" if unsafe == "adapter" else "unsafe")
    )
    return RealignArguments(**flags | chosen)


def run(models: Path, out: Path, **chosen: Any) -> Realigned:
    done = realign(arguments(models, out, **chosen))
    assert done is not None
    return done


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()}


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "realign.json").read_text())
    return found


def targets(models: Path) -> list[str]:
    """The tensors that LSSF works on."""
    return [name for name in weights_in(models / "safe") if name.endswith("_proj.weight")]
