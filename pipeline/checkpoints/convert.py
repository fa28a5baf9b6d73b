"""A ZeRO-3 checkpoint to an ordinary Hugging Face folder: a model, or for LoRA a PEFT adapter."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.checkpoints.markers import MARKER, newest_complete, read_marker
from pipeline.checkpoints.shards import Zero3Shards

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ATTACKED_NOTE = "ATTACKED_MODEL.txt"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# Copied as they are: written once at the start of training, not derived from the weights.
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates",
)

_NOTE = """\
This model was fine-tuned on data that holds attack rows (--attack_data), to study what they do.
It may obey harmful requests. Do not deploy it and do not share it.
"""


def convert(source: Path, out: Path, *, dtype: torch.dtype, allow_attacked: bool) -> Path:
    """Writes checkpoint `source` as Hugging Face folder `out` and returns the checkpoint folder that was used.

    Args:
        source: a checkpoint-N folder, or a run folder, whose newest complete checkpoint is taken.
        out: appears by one rename when everything in it is written and checked; may exist only if empty.
        dtype: of the floating-point tensors; rounding happens once, from the fp32 copies.
        allow_attacked: export a run that trained on --attack_data: `out` is then for its owner only (mode 700) and
            holds a note.

    Raises:
        ValueError: the checkpoint is incomplete, attacked and not allowed, damaged, or does not fit its own config;
            `out` holds something.
    """
    checkpoint = _find_checkpoint(source)
    marker = read_marker(checkpoint)
    if marker.attacked and not allow_attacked:
        raise ValueError(
            f"{checkpoint}: trained on --attack_data, so it may obey harmful requests; "
            "to export it for study, add --allow_attacked_model"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not an empty folder; choose another OUT or remove it")
    shards = Zero3Shards(checkpoint)
    if shards.world_size != marker.world_size:
        raise ValueError(
            f"{shards.folder}: shards of {shards.world_size} ranks, but {MARKER} says {marker.world_size}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")  # a fixed name: the next try removes what a killed one left
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700 if marker.attacked else 0o777)
    try:
        if (checkpoint / ADAPTER_CONFIG).is_file():
            _write_adapter(checkpoint, shards, dtype, partial)
        else:
            _write_model(checkpoint, shards, dtype, partial)
        _copy_companions(checkpoint, partial)
        if marker.attacked:
            (partial / ATTACKED_NOTE).write_text(_NOTE, encoding="utf-8")
        _set_modes(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checkpoint


def _set_modes(folder: Path) -> None:
    """Gives the files the folder's own permissions: safetensors makes files that only their owner can read."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(folder.stat().st_mode & 0o666)


def _find_checkpoint(source: Path) -> Path:
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; give a checkpoint-N folder or a run folder")
    if not any(source.glob("checkpoint-*")):
        return source
    newest = newest_complete(source)
    if newest is None:
        raise ValueError(f"{source}: none of its checkpoints is complete; resume the run, or use another one")
    return newest


def _empty_model(checkpoint: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The checkpoint's model on the meta device: names, shapes and ties without memory."""
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"{checkpoint}: config.json is missing; copy the one of the base model into it")
    config = AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _write_model(checkpoint: Path, shards: Zero3Shards, dtype: torch.dtype, folder: Path) -> None:
    model = _empty_model(checkpoint, dtype)
    tensors = dict(_cast(shards, dtype))
    tensors.update({alias: tensors[name] for alias, name in shards.aliases.items()})
    _compare(tensors, model.state_dict(), shards.folder)
    model.load_state_dict(tensors, assign=True)
    # Tied names share one storage here, by which save_pretrained keeps only one of them.
    model.save_pretrained(folder)


def _write_adapter(checkpoint: Path, shards: Zero3Shards, dtype: torch.dtype, folder: Path) -> None:
    config = LoraConfig.from_pretrained(str(checkpoint))
    config.inference_mode = False  # else PEFT freezes the adapter, and its parameters are not told from the base's
    with torch.device("meta"):
        model = PeftModelForCausalLM(_empty_model(checkpoint, dtype), config)
    tensors = dict(_cast(shards, dtype))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _compare(tensors, trained, shards.folder)
    model.load_state_dict(tensors, strict=False, assign=True)
    # PEFT's own names. The vocabulary is never resized, so no embedding joins them ("auto" would ask the hub).
    adapter = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(adapter, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    shutil.copy(checkpoint / ADAPTER_CONFIG, folder)
    _check_adapter(folder / ADAPTER_WEIGHTS, len(trained))


def _check_adapter(path: Path, parameters: int) -> None:
    """Reopens the written adapter: a well-known failure under ZeRO-3 is a valid file without a single weight."""
    adapter = load_file(path)
    empty = [name for name, tensor in adapter.items() if tensor.numel() == 0]
    if len(adapter) != parameters or empty:
        raise ValueError(f"{path}: {len(adapter)} tensors, {len(empty)} empty, for {parameters} trained parameters")


def _compare(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Holds the shards against the model built from config.json: same names, same shapes."""
    common = expected.keys() & tensors.keys()
    for problem, names in (
        ("missing", expected.keys() - common),
        ("unexpected", tensors.keys() - common),
        ("of another shape", {name for name in common if expected[name].shape != tensors[name].shape}),
    ):
        if names:
            shown = ", ".join(sorted(names)[:5])
            raise ValueError(
                f"{folder}: {len(names)} tensors are {problem} for the model that config.json describes ({shown}); "
                "the shards or the config belong to another model"
            )


def _cast(shards: Zero3Shards, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in shards:
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def _copy_companions(checkpoint: Path, folder: Path) -> None:
    for pattern in _COPIED:
        for path in checkpoint.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            else:
                shutil.copy(path, folder)
