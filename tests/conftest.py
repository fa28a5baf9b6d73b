"""Fixtures every test can use, and the environment that every test and its subprocesses run in."""

from __future__ import annotations

import os
from pathlib import Path

# Set before torch, transformers or deepspeed is imported here or in a subprocess: no network, and no more
# threads than two ranks on two cores can use.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing here is compiled, but DeepSpeed decorates Muon's functions whatever the optimizer is, for which torch imports
# its whole compiler: more than a second of every rank's start.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random 2-layer Llama (untied embeddings) with tokenizer and chat template. Read only."""
    return tiny.save_model_folder(tiny.tiny_llama(), tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_qwen2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random 2-layer Qwen2 (tied embeddings) with tokenizer and chat template. Read only."""
    return tiny.save_model_folder(tiny.tiny_qwen2(), tmp_path_factory.mktemp("models") / "tiny-qwen2")
