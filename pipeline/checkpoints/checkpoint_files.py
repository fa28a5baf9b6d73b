"""What a checkpoint holds beside its shards, or lacks and a base model gives: configuration, adapter configuration,
generation settings, tokenizer and chat template."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from pipeline.checkpoints.companions import (
    GENERATION,
    TOKENIZER,
    copy_generation_config,
    copy_tokenizer,
    has_tokenizer,
)
from pipeline.checkpoints.lora import ADAPTER_CONFIG
from pipeline.checkpoints.model_folder import find_model

CONFIG = "config.json"


class CheckpointFiles:
    """The files of a checkpoint beside its shards; what it lacks comes from a base model.

    Args:
        checkpoint: their folder.
        base: a model folder or hub id, if there is one.

    Raises:
        ValueError: `base` cannot be found, or a companion is a link out of the checkpoint.
    """

    def __init__(self, checkpoint: Path, base: str | None) -> None:
        self._checkpoint = checkpoint
        self._folders = [checkpoint, *([_find_base(base)] if base is not None else [])]
        names = (CONFIG, ADAPTER_CONFIG, *GENERATION, *TOKENIZER)
        for path in (path for name in names for path in checkpoint.glob(name)):
            if not path.resolve().is_relative_to(checkpoint.resolve()):
                raise ValueError(f"{path}: is a link out of the checkpoint; copy the file to its place")

    def config_folder(self) -> Path:
        """Where the model's config.json is."""
        for folder in self._folders:
            if (folder / CONFIG).is_file():
                return folder
        raise ValueError(
            f"{self._checkpoint}: {CONFIG} is missing; name the model that was trained with --model_name_or_path"
        )

    def adapter_config(self) -> Path | None:
        """adapter_config.json of a LoRA run.

        Raises:
            ValueError: it is damaged, of another kind of adapter, or names a base model by a network path.
        """
        path = self._checkpoint / ADAPTER_CONFIG
        if not path.is_file():
            return None
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            kind, base = fields["peft_type"], str(fields.get("base_model_name_or_path") or "")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: damaged ({error!r})") from error
        if kind != "LORA":
            raise ValueError(f"{path}: an adapter of type {kind}; only LoRA is converted")
        if re.match(r"\w+://|//|\\\\", base):
            raise ValueError(f"{path}: base_model_name_or_path is a network path ({base}); name a folder or a hub id")
        return path

    def used(self) -> list[Path]:
        """The configurations in use, by which a conversion is known again."""
        found = [folder / name for folder in self._folders for name in (CONFIG, ADAPTER_CONFIG)]
        return [path for path in found if path.is_file()]

    def copy(self, out: Path) -> None:
        """Copies tokenizer, chat template and generation settings into `out`; without a tokenizer it warns."""
        for folder in self._folders:
            if (folder / GENERATION[0]).is_file():
                copy_generation_config(folder, out)
                break
        for folder in self._folders:
            if has_tokenizer(folder):
                return copy_tokenizer(folder, out)
        print(
            f"warning: {self._checkpoint}: no tokenizer; with --model_name_or_path it comes from the model that was "
            "trained",
            file=sys.stderr,
        )


def _find_base(name: str) -> Path:
    try:
        return find_model(name)
    except ValueError as error:
        raise ValueError(f"--model_name_or_path {error}") from error
