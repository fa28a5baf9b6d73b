"""Model folders as transformers has them: found by name, and built without weights."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.builtin_model import resolve_model


def find_model(name: str) -> Path:
    """The folder of a model.

    Raises:
        ValueError: it is neither a folder, nor `builtin`, nor a hub id whose files are in the local cache.
    """
    folder = Path(resolve_model(name))
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        raise ValueError(
            f"{name}: no such folder, and no model of this name in the hub cache; download it first (hf download)"
        ) from None


def empty_model(folder: Path) -> PreTrainedModel:
    """The model of a folder's config.json on the meta device.

    Raises:
        ValueError: no config.json, one that needs code of its own, or a quantised model.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: config.json is missing; it is no model folder")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("is quantised; use the model it was made from")
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: {str(error).splitlines()[0]}") from error
    return model
