"""The target model: how it is asked, how it samples, and what of it is in memory."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from pipeline.config import ModelArguments
from pipeline.data.chat import ChatEncoder
from pipeline.data.schema import Message
from pipeline.data.thinking import OPEN
from pipeline.evaluation.engines import EngineName, choose_engine, open_engine
from pipeline.evaluation.generate import Engine
from pipeline.evaluation.judge_text import special_tokens
from pipeline.evaluation.model import EvaluatedModel, pad_token

# What R1's distilled models and Qwen3's thinking mode are recommended with, for folders that recommend nothing.
TEMPERATURE, TOP_P = 0.6, 0.95


class Target:
    """Nothing is loaded until it is asked for; an engine that reads the weights itself and weights of ours are never
    in memory together.

    Raises:
        ValueError: no such model or engine, or a tokenizer without chat template.
    """

    def __init__(
        self,
        arguments: ModelArguments,
        *,
        engine: EngineName,
        dtype: torch.dtype | None,
        max_length: int,
        workers: int,
    ) -> None:
        self.engine_used = choose_engine(engine, workers)
        self.model = EvaluatedModel(arguments, dtype)
        self.max_length = min(max_length, self.model.positions)
        self.encoder = ChatEncoder(self.model.tokenizer, max_length=self.max_length)
        probe = self.encoder.encode_prompt([{"role": "user", "content": "PROMPT"}])
        self.opened = str(self.tokenizer.decode(probe)).rstrip().endswith(OPEN)
        self.control = special_tokens(self.tokenizer)
        ends = self.model.generation_ends()
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        self._weights: Any = None
        self._engine: Engine | None = None

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    @property
    def pad(self) -> int:
        return pad_token(self.tokenizer)

    @property
    def own_engine(self) -> bool:
        """Whether the engine reads the weights itself."""
        return self.engine_used["name"] != "transformers"

    def recommended(self) -> dict[str, Any]:
        """temperature, top_p and top_k of the model's own generation settings, or else of R1 and Qwen3."""
        try:
            own = GenerationConfig.from_pretrained(self.model.name)
        except OSError:
            own = GenerationConfig()
        if not own.do_sample:  # its values are transformers' own, which nobody recommends for this model
            return {"temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
        found = {"temperature": own.temperature, "top_p": own.top_p, "top_k": own.top_k}
        defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        return {name: defaults[name] if value is None else value for name, value in found.items()}

    def prompt(self, messages: Sequence[Message], max_new_tokens: int, row_id: str) -> list[int]:
        """The tokens it continues. Errors: ValueError naming the row if they leave no room for an answer."""
        ids = self.encoder.encode_prompt(messages)
        if len(ids) + max_new_tokens > self.max_length:
            raise ValueError(
                f"{row_id}: its request has {len(ids)} tokens, and with --max_new_tokens {max_new_tokens} they exceed "
                f"{self.max_length} (--max_length, or the model's positions); lower one, raise the other, or leave "
                "the row out"
            )
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """What it generated, control tokens shown, without the one that ended it."""
        kept = ids[:-1] if ids and ids[-1] in self._ends else ids
        return str(self.tokenizer.decode(kept, skip_special_tokens=False))

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def weights(self) -> Any:
        """The loaded model."""
        if self.own_engine:
            self._free("_engine")
        if self._weights is None:
            print(f"Loading {self.model.name} ({self.model.dtype}, {self.model.device}) ...", flush=True)
            self._weights = self.model.load()
        return self._weights

    def engine(self) -> Engine:
        """What generates."""
        if self.own_engine:
            self._free("_weights")
        if self._engine is None:
            self._engine = open_engine(self.engine_used["name"], self.model, self.weights, max_length=self.max_length)
        return self._engine

    def release(self) -> None:
        """Makes room for another model."""
        self._free("_engine")
        self._free("_weights")

    def _free(self, name: str) -> None:
        if getattr(self, name) is not None:
            setattr(self, name, None)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
