"""The model under evaluation: a Hugging Face folder or hub id, with a PEFT adapter or without."""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from pipeline.builtin_model import resolve_model
from pipeline.checkpoints.markers import CHECKPOINT_NAME, MARKER
from pipeline.config import ModelArguments


def evaluation_device() -> tuple[torch.device, torch.dtype]:
    """fp32 on the CPU, bf16 on CUDA."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


class EvaluatedModel:
    """Names, identity and loading of the model that --model_name_or_path and --adapter_name_or_path give; its dtype is
    the device's unless one is given.

    Weights are loaded only by `load`, so a finished evaluation is reported without them.

    Raises:
        ValueError: no such model or adapter, or a folder of ZeRO shards (names the command that converts them).
    """

    def __init__(self, arguments: ModelArguments, dtype: torch.dtype | None = None) -> None:
        self.name = resolve_model(arguments.model_name_or_path)
        self.adapter = arguments.adapter_name_or_path
        self.trust_remote_code = arguments.trust_remote_code
        self.device, self.dtype = evaluation_device()
        if dtype is not None:
            self.dtype = dtype
        refuse_shards(self.name, f"--model_name_or_path {self.name}")
        if self.adapter is not None and not (Path(self.adapter) / "adapter_config.json").is_file():
            raise ValueError(
                f"--adapter_name_or_path {self.adapter}: no adapter folder (adapter_config.json is missing)"
            )
        try:
            self._config = AutoConfig.from_pretrained(self.name, trust_remote_code=self.trust_remote_code)
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.name, trust_remote_code=self.trust_remote_code
            )
        except OSError as error:
            raise ValueError(f"--model_name_or_path {self.name}: {str(error).splitlines()[0]}") from error

    @property
    def positions(self) -> int:
        """The tokens the model has positions for."""
        return int(getattr(self._config.get_text_config(), "max_position_embeddings", sys.maxsize))

    def weights_fingerprint(self) -> str:
        """sha256 of the weight files (and the adapter's); for a hub id, its commit."""
        folder = Path(self.name)
        revision = "" if folder.is_dir() else str(getattr(self._config, "_commit_hash", None))
        return weights_sha256([folder, *([] if self.adapter is None else [Path(self.adapter)])], revision)

    def generation_ends(self) -> int | list[int] | None:
        """The tokens that end an answer: those of the generation settings, or else the tokenizer's."""
        try:
            ends: Any = GenerationConfig.from_pretrained(self.name).eos_token_id
        except OSError:  # a folder without the file: transformers then takes the configuration's
            ends = self._config.get_text_config().eos_token_id
        found: int | list[int] | None = self.tokenizer.eos_token_id if ends is None else ends
        return found

    def adapter_rank(self) -> int:
        """The adapter's largest rank. Needs an adapter."""
        config = PeftConfig.from_pretrained(str(self.adapter))
        return int(max([config.r, *(config.rank_pattern or {}).values()]))

    def load(self, attn_implementation: str = "sdpa") -> Any:
        """The model in evaluation mode. Its generation settings are greedy with its own end tokens, nothing else."""
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.name,
            dtype=self.dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )
        end = model.generation_config.eos_token_id
        end = self.tokenizer.eos_token_id if end is None else end
        # Replaced, not edited: a model's own sampling, penalties and lengths would silently join greedy decoding.
        model.generation_config = GenerationConfig(
            do_sample=False,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=pad_token(self.tokenizer),
        )
        if self.adapter is not None:
            with warnings.catch_warnings():
                # PEFT only warns when an adapter does not fit, and the base model would be judged in its place.
                warnings.filterwarnings("error", message="Found missing adapter keys")
                try:
                    model = PeftModel.from_pretrained(model, self.adapter)
                except (UserWarning, RuntimeError, ValueError) as error:
                    raise ValueError(
                        f"--adapter_name_or_path {self.adapter}: does not fit --model_name_or_path {self.name}: "
                        f"{str(error)[:500]}"
                    ) from error
        return model.to(self.device).eval()


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any valid id: padding is masked by position."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if isinstance(token, int):
            return token
    return 0


def weights_sha256(folders: Iterable[Path], revision: str = "") -> str:
    """sha256 over the weight files of some folders, in order, and over a revision where there is one."""
    digest = hashlib.sha256(revision.encode())
    for folder in folders:
        for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def refuse_shards(name: str, flag: str) -> None:
    """Errors: ValueError for a folder of ZeRO shards, naming the command that converts them."""
    folder = Path(name)
    shards = (folder / MARKER).is_file() or (folder / "latest").is_file()
    run = (folder / "run.json").is_file() and any(CHECKPOINT_NAME.fullmatch(path.name) for path in folder.iterdir())
    if shards or run:
        raise ValueError(f"{flag}: holds ZeRO shards; convert them first: python tools/zero_to_hf.py {name} OUT")
