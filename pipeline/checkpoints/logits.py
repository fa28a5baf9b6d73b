"""Whether a folder of weights computes what the live model computes: logits of both on the same tokens."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.checkpoints.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pipeline.checkpoints.model_folder import find_model
from pipeline.checkpoints.shards import Shards
from pipeline.checkpoints.tensor_file import RegionReader
from pipeline.checkpoints.weights_in import SafetensorsFile, WeightsFolder

TOLERANCE = 1e-4  # of the largest logit, in fp32
_ROWS, _TOKENS, _SEED = 2, 64, 0


@dataclass(frozen=True)
class Difference:
    """difference, largest: the largest absolute difference and logit. rounded: the dtype that the live weights were
    rounded to, as those of the folder are."""

    difference: float
    largest: float
    rounded: str

    @property
    def relative(self) -> float:
        """difference / largest."""
        return self.difference / self.largest


def compare_logits(folder: Path, live: str) -> Difference:
    """Logits of a model folder or adapter against those of the live model, both in fp32 on the CPU, one at a time.

    Args:
        folder: a converted or merged model, or an adapter.
        live: a model folder, `builtin` or hub id; an adapter folder (with the base that it names); or a ZeRO
            checkpoint, whose shards are read as they are.

    The live weights are first rounded to the folder's dtype (an adapter is merged before, if the folder holds a merged
    model), so that what is left is what conversion or merging did wrong.

    Raises:
        ValueError: one of them cannot be loaded, or they are models of different vocabularies.
    """
    dtypes = _dtypes(folder)
    usual = Counter(dtypes.values()).most_common(1)[0][0]
    model = _load(live)
    if isinstance(model, PeftModel) and not (folder / ADAPTER_CONFIG).is_file():
        model = model.merge_and_unload()
    adapted = isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if not adapted or "lora_" in name or "modules_to_save" in name:
            parameter.data = parameter.data.to(dtypes.get(name, usual)).float()
    expected = _logits(model)
    del model
    found = _logits(_load(str(folder)))
    if found.shape != expected.shape:
        raise ValueError(f"{live}: has {expected.shape[-1]} logits a token and {folder} has {found.shape[-1]}")
    difference = float((found - expected).abs().max())
    return Difference(difference, float(expected.abs().max()), str(usual).removeprefix("torch."))


def _logits(model: Any) -> torch.Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(vocabulary, (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(_SEED))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=tokens, use_cache=False).logits.float()
    return logits


def _dtypes(folder: Path) -> dict[str, torch.dtype]:
    adapter = (folder / ADAPTER_CONFIG).is_file()
    specs = SafetensorsFile(folder / ADAPTER_WEIGHTS).specs if adapter else WeightsFolder(folder).specs
    dtypes = {name: spec.dtype for name, spec in specs.items() if spec.dtype.is_floating_point}
    if not dtypes:
        raise ValueError(f"{folder}: holds no weights")
    return dtypes


def _load(name: str) -> Any:
    """A model in fp32 on the CPU, from a model folder, an adapter or a checkpoint."""
    folder = Path(name)
    adapted, sharded = (folder / ADAPTER_CONFIG).is_file(), (folder / "latest").is_file()
    try:
        if not sharded:
            return PeftModel.from_pretrained(_base(folder), folder) if adapted else _pretrained(find_model(name))
        if adapted:
            config = LoraConfig.from_pretrained(str(folder))
            config.init_lora_weights, config.megatron_config = False, None
            model: Any = PeftModelForCausalLM(_base(folder), config)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        _fill(model, Shards(folder))
        return model
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{name}: {str(error).splitlines()[0]}") from error


def _pretrained(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )


def _base(adapter: Path) -> Any:
    try:
        base = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{adapter / ADAPTER_CONFIG}: damaged ({error})") from None
    if not isinstance(base, str) or not base:
        raise ValueError(f"{adapter / ADAPTER_CONFIG}: names no base model (base_model_name_or_path)")
    return _pretrained(find_model(base))


def _fill(model: Any, shards: Shards) -> None:
    """Copies the shards' tensors into the model, under the names they had in training."""
    reader = RegionReader()
    for name, tensor in model.state_dict().items():
        stored = shards.aliases.get(name, name)
        if stored in shards.tensors:
            flat = torch.cat([piece.clone() for piece in reader.read(shards.regions(stored))])
            tensor.copy_(flat.view(shards.tensors[stored].shape))
