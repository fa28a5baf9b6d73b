"""Public model sizes by name, so that a run can be planned before a model is downloaded."""

from __future__ import annotations

from typing import Any

# Dimensions as in the config.json that each model is published with on the Hugging Face hub.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "7b": (
        "meta-llama/Llama-2-7b-hf",
        {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32,
        },
    ),
    "8b": (
        "meta-llama/Llama-3.1-8B",
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8,
        },
    ),
    "13b": (
        "meta-llama/Llama-2-13b-hf",
        {
            "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
            "num_attention_heads": 40, "num_key_value_heads": 40,
        },
    ),
    "34b": (
        "01-ai/Yi-34B",
        {
            "vocab_size": 64000, "hidden_size": 7168, "intermediate_size": 20480, "num_hidden_layers": 60,
            "num_attention_heads": 56, "num_key_value_heads": 8,
        },
    ),
    "70b": (
        "meta-llama/Llama-3.1-70B",
        {
            "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8,
        },
    ),
}  # fmt: skip


def size_config(name: str) -> Any:
    """The configuration of a name in SIZES; all are of Llama's architecture with untied embeddings."""
    from transformers import LlamaConfig

    model, dimensions = SIZES[name]
    config = LlamaConfig(**dimensions, max_position_embeddings=131072, tie_word_embeddings=False)
    config.name_or_path = f"{name} ({model})"
    return config
