"""The model behind a judge: found, checked against the architecture its protocol was made for, loaded."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from pipeline.checkpoints.model_folder import find_model
from pipeline.evaluation.engine_transformers import TransformersEngine
from pipeline.evaluation.model import evaluation_device, pad_token, refuse_shards, weights_sha256
from pipeline.evaluation.suite_sources import HubFiles

WEIGHTS = ("*.json", "*.model", "*.jinja", "*.safetensors", "*.bin")


class JudgeModel:
    """A judge's tokenizer and, once they are needed, its weights.

    Raises:
        ValueError: nothing there (names the command that fetches it), or a model of another architecture.
    """

    def __init__(self, name: str, source: HubFiles, given: str | None, architecture: str) -> None:
        self._flag = f"--judge_model {name}={given or source.repo}"
        try:
            self.folder = find_model(given) if given else _find(name, source)
        except ValueError as error:
            raise ValueError(f"--judge_model {name}: {error}") from None
        self.model = given or source.repo
        self.revision = None if given else self.folder.name  # a snapshot's folder has its commit's name
        refuse_shards(str(self.folder), self._flag)
        try:
            self.config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._flag}: {str(error).splitlines()[0]}") from error
        found = self.config.architectures or ["none named"]
        if found != [architecture]:
            raise ValueError(f"{self._flag}: is a {', '.join(found)}, and this judge is a {architecture}")
        self.device = evaluation_device()[0]

    @cached_property
    def weights_sha256(self) -> str:
        """Of the weight files."""
        return weights_sha256([self.folder])

    def classifier(self, dtype: torch.dtype) -> Any:
        """The sequence classifier. Errors: ValueError if a weight, such as its head, is missing."""
        return self._load(AutoModelForSequenceClassification, dtype)

    def engine(self, dtype: torch.dtype) -> TransformersEngine:
        """The language model, which answers greedily."""
        model = self._load(AutoModelForCausalLM, dtype)
        end = model.generation_config.eos_token_id
        model.generation_config = GenerationConfig(
            do_sample=False,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id if end is None else end,
            pad_token_id=pad_token(self.tokenizer),
        )
        return TransformersEngine(model, pad_token(self.tokenizer))

    def _load(self, kind: Any, dtype: torch.dtype) -> Any:
        print(f"Loading the judge {self.model} ({dtype}, {self.device}) ...", flush=True)
        model, found = kind.from_pretrained(self.folder, dtype=dtype, output_loading_info=True)
        if found["missing_keys"]:
            raise ValueError(f"{self._flag}: its weights lack {', '.join(sorted(found['missing_keys'])[:3])}")
        return model.to(self.device).eval()


def _find(name: str, source: HubFiles) -> Path:
    try:
        return source.find()
    except FileNotFoundError:
        raise ValueError(
            f"{source} is not in the cache; run `python pipeline/assess.py fetch --judges {name}` "
            f"where there is a network (same HF_HOME), or give --judge_model {name}=FOLDER"
        ) from None
