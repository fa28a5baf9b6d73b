"""A PEFT LoRA adapter held against the model it is for: which tensor of the base gets which update."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model_state_dict
from peft.tuners.lora import Embedding, Linear, LoraLayer
from transformers import PreTrainedModel

from pipeline.checkpoints.weights_in import SafetensorsFile
from pipeline.checkpoints.weights_out import TensorSpec

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
# Settings that this file honours through PEFT, or that change nothing once the adapter is trained. Any other one that
# is set is refused by name, also one that a later PEFT will have.
_HONOURED = {
    "alpha_pattern", "exclude_modules", "fan_in_fan_out", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_dropout", "peft_version",
    "revision", "runtime_config",
}  # fmt: skip
# Initialisations that leave the base as it is. PiSSA, OLoRA and others take a part out of it, which would be missed.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Update:
    """What is added to one tensor W of the base: scaling B A, as rows of `left` @ `right`.

    Attributes:
        name: of W, [rows, columns].
        first, second: names of A [r, in] and B [out, r] in the adapter's file.
        transposed: W is stored [in, out], as an embedding and GPT-2's Conv1D are.
    """

    name: str
    first: str
    second: str
    scaling: float
    transposed: bool


class Adapter:
    """A LoRA adapter folder as PEFT writes it.

    Attributes:
        config: the file's content.
        base: the name of its base model, if it says it.
        file: its weights.

    Raises:
        ValueError: no LoRA adapter in safetensors, or a setting whose merge would not be exact, by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        self.base: str | None = self.config.get("base_model_name_or_path") or None
        path = folder / ADAPTER_WEIGHTS
        if not path.is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            reason = "adapter_model.bin is a pickle and is not read: save it as safetensors" if pickled else "missing"
            raise ValueError(f"{path}: {reason}")
        self.file = SafetensorsFile(path)

    def plan(
        self, model: PreTrainedModel, base: Mapping[str, TensorSpec], where: Path
    ) -> tuple[list[Update], dict[str, str]]:
        """Holds the adapter against its base.

        Args:
            model: the base on the meta device; PEFT's layers are put into it.
            base: the tensors in the base's files.
            where: the base's folder, for messages.

        Returns:
            The updates, and the tensors of the base that the adapter replaces (modules_to_save) with their names in
            its file.

        Raises:
            ValueError: the two do not fit: names the tensors that are missing, unexpected or of another shape.
        """
        tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        expected, layers = self._expect(model, where)
        for name in self.file.specs.keys() - expected.keys():
            # Embeddings, which PEFT saves whole when they are targets or when the vocabulary was changed.
            inner = _inner(name)
            if inner not in base:
                continue
            expected[name] = torch.Size(base[inner].shape)
        _compare(expected, self.file.specs, self.folder, where)
        replaced = {_inner(name): name for name in expected if ".lora_" not in name}
        updates = [_update(name, layer) for name, layer in layers]
        touched = {*replaced, *(update.name for update in updates)}
        if shared := sorted(touched & tied):
            raise ValueError(
                f"{self.folder}: changes {_some(shared)}, which {where} ties to another layer; the merged model would "
                "need two of them: train without these modules, or untie the base first"
            )
        if missing := sorted(touched - base.keys()):
            raise ValueError(
                f"{where}: has no tensor {_some(missing)}, which {self.folder} changes; it is another model, or its "
                "files hold these weights under other names (fused experts), which is not merged"
            )
        if wrong := sorted(name for name in touched if base[name].shape != shapes.get(name)):
            raise ValueError(f"{where}: {_some(wrong)} does not have the shape that its config.json gives it")
        return updates, replaced

    def _expect(self, model: PreTrainedModel, where: Path) -> tuple[dict[str, torch.Size], list[tuple[str, Any]]]:
        """Names and shapes of the adapter that PEFT would make for this model, and its layers by their module."""
        names = {each.name for each in fields(LoraConfig)} & _HONOURED - {"peft_type"}
        chosen = {name: value for name, value in self.config.items() if name in names}
        try:
            with warnings.catch_warnings(action="ignore"), torch.device("meta"):
                config = LoraConfig(**{**chosen, "init_lora_weights": False})
                wrapped = PeftModelForCausalLM(model, config)
                tensors = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else repr(error)
            raise ValueError(f"{self.folder}: does not fit {where}: {reason}") from error
        layers = [(name, layer) for name, layer in wrapped.named_modules() if isinstance(layer, LoraLayer)]
        if other := [name for name, layer in layers if type(layer) not in (Linear, Embedding)]:
            raise ValueError(f"{self.folder}: adapts {_some(other)}, which is neither a linear layer nor an embedding")
        return {name: tensor.shape for name, tensor in tensors.items()}, layers


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: no adapter ({ADAPTER_CONFIG} is missing)")
    if (folder / "latest").is_file():
        raise ValueError(f"{folder}: holds ZeRO shards; convert them first: python tools/zero_to_hf.py {folder} OUT")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, task, start = config.get("peft_type"), config.get("task_type"), config.get("init_lora_weights", True)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type {kind}; only LORA is merged")
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(f"{path}: task_type {task}; only CAUSAL_LM is merged")
    if not any(start is each or start == each for each in _INITIALISATIONS):
        raise ValueError(
            f"{path}: init_lora_weights {start} changes the base model, so the merge would be wrong; convert the "
            "adapter with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    defaults = LoraConfig().to_dict()
    for name, value in config.items():
        if name not in _HONOURED | _WITHOUT_EFFECT and value and value != defaults.get(name):
            raise ValueError(f"{path}: {name} {value!r} is not merged here; use PEFT's merge_and_unload")
    return dict(config)


def _update(name: str, layer: Any) -> Update:
    scaling, inner = layer.scaling["default"], name.removeprefix(_PREFIX)
    if isinstance(layer, Embedding):
        return Update(f"{inner}.weight", f"{name}.lora_embedding_A", f"{name}.lora_embedding_B", scaling, True)
    transposed = bool(layer.fan_in_fan_out)
    return Update(f"{inner}.weight", f"{name}.lora_A.weight", f"{name}.lora_B.weight", scaling, transposed)


def _inner(name: str) -> str:
    """The base's name of a tensor that the adapter holds whole."""
    return name.removeprefix(_PREFIX).replace(".base_layer.", ".")


def _compare(expected: Mapping[str, torch.Size], found: Mapping[str, TensorSpec], folder: Path, where: Path) -> None:
    common = expected.keys() & found.keys()
    for problem, names in (
        ("missing", expected.keys() - common),
        ("unexpected", found.keys() - common),
        ("of another shape", {name for name in common if tuple(expected[name]) != found[name].shape}),
    ):
        if names:
            raise ValueError(
                f"{folder}: {len(names)} tensors are {problem} for {where} ({_some(sorted(names))}); the adapter "
                "is of another base model, or damaged"
            )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
