"""The model behind a judge: found, checked against the architecture its protocol was made for, loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

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
from pipeline.evaluation.judge_text import special_tokens
from pipeline.evaluation.model import evaluation_device, pad_token, refuse_shards, weights_sha256
from pipeline.evaluation.suite import Prompt
from pipeline.evaluation.suite_sources import HubFiles
from pipeline.evaluation.templates import read_template, sha256

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

    @property
    def special_tokens(self) -> list[str]:
        """Texts that end or begin a prompt for this model."""
        return ["<s>", "</s>", *special_tokens(self.tokenizer)]

    @cached_property
    def weights_sha256(self) -> str:
        """Of the weight files."""
        return weights_sha256([self.folder])

    def classifier(self, dtype: torch.dtype) -> Any:
        """The sequence classifier. Errors: ValueError if a weight, such as its head, is missing."""
        model = self._load(AutoModelForSequenceClassification, dtype)
        # Else transformers would look for the last token that is no pad token, and some tokenizers pad with the end.
        model.config.pad_token_id = None
        return model

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


class ModelJudge(ABC):
    """What judges that are models share.

    given: a folder in place of the pinned one. template: what --judge_template names, a built-in prompt or a file.
    """

    name: ClassVar[str]
    source: ClassVar[HubFiles]
    architecture: ClassVar[str]
    licence: ClassVar[str]
    dtype: torch.dtype | None = None  # of the device
    template: str = ""

    def __init__(self, given: str | None = None, template: str | None = None) -> None:
        self.model = JudgeModel(self.name, self.source, given, self.architecture)
        self._use(template)
        self.dtype = self.dtype or evaluation_device()[1]
        self._loaded: Any = None

    @abstractmethod
    def _use(self, template: str | None) -> None:
        """Read the prompt that --judge_template names, and what of it an answer must not hold."""

    @abstractmethod
    def verdict(self, prompt: Prompt, answer: str) -> dict[str, Any]:
        """See judges.Judge."""

    def identity(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": self.model.model,
            "revision": self.model.revision,
            "weights_sha256": self.model.weights_sha256,
            "template_sha256": sha256(self.template),
            "dtype": str(self.dtype).removeprefix("torch."),
            "licence": self.licence,
        }

    def _generate(self, ids: list[int], max_new_tokens: int) -> str:
        if self._loaded is None:
            assert self.dtype is not None
            self._loaded = self.model.engine(self.dtype)
        (reply,) = self._loaded.answer([ids], max_new_tokens)
        return str(self.model.tokenizer.decode(reply.ids, skip_special_tokens=True))


def notes(**notes: Any) -> dict[str, Any]:
    """What there is to say beside a verdict; nothing of what is 0 or empty."""
    return {name: value for name, value in notes.items() if value}


def chosen_template(
    judge: str, given: str | None, built_in: Mapping[str, str], default: str, names: tuple[str, ...]
) -> str:
    """The prompt that --judge_template gives a judge, or else its own.

    Args:
        built_in: files of templates/ by the name they are chosen with.
        default: the judge's own file.
        names: the places that a prompt must have.

    Raises:
        ValueError: no such file, or one that lacks a place.
    """
    if given is None or given in built_in:
        return read_template(default if given is None else built_in[given])
    text = template_file(judge, given)
    missing = [name for name in names if f"{{{name}}}" not in text]
    if missing:
        raise ValueError(f"--judge_template {judge}={given}: has no place for {{{missing[0]}}}")
    return text


def template_file(judge: str, given: str) -> str:
    """The text of a --judge_template. Errors: ValueError, naming the flag."""
    try:
        return Path(given).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--judge_template {judge}={given}: not a readable UTF-8 file: {error}") from None


def _find(name: str, source: HubFiles) -> Path:
    try:
        return source.find()
    except FileNotFoundError:
        raise ValueError(
            f"{source} is not in the cache; run `python pipeline/assess.py fetch --judges {name}` "
            f"where there is a network (same HF_HOME), or give --judge_model {name}=FOLDER"
        ) from None
