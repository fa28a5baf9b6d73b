"""Answers by vLLM, greedy or sampled, where it is installed and there is a GPU.

Prompts go in as token ids, so both engines read the same ones. vLLM does not promise answers that are independent of
the batch; VLLM_BATCH_INVARIANT=1 (its own, for some GPUs) asks for that.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.evaluation.engine_transformers import Generated
from pipeline.evaluation.model import EvaluatedModel
from pipeline.evaluation.sampling import Sampling


def vllm_version() -> str | None:
    """The installed version, if any."""
    return importlib.metadata.version("vllm") if importlib.util.find_spec("vllm") else None


class VllmEngine:
    """Answers batches of token ids; reads the model's folder itself, and its adapter if it has one."""

    name = "vllm"

    def __init__(self, model: EvaluatedModel, *, max_length: int) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        adapter: dict[str, Any] = {}
        self._lora = None
        if model.adapter is not None:
            adapter = {"enable_lora": True, "max_lora_rank": model.adapter_rank()}
            self._lora = LoRARequest("adapter", 1, model.adapter)
        self._llm = LLM(
            model=model.name,
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=max_length,
            tensor_parallel_size=torch.cuda.device_count(),
            generation_config="vllm",  # not the folder's, whose sampling would join greedy decoding
            trust_remote_code=model.trust_remote_code,
            seed=0,
            **adapter,
        )
        ends = model.generation_ends()
        self._ends = [ends] if isinstance(ends, int) else list(ends or ())

    def answer(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[Generated]:
        """The continuation of each prompt, greedy unless `sampling` is given."""
        from vllm import SamplingParams, TokensPrompt

        ends = {"max_tokens": max_new_tokens, "stop_token_ids": self._ends}
        drawn: Any = SamplingParams(temperature=0.0, **ends)
        if sampling is not None:
            chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or -1}
            drawn = [SamplingParams(seed=seed, **chosen, **ends) for seed in sampling.seeds]
        found = self._llm.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
            drawn,
            use_tqdm=False,
            lora_request=self._lora,
        )
        first = [each.outputs[0] for each in found]
        return [Generated(list(each.token_ids), truncated=each.finish_reason == "length") for each in first]
