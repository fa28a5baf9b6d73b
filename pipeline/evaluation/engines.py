"""Which engine answers: transformers, or vLLM where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from pipeline.evaluation.engine_transformers import TransformersEngine
from pipeline.evaluation.engine_vllm import VllmEngine, vllm_version
from pipeline.evaluation.generate import Engine
from pipeline.evaluation.model import EvaluatedModel, pad_token

EngineName = Literal["auto", "transformers", "vllm"]


def choose_engine(wanted: EngineName, workers: int) -> dict[str, str]:
    """Name and version of the engine. auto: vLLM if it is installed, there is a GPU, and one worker does all.

    Errors: ValueError if vLLM is wanted and cannot run.
    """
    version = vllm_version()
    if wanted == "vllm" and version is None:
        raise ValueError("--engine vllm: it is not installed; `pip install -e '.[vllm]'`, or --engine transformers")
    if wanted == "vllm" and not torch.cuda.is_available():
        raise ValueError("--engine vllm: there is no GPU; take --engine transformers")
    if wanted == "vllm" and workers > 1:
        raise ValueError("--engine vllm: shares its work among GPUs itself; leave --num_workers and the launcher out")
    if version and torch.cuda.is_available() and workers == 1 and wanted != "transformers":
        return {"name": VllmEngine.name, "version": version}
    return {"name": TransformersEngine.name, "version": TransformersEngine.version}


def open_engine(name: str, model: EvaluatedModel, load: Callable[[], Any], *, max_length: int) -> Engine:
    """The engine by its name; `load` gives the model's weights, which vLLM reads itself."""
    if name == VllmEngine.name:
        return VllmEngine(model, max_length=max_length)
    return TransformersEngine(load(), pad_token(model.tokenizer))
