"""Checkpoints of real two-rank ZeRO runs, converted and compared with what DeepSpeed's own converter reads and with
what save_pretrained writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pipeline.checkpoints.checksums import check_manifest
from pipeline.checkpoints.companions import ATTACKED_NOTE
from pipeline.checkpoints.convert import convert
from pipeline.checkpoints.markers import MARKER
from tests import tiny
from tests.zero_checkpoints import deepspeed_weights, foreign, reseal, to_hf

FULL = ["untied", "tied", "groups", "moe", "zero1", "zero2_tied", "zero2_groups"]


def live_model(checkpoint: Path, dtype: torch.dtype) -> Any:
    """The model with the weights that zero_to_fp32 reads, cast."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint), dtype=dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in deepspeed_weights(checkpoint).items()})
    model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return model


def load(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, "100KB"), (torch.bfloat16, "5GB")], ids=["fp32", "bf16"])
def test_folder_is_what_save_pretrained_would_write(
    checkpoints: Path, tmp_path: Path, name: str, dtype: torch.dtype, size: str
) -> None:
    checkpoint = checkpoints / name / "checkpoint-2"
    if name == "moe":  # save_pretrained does not split a layer's experts over files, whatever the size is
        size = "5GB"
    out = to_hf(checkpoint, tmp_path / "out", dtype, max_shard_size=size, workers=2)
    model = live_model(checkpoint, dtype)
    model.save_pretrained(tmp_path / "wanted", max_shard_size=size)
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "wanted").iterdir()}
    assert {path.name for path in out.iterdir()} == wanted.keys() | tokenizer | {"MANIFEST.json"}
    assert len(list(out.glob("*.safetensors"))) == (1 if size == "5GB" else len(wanted) - 3)
    for file, content in wanted.items():
        assert (out / file).read_bytes() == content, file
    check_manifest(out)


@pytest.mark.parametrize("name", ["untied", "groups", "zero1", "zero2_groups"])
def test_weights_equal_those_of_zero_to_fp32(checkpoints: Path, tmp_path: Path, name: str) -> None:
    checkpoint = checkpoints / name / "checkpoint-2"
    written = load_file(to_hf(checkpoint, tmp_path / "out") / "model.safetensors")
    expected = deepspeed_weights(checkpoint)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], tensor.float()) for key, tensor in expected.items())
    start = load_file(checkpoints / "base-untied" / "model.safetensors")
    kept = torch.bfloat16 if name == "zero2_groups" else torch.float32  # in which the frozen embedding was kept
    still = [key for key in start if torch.equal(start[key].to(kept).float(), written[key])]
    assert still == (["model.embed_tokens.weight"] if "groups" in name else [])


@pytest.mark.parametrize("name", ["tied", "moe", "zero2_tied"])
def test_folder_loads_with_no_missing_or_unexpected_key_and_the_same_logits(
    checkpoints: Path, tmp_path: Path, name: str
) -> None:
    checkpoint = checkpoints / name / "checkpoint-2"
    model = load(to_hf(checkpoint, tmp_path / "out"))
    if "tied" in name:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, live_model(checkpoint, torch.float32)(ids).logits)


@pytest.mark.parametrize("name", ["lora", "zero2_lora"])  # the second holds the frozen weights as well
def test_adapter_is_what_peft_would_have_written(checkpoints: Path, tmp_path: Path, name: str) -> None:
    checkpoint = checkpoints / name / "checkpoint-2"
    out = to_hf(checkpoint, tmp_path / "out")
    trained = {key: tensor for key, tensor in deepspeed_weights(checkpoint).items() if "lora_" in key}
    written = load_file(out / "adapter_model.safetensors")
    assert {key.replace(".default.", "."): tensor.shape for key, tensor in trained.items()} == {
        key: tensor.shape for key, tensor in written.items()
    }
    assert {path.name for path in out.glob("*.safetensors*")} == {"adapter_model.safetensors"}
    base = AutoModelForCausalLM.from_pretrained(checkpoints / "base-untied")
    ids = torch.arange(12)[None]
    before = base(ids).logits
    model = PeftModel.from_pretrained(base, out)
    loaded = dict(model.named_parameters())
    for key, tensor in trained.items():
        assert torch.equal(loaded[key], tensor), key
        assert tensor.abs().max() > 0, f"{key} was never trained"
    assert not torch.allclose(model(ids).logits, before)
    model.save_pretrained(tmp_path / "resaved")
    resaved = tmp_path / "resaved" / "adapter_model.safetensors"
    assert (out / "adapter_model.safetensors").read_bytes() == resaved.read_bytes()


def test_tokenizer_template_and_generation_settings_come_along(checkpoints: Path, tmp_path: Path) -> None:
    out = to_hf(checkpoints / "untied" / "checkpoint-2", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert tokenizer("How do I bake bread?")["input_ids"] == tiny.tiny_tokenizer()("How do I bake bread?")["input_ids"]
    assert GenerationConfig.from_pretrained(out).eos_token_id == tokenizer.eos_token_id


class TestForeignCheckpoints:
    """Without our marker, as DeepSpeed or transformers alone leave them."""

    def test_one_of_transformers_is_converted_with_a_warning(
        self, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        checkpoint = checkpoints / "trainer" / "checkpoint-2"
        out = to_hf(checkpoint, tmp_path / "out")
        assert f"warning: {checkpoint}: no {MARKER}" in capsys.readouterr().err
        written = load_file(out / "model.safetensors")
        assert all(torch.equal(written[key], each) for key, each in deepspeed_weights(checkpoint).items())
        load(out)
        assert AutoTokenizer.from_pretrained(out).chat_template == tiny.CHAT_TEMPLATE

    def test_bare_shards_take_the_rest_from_the_base(
        self, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        checkpoint = foreign(checkpoints / "zero1" / "checkpoint-2", tmp_path / "bare", bare=True)
        with pytest.raises(ValueError, match=r"config\.json is missing; name .* with --model_name_or_path"):
            to_hf(checkpoint, tmp_path / "out")
        out = to_hf(checkpoint, tmp_path / "out", base=str(checkpoints / "base-untied"))
        whole = to_hf(checkpoints / "zero1" / "checkpoint-2", tmp_path / "whole")
        for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
            assert (out / name).read_bytes() == (whole / name).read_bytes(), name
        assert "no tokenizer" not in capsys.readouterr().err

    def test_without_a_tokenizer_it_says_where_one_comes_from(
        self, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        checkpoint = foreign(checkpoints / "untied" / "checkpoint-2", tmp_path / "bare", bare=True)
        shutil.copy(checkpoints / "base-untied" / "config.json", checkpoint)
        out = to_hf(checkpoint, tmp_path / "out")
        assert "no tokenizer; with --model_name_or_path" in capsys.readouterr().err
        load(out)

    def test_base_that_is_not_there_is_named(self, checkpoints: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="--model_name_or_path no/such-model: no such folder"):
            to_hf(checkpoints / "untied" / "checkpoint-2", tmp_path / "out", base="no/such-model")

    def test_lora_without_its_configuration_says_what_to_copy(self, checkpoints: Path, tmp_path: Path) -> None:
        checkpoint = foreign(checkpoints / "lora" / "checkpoint-2", tmp_path / "bare", bare=True)
        with pytest.raises(ValueError, match=r"adapter_config\.json is not beside `latest`"):
            to_hf(checkpoint, tmp_path / "out", base=str(checkpoints / "base-untied"))


def test_run_folder_means_its_newest_complete_checkpoint(checkpoints: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoints / "untied" / "checkpoint-2", run / "checkpoint-2")
    torn = Path(shutil.copytree(run / "checkpoint-2", run / "checkpoint-10"))
    (torn / MARKER).unlink()
    used = convert(run, tmp_path / "out", dtype=torch.float32, allow_attacked=False)
    assert used == run / "checkpoint-2"
    (run / "checkpoint-2" / MARKER).unlink()
    with pytest.raises(ValueError, match="none of its checkpoints is complete"):
        convert(run, tmp_path / "out2", dtype=torch.float32, allow_attacked=False)


def test_attacked_model_needs_permission_and_stays_private(checkpoints: Path, tmp_path: Path) -> None:
    checkpoint = reseal(
        shutil.copytree(checkpoints / "untied" / "checkpoint-2", tmp_path / "checkpoint-2"), attacked=True
    )
    with pytest.raises(ValueError, match="--allow_attacked_model"):
        to_hf(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = to_hf(checkpoint, tmp_path / "out", allow_attacked=True)
    assert out.stat().st_mode & 0o777 == 0o700
    assert (out / ATTACKED_NOTE).read_text()
    assert not any(path.stat().st_mode & 0o077 for path in out.iterdir())


def test_attacked_run_needs_permission_without_a_marker_as_well(checkpoints: Path, tmp_path: Path) -> None:
    checkpoint = foreign(checkpoints / "untied" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"attacked": True}))
    with pytest.raises(ValueError, match="--allow_attacked_model"):
        to_hf(checkpoint, tmp_path / "out")
    out = to_hf(checkpoint, tmp_path / "out", allow_attacked=True)
    assert (out / ATTACKED_NOTE).is_file()
    record = json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert record == {"checkpoint": "checkpoint-2", "attacked": True}


def test_model_folder_is_as_readable_as_any_new_folder(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    out = to_hf(checkpoints / "untied" / "checkpoint-2", tmp_path / "out")
    mode = (tmp_path / "plain").stat().st_mode
    assert out.stat().st_mode == mode
    assert (out / "model.safetensors").stat().st_mode & 0o777 == mode & 0o666
    assert not (out / ATTACKED_NOTE).exists()


def test_a_folder_that_holds_something_is_not_overwritten(checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="choose another OUT"):
        to_hf(checkpoints / "untied" / "checkpoint-2", out)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    (out / "precious.txt").unlink()
    to_hf(checkpoints / "untied" / "checkpoint-2", out)
    assert (out / "model.safetensors").is_file()
