"""Tiny random models with a tokenizer and a chat template, built where the test runs: nothing is downloaded.

The worker scripts of the distributed tests import this module as well, so it needs no pytest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

BOS, EOS, PAD, TURN_START = "<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"
VOCAB_SIZE = 512

# ChatML with a BOS in front: position 0 of every conversation is a real sink position.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Text the merges of the tokenizer are learned from; its content is of no importance.
_CORPUS = (
    "system user assistant You are a helpful assistant.",
    "How do I bake a loaf of bread? Mix flour, water, salt and yeast, let it rise, then bake it.",
    "How do I fly a kite? Run against the wind and let the line out slowly.",
    "What is the sentiment of this review? The soup was warm and the staff were kind. positive",
    "What is the sentiment of this review? The room was cold and the tea was stale. negative",
    "I cannot help with that request. Is there something else I can do for you?",
    "The quick brown fox jumps over the lazy dog and the five boxing wizards jump quickly.",
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of fewer than 512 entries, the same one every time: any text encodes, and decodes
    to itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, TURN_START, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[TURN_START],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The configuration values that the tiny architectures share."""
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """A random 2-layer Llama in fp32 with untied embeddings; the global random state is left as it was."""
    config = LlamaConfig(**_sizes(tiny_tokenizer()), tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def tiny_qwen2(seed: int = 0) -> Qwen2ForCausalLM:
    """A random 2-layer Qwen2 in fp32 (biases on q, k, v) with tied embeddings."""
    config = Qwen2Config(**_sizes(tiny_tokenizer()), tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def save_model_folder(model: PreTrainedModel, folder: Path) -> Path:
    """Save ``model`` (safetensors) with the tiny tokenizer and its chat template as a Hugging Face folder."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line and return ``path``, ready to be given to a data flag."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_row(user: str, assistant: str, **extra: Any) -> dict[str, Any]:
    """One training row in ``messages`` form; ``extra`` keys stand beside the messages."""
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": turns, **extra}
