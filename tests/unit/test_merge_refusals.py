"""Adapters and bases whose merge would be wrong: each is refused by name, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.checkpoints.lora import ADAPTER_WEIGHTS
from pipeline.checkpoints.merge import merge
from pipeline.checkpoints.weights_in import INDEX
from tests import tiny
from tests.adapters import OPTIONS, merge_into, save_adapter

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora True is not merged"),
    "bias": ({"bias": "all"}, "bias 'all' is not merged"),
    "lora_bias": ({"lora_bias": True}, "lora_bias True"),
    "parameters": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    "replication": ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "later": ({"use_something_new": True}, "use_something_new True"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4 changes the base"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights olora"),
    "kind": ({"peft_type": "IA3"}, "peft_type IA3"),
    "task": ({"task_type": "SEQ_CLS"}, "task_type SEQ_CLS"),
    "rank": ({"r": 0}, "positive integer"),
    "other rank": ({"r": 8}, r"28 tensors are of another shape for .*tiny-llama"),
    "other targets": ({"target_modules": ["q_proj"]}, "24 tensors are unexpected"),
    "no targets": ({"target_modules": ["c_attn"]}, "c_attn"),
    "fewer layers": ({"layers_to_transform": [0]}, "14 tensors are unexpected .*model.layers.1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_not_merged_are_refused_by_name(
    tiny_model_dir: Path, tmp_path: Path, edited: Callable[..., Path], case: str
) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        merge_into(tiny_model_dir, edited(**changes), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]


class TestBaseThatDoesNotFit:
    def refused(self, base: Path, adapter: Path, out: Path, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            merge_into(base, adapter, out)
        assert not out.exists()

    def test_more_layers(self, tmp_path: Path, adapter: Path) -> None:
        config = tiny.tiny_llama().config
        config.num_hidden_layers = 3
        base = tiny.save_model_folder(type(tiny.tiny_llama())(config), tmp_path / "base")
        self.refused(base, adapter, tmp_path / "out", r"14 tensors are missing for .*base \(.*model\.layers\.2")

    def test_another_width(self, tmp_path: Path, adapter: Path) -> None:
        config = tiny.tiny_llama().config
        config.intermediate_size = 96
        base = tiny.save_model_folder(type(tiny.tiny_llama())(config), tmp_path / "base")
        self.refused(base, adapter, tmp_path / "out", r"of another shape for .*base \(.*(gate|up|down)_proj")

    def test_an_adapter_without_some_of_its_tensors(self, tiny_model_dir: Path, tmp_path: Path, adapter: Path) -> None:
        folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        name = next(name for name in tensors if "lora_B" in name)
        save_file({key: each for key, each in tensors.items() if key != name}, folder / ADAPTER_WEIGHTS)
        self.refused(tiny_model_dir, folder, tmp_path / "out", f"1 tensors are missing .*{name}")

    def test_a_resized_vocabulary(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        model.resize_token_embeddings(tiny.VOCAB_SIZE + 3)
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
            tmp_path / "adapter", save_embedding_layers=True
        )
        self.refused(tiny_model_dir, tmp_path / "adapter", tmp_path / "out", "of another shape .*embed_tokens")

    @pytest.mark.parametrize("chosen", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}])
    def test_tied_layers(self, tiny_qwen2_dir: Path, tmp_path: Path, chosen: dict[str, Any]) -> None:
        adapter = save_adapter(tiny_qwen2_dir, tmp_path / "adapter", **chosen)
        self.refused(tiny_qwen2_dir, adapter, tmp_path / "out", "ties to another layer")

    def test_a_weight_that_its_files_lack(self, tiny_model_dir: Path, tmp_path: Path, adapter: Path) -> None:
        base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
        tensors = load_file(base / "model.safetensors")
        tensors.pop("model.layers.0.mlp.up_proj.weight")
        save_file(tensors, base / "model.safetensors")
        self.refused(base, adapter, tmp_path / "out", r"has no tensor model\.layers\.0\.mlp\.up_proj\.weight")

    def test_a_weight_of_another_shape_than_its_config_says(
        self, tiny_model_dir: Path, tmp_path: Path, adapter: Path
    ) -> None:
        base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
        tensors = load_file(base / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(128, 32)
        save_file(tensors, base / "model.safetensors")
        self.refused(base, adapter, tmp_path / "out", r"up_proj\.weight does not have the shape")

    def test_an_index_that_points_outside(self, tiny_model_dir: Path, tmp_path: Path, adapter: Path) -> None:
        base = tmp_path / "base"
        AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(base, max_shard_size="100KB")
        index = json.loads((base / INDEX).read_text())
        index["weight_map"]["lm_head.weight"] = "../tiny-llama/model.safetensors"
        (base / INDEX).write_text(json.dumps(index))
        self.refused(base, adapter, tmp_path / "out", "names '../tiny-llama/model.safetensors'")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
            ({"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}}, "code|unheard_of"),
        ],
    )
    def test_models_that_are_not_plain(
        self, tiny_model_dir: Path, tmp_path: Path, adapter: Path, changes: dict[str, Any], match: str
    ) -> None:
        base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
        (base / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
        (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | changes))
        self.refused(base, adapter, tmp_path / "out", match)
        assert not (tmp_path / "executed").exists()

    def test_names_that_lead_nowhere(self, tiny_model_dir: Path, tmp_path: Path, adapter: Path) -> None:
        self.refused(tmp_path / "nothing", adapter, tmp_path / "out", "no such folder")
        with pytest.raises(ValueError, match="no model of this name in the hub cache"):
            merge("org/never-downloaded", adapter, tmp_path / "out", **OPTIONS)
        self.refused(adapter, adapter, tmp_path / "out", r"no weights in safetensors|config\.json is missing")
        self.refused(tiny_model_dir, tiny_model_dir, tmp_path / "out", "no adapter")

    def test_pickled_weights(self, tiny_model_dir: Path, tmp_path: Path, adapter: Path) -> None:
        folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
        torch.save(load_file(folder / ADAPTER_WEIGHTS), folder / "adapter_model.bin")
        (folder / ADAPTER_WEIGHTS).unlink()
        self.refused(tiny_model_dir, folder, tmp_path / "out", "adapter_model.bin is a pickle")

    def test_an_adapter_that_is_not_finite(self, tiny_model_dir: Path, tmp_path: Path, adapter: Path) -> None:
        folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][3, 1] = float("nan")
        save_file(tensors, folder / ADAPTER_WEIGHTS)
        self.refused(
            tiny_model_dir, folder, tmp_path / "out", r"model\.layers\.1\.mlp\.up_proj\.weight: .* not finite"
        )
