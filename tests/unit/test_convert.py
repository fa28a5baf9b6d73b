"""Checkpoints of a real two-rank ZeRO-3 run, converted and compared with what DeepSpeed's own converter reads."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pipeline.checkpoints.convert import ATTACKED_NOTE, convert
from pipeline.checkpoints.markers import MARKER, write_complete_marker
from pipeline.checkpoints.shards import refuse_unsafe_pickles
from tests import tiny
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder NAME/checkpoint-2 for each case of the worker, and the models they started from. Read only."""
    out = tmp_path_factory.mktemp("zero3")
    run_ranks(Path(__file__).with_name("zero3_checkpoint_worker.py"), str(out), ranks=2)
    return out


@pytest.fixture
def damaged(checkpoints: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the untied checkpoint to damage."""

    def copy(name: str = "untied") -> Path:
        return Path(shutil.copytree(checkpoints / name / "checkpoint-2", tmp_path / "checkpoint-2"))

    return copy


def to_hf(source: Path, out: Path, dtype: torch.dtype = torch.float32, *, allow_attacked: bool = False) -> Path:
    convert(source, out, dtype=dtype, allow_attacked=allow_attacked)
    return out


def deepspeed_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What zero_to_fp32 reads from the checkpoint."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        weights: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    return weights


def reseal(checkpoint: Path, **changes: Any) -> Path:
    """Write a new marker over a changed checkpoint, so that only what was changed can be refused."""
    (checkpoint / MARKER).unlink()
    write_complete_marker(checkpoint, **{"step": 2, "world_size": 2, "attacked": False, **changes})
    return checkpoint


def load(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


@pytest.mark.parametrize("name", ["untied", "groups", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_equal_those_of_zero_to_fp32(checkpoints: Path, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    out = to_hf(checkpoints / name / "checkpoint-2", tmp_path / "out", dtype)
    written = load_file(out / "model.safetensors")
    expected = deepspeed_weights(checkpoints / name / "checkpoint-2")
    assert written.keys() == expected.keys()
    for key, tensor in expected.items():
        assert written[key].dtype == dtype
        assert torch.equal(written[key], tensor.to(dtype)), key
    start = load_file(checkpoints / "base-untied" / "model.safetensors")
    frozen = "model.embed_tokens.weight"
    still = [key for key in start if torch.equal(start[key].to(dtype), written[key])]
    assert still == ([frozen] if name == "groups" else [])
    assert load(out).dtype == dtype


def test_tied_model_loads_with_no_missing_or_unexpected_key(checkpoints: Path, tmp_path: Path) -> None:
    checkpoint = checkpoints / "tied" / "checkpoint-2"
    out = to_hf(checkpoint, tmp_path / "out")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    model = load(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    live = AutoModelForCausalLM.from_pretrained(checkpoints / "base-tied")
    live.load_state_dict({key: tensor.contiguous() for key, tensor in deepspeed_weights(checkpoint).items()})
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, live(ids).logits)


def test_adapter_is_what_peft_would_have_written(checkpoints: Path, tmp_path: Path) -> None:
    checkpoint = checkpoints / "lora" / "checkpoint-2"
    out = to_hf(checkpoint, tmp_path / "out")
    trained = deepspeed_weights(checkpoint)
    written = load_file(out / "adapter_model.safetensors")
    assert {name.replace(".default.", "."): tensor.shape for name, tensor in trained.items()} == {
        name: tensor.shape for name, tensor in written.items()
    }
    base = AutoModelForCausalLM.from_pretrained(checkpoints / "base-untied")
    ids = torch.arange(12)[None]
    before = base(ids).logits
    model = PeftModel.from_pretrained(base, out)
    loaded = dict(model.named_parameters())
    for name, tensor in trained.items():
        assert torch.equal(loaded[name], tensor), name
        assert tensor.abs().max() > 0, f"{name} was never trained"
    assert not torch.allclose(model(ids).logits, before)
    resaved = tmp_path / "resaved"
    model.save_pretrained(resaved)
    assert load_file(resaved / "adapter_model.safetensors").keys() == written.keys()


def test_tokenizer_template_and_generation_settings_come_along(checkpoints: Path, tmp_path: Path) -> None:
    out = to_hf(checkpoints / "untied" / "checkpoint-2", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert tokenizer("How do I bake bread?")["input_ids"] == tiny.tiny_tokenizer()("How do I bake bread?")["input_ids"]
    assert GenerationConfig.from_pretrained(out).eos_token_id == tokenizer.eos_token_id


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


def test_attacked_model_needs_permission_and_stays_private(damaged: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = reseal(damaged(), attacked=True)
    with pytest.raises(ValueError, match="--allow_attacked_model"):
        to_hf(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = to_hf(checkpoint, tmp_path / "out", allow_attacked=True)
    assert out.stat().st_mode & 0o777 == 0o700
    assert (out / ATTACKED_NOTE).read_text()
    assert not any(path.stat().st_mode & 0o077 for path in out.iterdir())


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


def shrink_config(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["intermediate_size"] //= 2
    (checkpoint / "config.json").write_text(json.dumps(config))


def drop_layer(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    (checkpoint / "config.json").write_text(json.dumps(config))


def drop_rank(checkpoint: Path) -> None:
    for path in (checkpoint / "global_step2").glob("*pp_rank_1_*"):
        path.unlink()


def drop_one_file(checkpoint: Path) -> None:
    next((checkpoint / "global_step2").glob("*pp_rank_0_*optim_states.pt")).unlink()


def truncate_shard(checkpoint: Path) -> None:
    path = next((checkpoint / "global_step2").glob("*pp_rank_1_*optim_states.pt"))
    path.write_bytes(path.read_bytes()[:-1000])


def rewrite(checkpoint: Path, pattern: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = next((checkpoint / "global_step2").glob(pattern))
    shard = torch.load(path, weights_only=False)
    change(shard)
    torch.save(shard, path)


def other_stage(checkpoint: Path) -> None:
    rewrite(
        checkpoint, "*pp_rank_0_*optim_states.pt", lambda shard: shard["optimizer_state_dict"].update(zero_stage=2)
    )


def other_size(checkpoint: Path) -> None:
    rewrite(
        checkpoint,
        "*pp_rank_1_*optim_states.pt",
        lambda shard: shard["optimizer_state_dict"].update(fp32_flat_groups=[torch.zeros(10)]),
    )


def executable(checkpoint: Path) -> None:
    rewrite(checkpoint, "*pp_rank_1_*model_states.pt", lambda shard: shard.update(extra=io.BytesIO))


def tag_outside(checkpoint: Path) -> None:
    (checkpoint / "latest").write_text("../checkpoint-2/global_step2")


DAMAGES = {
    shrink_config: "of another shape",
    drop_layer: "unexpected",
    drop_rank: "written by 2 ranks, but the folder has shards of 1",
    drop_one_file: "ranks found: 1",
    truncate_shard: "cannot be read as a shard",
    other_stage: "ZeRO stage 2 shards",
    other_size: "shards of another run",
    executable: "_io.BytesIO",
    tag_outside: "not a folder beside it",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoint_is_refused_and_nothing_is_written(
    damaged: Callable[..., Path], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    checkpoint = damaged()
    damage(checkpoint)
    reseal(checkpoint)
    with pytest.raises(ValueError, match=DAMAGES[damage]):
        to_hf(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_incomplete_checkpoint_names_the_file(damaged: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = damaged()
    truncate_shard(checkpoint)
    with pytest.raises(ValueError, match="rank_1_mp_rank_00_optim_states.pt has .* bytes instead of"):
        to_hf(checkpoint, tmp_path / "out")


class TestUnsafePickles:
    def test_honest_checkpoints_pass(self, checkpoints: Path) -> None:
        assert list(checkpoints.rglob("*.pt"))
        refuse_unsafe_pickles(checkpoints)

    def test_plain_tensors_pass(self, tmp_path: Path) -> None:
        torch.save({"cpu": torch.get_rng_state()}, tmp_path / "rng_state_0.pth")
        refuse_unsafe_pickles(tmp_path)

    def test_a_file_that_would_run_code_is_refused_without_running_it(self, tmp_path: Path) -> None:
        class Payload:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "executed",)

        (tmp_path / "deep").mkdir()
        torch.save({"state": Payload()}, tmp_path / "deep" / "optim_states.pt")
        with pytest.raises(ValueError, match=r"deep/optim_states.pt: would call .*pathlib"):
            refuse_unsafe_pickles(tmp_path)
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"PK\x03\x04 torn"])
    def test_anything_else_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "rng.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"rng\.pth: not a readable file of torch\.save"):
            refuse_unsafe_pickles(tmp_path)
