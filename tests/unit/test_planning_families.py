"""What a traced step saves, against the same step on a real small model: of every mainstream architecture, and of
Llama in three sizes with and without adapters and checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.config import LoraArguments, ModelArguments, TrainArguments
from pipeline.methods import load_method
from pipeline.planning.activations import Row
from pipeline.sink import attention
from pipeline.training.engine import trained_form
from pipeline.training.meta_step import subject
from tests.unit.test_families import FAMILIES, small_model

ROW = Row((40, 24), (16, 16), 30)


def saved_for_real(model: Any, step: Any) -> int:
    """Bytes of distinct storages, parameters left out, when the backward pass begins."""
    weights = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    kept, counted = [], []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
            kept.append(storage)  # so that its number is not given again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(model, ROW, lambda _: counted.append(sum(sizes.values())))
    return counted[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_traced_step_saves_what_the_real_one_does(family: str) -> None:
    config = copy.deepcopy(small_model(family).config)
    method: Any = load_method("surgery")
    parts = (ModelArguments(), LoraArguments(), TrainArguments(bf16=False), method(method.Config()))
    model = subject(config, *parts, cuda=False)
    name = attention.register("cpu_flash")
    real = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation=name
    ).train()
    counted = saved_for_real(real, model.step)
    assert model.activations(ROW, efficient_linear=False).saved == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lora_r", [0, 3], ids=["full", "lora"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("hidden", "layers"), [(64, 2), (96, 4), (160, 9)])
def test_saved_activations_at_three_sizes(
    hidden: int, layers: int, bf16: bool, lora_r: int, checkpointing: bool
) -> None:
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=2 * hidden + 25, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    method: Any = load_method("surgery")
    train = TrainArguments(bf16=bf16, gradient_checkpointing=checkpointing)
    source, lora = ModelArguments(), LoraArguments(lora_r=lora_r)
    model = subject(config, source, lora, train, method(method.Config()), cuda=False)
    name = attention.register("cpu_flash")
    dtype = torch.bfloat16 if bf16 else torch.float32
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=name)
    counted = saved_for_real(trained_form(plain, source, lora, train), model.step)
    assert model.activations(ROW, efficient_linear=False).saved == pytest.approx(counted, rel=0.02)
