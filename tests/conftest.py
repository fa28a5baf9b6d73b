"""Fixtures every test can use, and the environment that every test and its subprocesses run in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Set before torch, transformers or deepspeed is imported here or in a subprocess: no network, and no more
# threads than two ranks on two cores can use.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What DeepSpeed pays for again and again: a compiler's import for an optimizer nobody asked for, and numactl, looked
# for at every bucket of gradients where no launcher says how many ranks a node has.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ.setdefault("LOCAL_SIZE", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest

from tests import tiny
from tests.distributed.lives import Lives, lives


@pytest.fixture(scope="session")
def server() -> Iterator[Lives]:
    """Starts ranks fast."""
    with lives() as started:
        yield started


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random 2-layer Llama (untied embeddings) with tokenizer and chat template. Read only."""
    return tiny.save_model_folder(tiny.tiny_llama(), tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_qwen2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random 2-layer Qwen2 (tied embeddings) with tokenizer and chat template. Read only."""
    return tiny.save_model_folder(tiny.tiny_qwen2(), tmp_path_factory.mktemp("models") / "tiny-qwen2")
