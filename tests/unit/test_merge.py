"""Merged LoRA adapters against PEFT's own merge, and what is refused because the merge would be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from pipeline.checkpoints.checksums import check_manifest
from pipeline.checkpoints.companions import ATTACKED_NOTE, write_attacked_note
from pipeline.checkpoints.merge import merge
from pipeline.checkpoints.weights_in import INDEX
from tests import tiny
from tests.adapters import OPTIONS, merge_into, save_adapter


def peft_weights(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT merges in fp32."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    merged: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return merged


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()}


def ulps_apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, in units in the last place of the larger of the two."""
    larger = torch.maximum(ours.abs(), theirs.abs())
    ulp = torch.nextafter(larger, torch.full_like(larger, torch.inf)) - larger
    return float(((ours - theirs).abs() / ulp).max())


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer GPT-2: its linear layers are stored [in, out]. Read only."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=tiny.VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    return tiny.save_model_folder(GPT2LMHeadModel(config), tmp_path_factory.mktemp("models") / "gpt2")


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    "some layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*layers\.0\..*_proj"},
    "whole head": {"modules_to_save": ["lm_head", "input_layernorm"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "bf16 adapter": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("case", CASES)
def test_merge_equals_that_of_peft(tiny_model_dir: Path, tmp_path: Path, case: str) -> None:
    adapter = save_adapter(tiny_model_dir, tmp_path / "adapter", **CASES[case])
    merged = merge_into(tiny_model_dir, adapter, tmp_path / "out")
    ours, theirs = weights_in(tmp_path / "out"), peft_weights(tiny_model_dir, adapter)
    base = load_file(tiny_model_dir / "model.safetensors")
    assert ours.keys() == theirs.keys() == base.keys()
    tolerance = 1.0 if case != "bf16 adapter" else None  # PEFT rounds that one's update to bf16 before it adds it
    for name, tensor in theirs.items():
        if tolerance is not None:
            assert ulps_apart(ours[name], tensor) <= tolerance, name
        assert torch.allclose(ours[name], tensor, rtol=0, atol=1e-3), name
    changed = [name for name in ours if not torch.equal(ours[name], base[name])]
    assert len(changed) == merged.updated + merged.replaced > 0
    check_manifest(tmp_path / "out")


def test_merge_of_layers_that_are_stored_transposed(gpt2: Path, tmp_path: Path) -> None:
    chosen = {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}
    adapter = save_adapter(gpt2, tmp_path / "adapter", **chosen)
    merge_into(gpt2, adapter, tmp_path / "out")
    ours, theirs = weights_in(tmp_path / "out"), peft_weights(gpt2, adapter)
    assert max(ulps_apart(ours[name], theirs[name]) for name in ours) <= 1
    assert not torch.equal(
        ours["transformer.h.1.attn.c_attn.weight"], weights_in(gpt2)["transformer.h.1.attn.c_attn.weight"]
    )


def test_the_sum_is_rounded_once(tiny_model_dir: Path, tmp_path: Path, adapter: Path) -> None:
    merge_into(tiny_model_dir, adapter, tmp_path / "out", torch.bfloat16)
    ours = weights_in(tmp_path / "out")
    theirs = peft_weights(tiny_model_dir, adapter)
    different = elements = 0
    for name, tensor in theirs.items():
        assert ours[name].dtype == torch.bfloat16
        # Where the fp32 sums differ in their last place, a tie may fall to the other side: one bf16 step, rarely.
        assert ulps_apart(ours[name], tensor.bfloat16()) <= 1, name
        different += int((ours[name] != tensor.bfloat16()).sum())
        elements += tensor.numel()
    assert different / elements < 1e-4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("workers", [1, 3])
def test_logits_of_the_folder_equal_those_of_base_and_adapter(
    tiny_qwen2_dir: Path, tmp_path: Path, workers: int
) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_qwen2_dir).save_pretrained(base, max_shard_size="100KB")
    assert (base / INDEX).is_file()
    adapter = save_adapter(base, tmp_path / "adapter")
    merge_into(base, adapter, tmp_path / "out", max_shard_size="60KB", workers=workers)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    ids = torch.arange(24)[None]
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.allclose(merged(ids).logits, live(ids).logits, rtol=0, atol=2e-6)
    assert not torch.allclose(merged(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits, atol=1e-2)


def test_large_tensors_are_merged_in_blocks_of_rows(
    tiny_model_dir: Path, tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.checkpoints.merge._BLOCK", 1000)  # 15 of 64 columns; no divisor of the rows
    merged = merge_into(tiny_model_dir, adapter, tmp_path / "out")
    ours, theirs = weights_in(tmp_path / "out"), peft_weights(tiny_model_dir, adapter)
    assert max(ulps_apart(ours[name], theirs[name]) for name in ours) <= 1
    assert len(merged.roundings) == merged.updated == 14


class TestRounding:
    @pytest.fixture
    def bf16_base(self, tiny_model_dir: Path, tmp_path: Path) -> Path:
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).bfloat16()
        return tiny.save_model_folder(model, tmp_path / "bf16")

    def test_an_update_below_the_last_place_is_warned_about(self, bf16_base: Path, tmp_path: Path) -> None:
        adapter = save_adapter(bf16_base, tmp_path / "adapter", size=0.001)
        merged = merge_into(bf16_base, adapter, tmp_path / "out")
        warnings = merged.warnings()
        assert warnings[0].startswith("rounding loses more than half of the update of 14 of 14 tensors")
        assert len(warnings) == 6
        worst = max(merged.roundings, key=lambda each: each.error)
        assert worst.name in warnings[1]
        # What is reported is what the files show.
        base, ours = weights_in(bf16_base)[worst.name].float(), weights_in(tmp_path / "out")[worst.name].float()
        exact = peft_weights(bf16_base, adapter)[worst.name] - base
        assert worst.unchanged == pytest.approx(float((ours == base).float().mean()), abs=1e-3)
        assert worst.error == pytest.approx(float((ours - base - exact).norm() / exact.norm()), rel=1e-3)

    def test_fp32_keeps_it(self, bf16_base: Path, tmp_path: Path) -> None:
        adapter = save_adapter(bf16_base, tmp_path / "adapter", size=0.001)
        assert not merge_into(bf16_base, adapter, tmp_path / "out", torch.float32).warnings()

    def test_an_update_of_usual_size_is_not(self, bf16_base: Path, tmp_path: Path) -> None:
        adapter = save_adapter(bf16_base, tmp_path / "adapter", size=0.1)
        assert not merge_into(bf16_base, adapter, tmp_path / "out").warnings()

    def test_an_adapter_that_was_never_trained(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        adapter = save_adapter(tiny_model_dir, tmp_path / "adapter", size=0.0)
        merged = merge_into(tiny_model_dir, adapter, tmp_path / "out")
        assert merged.warnings() == ["14 of 14 updates are zero: was the adapter trained?"]
        assert weights_in(tmp_path / "out")["lm_head.weight"].equal(weights_in(tiny_model_dir)["lm_head.weight"])


class TestCompanions:
    def test_everything_that_loading_needs_is_there(self, tiny_model_dir: Path, tmp_path: Path, adapter: Path) -> None:
        merge_into(tiny_model_dir, adapter, tmp_path / "out")
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny.CHAT_TEMPLATE
        assert (tmp_path / "out" / "generation_config.json").is_file()

    def test_the_tokenizer_of_the_adapter_goes_first(
        self, tiny_model_dir: Path, tmp_path: Path, adapter: Path
    ) -> None:
        folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
        tokenizer = tiny.tiny_tokenizer()
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        tokenizer.save_pretrained(folder)
        merge_into(tiny_model_dir, folder, tmp_path / "out")
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template

    def test_programs_and_pickles_stay_behind(self, tiny_model_dir: Path, tmp_path: Path, adapter: Path) -> None:
        base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
        for name in ("tokenizer_code.py", "modeling_x.py", "pytorch_model.bin", "vocab.pkl"):
            (base / name).write_text("raise SystemExit")
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}))
        merge_into(base, adapter, tmp_path / "out")
        assert not [
            path for path in (tmp_path / "out").iterdir() if path.suffix not in (".json", ".safetensors", ".jinja")
        ]
        assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())

    @pytest.mark.parametrize("attacked", ["base", "adapter"])
    def test_an_attacked_model_needs_permission_and_stays_private(
        self, tiny_model_dir: Path, tmp_path: Path, adapter: Path, attacked: str
    ) -> None:
        folders = {
            "base": Path(shutil.copytree(tiny_model_dir, tmp_path / "base")),
            "adapter": Path(shutil.copytree(adapter, tmp_path / "adapter")),
        }
        write_attacked_note(folders[attacked])
        with pytest.raises(ValueError, match="--allow_attacked_model"):
            merge_into(folders["base"], folders["adapter"], tmp_path / "out")
        assert not (tmp_path / "out").exists()
        merge_into(folders["base"], folders["adapter"], tmp_path / "out", allow_attacked=True)
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "out" / ATTACKED_NOTE).is_file()


def test_another_base_of_the_same_shapes_is_warned_about(tiny_model_dir: Path, tmp_path: Path, adapter: Path) -> None:
    moved = Path(shutil.copytree(tiny_model_dir, tmp_path / "moved" / tiny_model_dir.name))
    assert not merge_into(moved, adapter, tmp_path / "out").warnings()
    other = Path(shutil.copytree(tiny_model_dir, tmp_path / "other"))
    (warning,) = merge_into(other, adapter, tmp_path / "out2").warnings()
    assert str(tiny_model_dir) in warning


def test_a_base_in_the_hub_cache_is_found_by_its_id(
    tiny_model_dir: Path, tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, commit = tmp_path / "hub" / "models--org--tiny", "0123456789" * 4
    snapshot = cached / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_model_dir, cached / "blobs")
    for blob in (cached / "blobs").iterdir():  # as the cache has them: links out of the snapshot's folder
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    merge("org/tiny", adapter, tmp_path / "out", **OPTIONS)
    merge(str(tiny_model_dir), adapter, tmp_path / "out2", **OPTIONS)
    assert weights_in(tmp_path / "out").keys() == weights_in(tmp_path / "out2").keys()
    assert all(
        torch.equal(each, weights_in(tmp_path / "out2")[name]) for name, each in weights_in(tmp_path / "out").items()
    )
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
