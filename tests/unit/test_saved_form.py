"""What save_pretrained would write, worked out without weights, against what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.checkpoints.saved_form import compute, saved_form

# Tied, fused experts of two kinds, a router's bias kept in fp32, learned sinks, and projections joined when saved.
FAMILIES = ["qwen2", "mixtral", "qwen3_moe", "phimoe", "deepseek_v3", "gpt_oss", "granitemoe", "hrm_text"]


def config_of(family: str) -> Any:
    return AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_local_experts=4,
        n_routed_experts=4, num_experts_per_tok=2, max_position_embeddings=64, first_k_dense_replace=1, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_group=2, topk_group=1, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=family == "qwen2",
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_of_save_pretrained(family: str, tmp_path: Path) -> None:
    config = config_of(family)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "start")
    # from_pretrained applies what the class keeps in fp32
    live = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.bfloat16)
    live.save_pretrained(tmp_path / "saved")
    wanted = load_file(tmp_path / "saved" / "model.safetensors")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    state = live.state_dict()
    found = {}
    for each in saved_form(empty, torch.bfloat16):
        if each.start is None:
            tensor = compute(empty, each.spec.name, {source: state[source] for source in each.sources})
        else:
            (source,) = each.sources
            tensor = state[source].flatten()[each.start : each.start + each.spec.numel].view(each.spec.shape)
        assert each.spec.dtype == wanted[each.spec.name].dtype, each.spec.name
        found[each.spec.name] = tensor
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_experts_are_read_one_at_a_time() -> None:
    """Each is a range of the tensor that holds all of them in memory: reading one does not need the others."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("mixtral"))
    experts = [each for each in saved_form(model, torch.bfloat16) if ".experts." in each.spec.name]
    assert len(experts) == 2 * 4 * 3
    assert all(each.start is not None and each.spec.numel == 32 * 48 for each in experts)
