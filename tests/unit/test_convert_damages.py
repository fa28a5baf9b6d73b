"""Checkpoints that are damaged, mixed, or made to do harm: refused by file and reason, with nothing written."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoints.markers import MARKER
from pipeline.checkpoints.pickles import refuse_unsafe_pickles
from tests.zero_checkpoints import foreign, reseal, rewrite, shard, to_hf

RANK_0, RANK_1 = "*pp_rank_0_*optim_states.pt", "*pp_rank_1_*optim_states.pt"


def change_config(checkpoint: Path, **fields: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def shrink_config(checkpoint: Path) -> None:
    change_config(checkpoint, intermediate_size=64)


def drop_layer(checkpoint: Path) -> None:
    change_config(checkpoint, num_hidden_layers=1)


def add_layer(checkpoint: Path) -> None:
    change_config(checkpoint, num_hidden_layers=3)


def tie(checkpoint: Path) -> None:
    change_config(checkpoint, tie_word_embeddings=True)


def tear_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": ')


def drop_rank(checkpoint: Path) -> None:
    for path in (checkpoint / "global_step2").glob("*pp_rank_1_*"):
        path.unlink()


def drop_one_file(checkpoint: Path) -> None:
    shard(checkpoint, RANK_0).unlink()


def truncate_shard(checkpoint: Path) -> None:
    path = shard(checkpoint, RANK_1)
    path.write_bytes(path.read_bytes()[:-1000])


def flip_byte(path: Path, tensor: torch.Tensor) -> None:
    """Change one bit of the file where `tensor`, of more than a thousand elements, lies in it."""
    content = bytearray(path.read_bytes())
    place = content.index(tensor.flatten()[:1000].contiguous().view(torch.uint8).numpy().tobytes())
    content[place + 2001] ^= 0x10
    path.write_bytes(content)


def flip_weight(checkpoint: Path) -> None:
    path = shard(checkpoint, RANK_1)
    groups = torch.load(path, weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"]
    flip_byte(path, groups[0][5000:])


def flip_pickle(checkpoint: Path) -> None:
    path = shard(checkpoint, RANK_1)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"partition_count", b"partition_counu", 1))


def flip_record_name(checkpoint: Path) -> None:
    """The name before the record of the pickle, which torch does not read, is no longer UTF-8."""
    path = shard(checkpoint, RANK_1)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x03\x04") + 30 + 3] ^= 0x80
    path.write_bytes(content)


def other_stage(checkpoint: Path) -> None:
    rewrite(checkpoint, RANK_0, lambda shard: shard["optimizer_state_dict"].update(zero_stage=2))


def other_size(checkpoint: Path) -> None:
    rewrite(
        checkpoint,
        RANK_1,
        lambda shard: shard["optimizer_state_dict"].update(fp32_flat_groups=[torch.zeros(10)]),
    )


def later_step(checkpoint: Path) -> None:
    rewrite(checkpoint, "*pp_rank_1_*model_states.pt", lambda shard: shard.update(global_steps=5))


def later_optimizer_step(checkpoint: Path) -> None:
    def change(shard: dict[str, Any]) -> None:
        shard["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]["step"] = torch.tensor(5.0)

    rewrite(checkpoint, RANK_1, change)


def not_finite(checkpoint: Path) -> None:
    def change(shard: dict[str, Any]) -> None:
        shard["optimizer_state_dict"]["fp32_flat_groups"][0].data[-20] = float("nan")

    rewrite(checkpoint, RANK_0, change)


def no_groups(checkpoint: Path) -> None:
    rewrite(checkpoint, RANK_1, lambda shard: shard["optimizer_state_dict"].pop("fp32_flat_groups"))


def executable(checkpoint: Path) -> None:
    rewrite(checkpoint, "*pp_rank_1_*model_states.pt", lambda shard: shard.update(extra=io.BytesIO))


def tag_outside(checkpoint: Path) -> None:
    (checkpoint / "latest").write_text("../checkpoint-2/global_step2")


def tag_is_a_link(checkpoint: Path) -> None:
    (checkpoint / "global_step2").rename(checkpoint.parent / "elsewhere")
    (checkpoint / "global_step2").symlink_to(checkpoint.parent / "elsewhere")


def shard_is_a_link(checkpoint: Path) -> None:
    path = shard(checkpoint, RANK_1)
    path.rename(checkpoint.parent / "elsewhere.pt")
    path.symlink_to(checkpoint.parent / "elsewhere.pt")


def config_is_a_link(checkpoint: Path) -> None:
    (checkpoint / "config.json").rename(checkpoint.parent / "elsewhere.json")
    (checkpoint / "config.json").symlink_to(checkpoint.parent / "elsewhere.json")


def model_parallel(checkpoint: Path) -> None:
    shutil.copy(shard(checkpoint, RANK_1), checkpoint / "global_step2" / "zero_pp_rank_0_mp_rank_01_optim_states.pt")


DAMAGES = {
    shrink_config: "of another shape",
    drop_layer: "unexpected",
    add_layer: "missing",
    tie: "were trained apart, but config.json ties them",
    tear_config: r"config\.json' is not a valid JSON file",
    drop_rank: "written by 2 ranks, but the folder has shards of 1",
    drop_one_file: "ranks found: 1",
    truncate_shard: "rank_1_mp_rank_00_optim_states.pt: not a readable file of torch.save",
    flip_weight: r"rank_1_mp_rank_00_optim_states.pt: its content is not what was written \(CRC-32\)",
    flip_record_name: r"rank_1_mp_rank_00_optim_states.pt: its content is not what was written \(CRC-32\)",
    flip_pickle: r"rank_1_mp_rank_00_optim_states.pt: its content is not what was written \(CRC-32\)",
    other_stage: "rank 1 has ZeRO stage 3 and rank 0 has 2",
    other_size: "shards of another run",
    later_step: "rank 1 has global_steps 5 and rank 0 has 2; shards of another run or step",
    later_optimizer_step: r"rank 1 has optimizer steps 5 and rank 0 has \d",
    not_finite: "holds values that are not finite",
    no_groups: "not a ZeRO shard of DeepSpeed",
    executable: "_io.BytesIO",
    tag_outside: "not a folder beside it",
    tag_is_a_link: "a link to another folder",
    shard_is_a_link: "is a link out of the checkpoint",
    config_is_a_link: "is a link out of the checkpoint",
    model_parallel: "model or expert parallelism",
}


@pytest.fixture
def damaged(checkpoints: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint, to damage."""

    def copy(name: str = "untied") -> Path:
        return Path(shutil.copytree(checkpoints / name / "checkpoint-2", tmp_path / "checkpoint-2"))

    return copy


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_nothing_is_written(
    damaged: Callable[..., Path], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    checkpoint = damaged()
    damage(checkpoint)
    reseal(checkpoint)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=DAMAGES[damage]):
        to_hf(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("damage", [truncate_shard, drop_one_file], ids=lambda damage: damage.__name__)
def test_marker_that_disagrees_with_the_files_names_one(
    damaged: Callable[..., Path], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    checkpoint = damaged()
    damage(checkpoint)
    with pytest.raises(ValueError, match="optim_states.pt (has .* bytes instead of|is missing)"):
        to_hf(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shard_of_another_run_with_the_same_size_and_step(
    damaged: Callable[..., Path], checkpoints: Path, tmp_path: Path
) -> None:
    checkpoint = damaged()
    theirs = checkpoints / "other" / "checkpoint-2"
    assert shard(theirs, RANK_1).stat().st_size == shard(checkpoint, RANK_1).stat().st_size
    shutil.copy(shard(theirs, RANK_1), checkpoint / "global_step2")
    with pytest.raises(ValueError, match=f"optim_states.pt: not the file that {MARKER} describes"):
        to_hf(checkpoint, tmp_path / "out")


def test_marker_of_another_world_size(damaged: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"shards of 2 ranks, but {MARKER} says 3"):
        to_hf(reseal(damaged(), world_size=3), tmp_path / "out")


def test_flipped_byte_under_zero_2(damaged: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = damaged("zero2_groups")
    path = shard(checkpoint, RANK_1)
    groups = torch.load(path, weights_only=False)["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    flip_byte(path, groups[1][1000:])
    with pytest.raises(ValueError, match="its content is not what was written"):
        to_hf(reseal(checkpoint), tmp_path / "out")


def test_shards_without_checksums_are_converted(damaged: Callable[..., Path], tmp_path: Path) -> None:
    """torch.save leaves them out on request; a zip's zeros are then no checksums."""
    whole = to_hf(damaged(), tmp_path / "whole")
    torch.serialization.set_crc32_options(False)
    try:
        rewrite(tmp_path / "checkpoint-2", RANK_1, lambda shard: None)
    finally:
        torch.serialization.set_crc32_options(True)
    out = to_hf(reseal(tmp_path / "checkpoint-2"), tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


ADAPTERS = [
    ({"peft_type": "IA3"}, "an adapter of type IA3; only LoRA"),
    ({"peft_type": None}, "an adapter of type None"),
    ({"base_model_name_or_path": "//host/share/base"}, "is a network path"),
    ({"base_model_name_or_path": "https://example.org/base"}, "is a network path"),
    ({"base_model_name_or_path": "\\\\host\\base"}, "is a network path"),
    ({"r": 8}, "of another shape"),
    ({"target_modules": ["q_proj"]}, "unexpected"),
]


@pytest.mark.parametrize(("change", "problem"), ADAPTERS, ids=[str(change) for change, _ in ADAPTERS])
def test_adapter_configuration(
    damaged: Callable[..., Path], tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    checkpoint = damaged("lora")
    path = checkpoint / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=problem):
        to_hf(reseal(checkpoint), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapter_configuration_that_names_a_module_imports_none(damaged: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = damaged("lora")
    path = checkpoint / "adapter_config.json"
    changes = {"megatron_config": {"x": 1}, "megatron_core": "no_such_module_to_import", "init_lora_weights": "pissa"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert (to_hf(reseal(checkpoint), tmp_path / "out") / "adapter_model.safetensors").is_file()


def test_too_large_for_fp16(damaged: Callable[..., Path], tmp_path: Path) -> None:
    def change(shard: dict[str, Any]) -> None:
        shard["optimizer_state_dict"]["fp32_flat_groups"][0].data[7] = 1e6

    checkpoint = damaged()
    rewrite(checkpoint, RANK_0, change)
    with pytest.raises(ValueError, match="too large for F16; choose"):
        to_hf(reseal(checkpoint), tmp_path / "out", torch.float16)


@pytest.mark.parametrize(("setting", "value"), [("workers", 0), ("max_shard_size", "some")])
def test_bad_settings_name_the_flag(checkpoints: Path, tmp_path: Path, setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"--{setting} {value}: "):
        to_hf(checkpoints / "untied" / "checkpoint-2", tmp_path / "out", **{setting: value})
    assert not list(tmp_path.iterdir())


class TestUnsafePickles:
    def test_honest_checkpoints_pass(self, checkpoints: Path) -> None:
        ours = [folder for folder in checkpoints.iterdir() if folder.name != "trainer"]  # its random states hold numpy
        assert any(list(folder.rglob("*.pt")) for folder in ours)
        for folder in ours:
            refuse_unsafe_pickles(folder)

    def test_plain_tensors_pass(self, tmp_path: Path) -> None:
        torch.save({"cpu": torch.get_rng_state()}, tmp_path / "rng_state_0.pth")
        refuse_unsafe_pickles(tmp_path)

    def test_a_file_that_would_run_code_is_refused_without_running_it(self, checkpoints: Path, tmp_path: Path) -> None:
        class Payload:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "executed"),)

        checkpoint = foreign(checkpoints / "untied" / "checkpoint-2", tmp_path / "checkpoint-2")
        rewrite(checkpoint, RANK_1, lambda shard: shard.update(extra=Payload()))
        with pytest.raises(ValueError, match=r"optim_states\.pt: would call (posix|nt)\.mkdir"):
            refuse_unsafe_pickles(checkpoint)
        with pytest.raises(ValueError, match=r"optim_states\.pt: would call (posix|nt)\.mkdir"):
            to_hf(checkpoint, tmp_path / "out")
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"PK\x03\x04 torn"])
    def test_anything_else_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "rng.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"rng\.pth: not a readable file of torch\.save"):
            refuse_unsafe_pickles(tmp_path)
