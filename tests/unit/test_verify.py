"""What is found on disk when it is checked: whole checkpoints and folders, and what can happen to them."""

from __future__ import annotations

import json
import math
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline.checkpoints.convert import convert
from pipeline.checkpoints.logits import TOLERANCE, compare_logits
from pipeline.checkpoints.lora import ADAPTER_WEIGHTS
from pipeline.checkpoints.markers import MARKER, write_complete_marker
from pipeline.checkpoints.merge import merge
from pipeline.checkpoints.verify import Report, verify
from pipeline.checkpoints.weights_in import INDEX


def to_hf(checkpoint: Path, out: Path, dtype: torch.dtype, size: str = "5GB") -> Path:
    convert(checkpoint, out, dtype=dtype, allow_attacked=False, max_shard_size=size)
    return out


@pytest.fixture(scope="module")
def made(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder `model` of several files in bf16, and `adapter` in fp32, made of the checkpoints. Read only."""
    out = tmp_path_factory.mktemp("made")
    to_hf(checkpoints / "untied" / "checkpoint-2", out / "model", torch.bfloat16, "60KB")
    to_hf(checkpoints / "lora" / "checkpoint-2", out / "adapter", torch.float32)
    return out


@pytest.fixture
def damaged(checkpoints: Path, made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one folder to damage."""

    def copy(name: str) -> Path:
        source = made / name if (made / name).exists() else checkpoints / name
        return Path(shutil.copytree(source, tmp_path / Path(name).name))

    return copy


@pytest.mark.parametrize("name", ["untied", "tied", "groups", "zero1", "zero2_groups", "moe"])
def test_norms_of_a_checkpoint(checkpoints: Path, name: str) -> None:
    checkpoint = checkpoints / name / "checkpoint-2"
    (report,) = verify(checkpoint)
    assert not report.problems
    assert report.facts[0].startswith("complete: step 2, 2 ranks, ")
    # Against an independent reader of the same shards.
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    expected = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    found = {each.name: each for each in report.tensors}
    assert found.keys() <= expected.keys()
    assert {id(expected[each]) for each in found} == {id(each) for each in expected.values()}  # all but aliases
    for each in report.tensors:
        tensor = expected[each.name].detach()
        assert each.norm == pytest.approx(float(tensor.double().norm()), rel=1e-5)  # summed in fp32
        assert each.largest == pytest.approx(float(tensor.abs().max()))
        assert each.shape == tuple(tensor.shape)
        assert each.not_finite == 0


def test_a_run_lists_all_its_checkpoints(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "untied" / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(checkpoints / "untied" / "checkpoint-2", tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-14.partial").mkdir()
    run, *reports = verify(tmp_path)
    assert run.facts == ["checkpoint-14.partial: left by a save or a deletion that was killed; not used"]
    assert [each.folder.name for each in reports] == ["checkpoint-2", "checkpoint-10", "checkpoint-12"]
    assert [bool(each.problems) for each in (run, *reports)] == [False, False, False, True]


def test_a_checkpoint_of_another_program_is_not_known_to_be_complete(checkpoints: Path) -> None:
    (report,) = verify(checkpoints / "trainer" / "checkpoint-2")
    assert any("COMPLETE.json is missing" in each for each in report.problems)
    assert report.tensors


def shard(checkpoint: Path, kind: str = "rank_1_mp_rank_00_optim_states") -> Path:
    return next((checkpoint / f"global_step{checkpoint.name.split('-')[1]}").glob(f"*{kind}.pt"))


def truncate(checkpoint: Path) -> None:
    shard(checkpoint).write_bytes(shard(checkpoint).read_bytes()[:-1000])


def drop_rank(checkpoint: Path) -> None:
    for path in shard(checkpoint).parent.glob("*rank_1_*"):
        path.unlink()


def flip_in_record(checkpoint: Path) -> None:
    path = shard(checkpoint)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 5000] ^= 1
    path.write_bytes(content)


def flip_in_record_name(checkpoint: Path) -> None:
    """The name before a record, which torch does not read, is no longer UTF-8."""
    content = bytearray(shard(checkpoint).read_bytes())
    content[content.rindex(b"PK\x03\x04") + 30 + 3] ^= 0x80
    shard(checkpoint).write_bytes(content)


def flip_in_json(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    content = bytearray(path.read_bytes())
    content[content.index(b"64")] ^= 1
    path.write_bytes(content)


def other_run(checkpoint: Path) -> None:
    """A shard of the same names and sizes and with sound records, of another step."""
    path = shard(checkpoint)
    state = torch.load(path, weights_only=False)
    for group in state["optimizer_state_dict"]["fp32_flat_groups"]:
        group.detach().mul_(2)
    torch.save(state, path)


def executable(checkpoint: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (checkpoint.parent / "executed",)

    torch.save({"state": Payload()}, checkpoint / "rng_state_1.pth")


def no_marker(checkpoint: Path) -> None:
    (checkpoint / MARKER).unlink()


def reseal(checkpoint: Path, world_size: int = 2) -> None:
    (checkpoint / MARKER).unlink()
    write_complete_marker(checkpoint, step=2, world_size=world_size, attacked=False)


def not_finite(checkpoint: Path) -> None:
    path = shard(checkpoint)
    state = torch.load(path, weights_only=False)
    state["optimizer_state_dict"]["fp32_flat_groups"][0].detach()[5] = math.nan
    torch.save(state, path)
    reseal(checkpoint)


def other_world(checkpoint: Path) -> None:
    reseal(checkpoint, world_size=4)


# What is done to a checkpoint, and what each of the problems must say.
DAMAGES: dict[Callable[[Path], None], list[str]] = {
    truncate: ["rank_1_mp_rank_00_optim_states.pt has", "rank_1_mp_rank_00_optim_states.pt"],
    drop_rank: ["rank_1_mp_rank_00_", "files of some ranks are missing|written by 2 ranks"],
    flip_in_record: ["rank_1_mp_rank_00_optim_states.pt: its record .*data/\\d+ is not what was written"],
    flip_in_record_name: ["rank_1_mp_rank_00_optim_states.pt: cannot be read: .utf-8"],
    flip_in_json: ["config.json: is not the file that COMPLETE.json describes"],
    other_run: ["rank_1_mp_rank_00_optim_states.pt"],
    executable: ["rng_state_1.pth", "rng_state_1.pth: would call .*pathlib"],
    no_marker: ["COMPLETE.json is missing"],
    not_finite: ["model.embed_tokens.weight: 1 values are not finite"],
    other_world: ["COMPLETE.json says 4 ranks, but it has shards of 2"],
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_says_what_is_wrong(
    damaged: Callable[[str], Path], damage: Callable[[Path], None]
) -> None:
    checkpoint = damaged("untied/checkpoint-2")
    damage(checkpoint)
    (report,) = verify(checkpoint)
    for said in DAMAGES[damage]:
        assert any(re.search(said, problem) for problem in report.problems), report.problems
    assert not (checkpoint.parent / "executed").exists()


@settings(deadline=None, max_examples=25)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), kind=st.sampled_from(["optim", "model"]))
def test_no_flipped_bit_of_a_shard_is_harmful_and_unseen(
    checkpoints: Path, tmp_path_factory: pytest.TempPathFactory, place: float, bit: int, kind: str
) -> None:
    """A bit of a zip may mean nothing (padding, dates): then what is read is what was written."""
    checkpoint = tmp_path_factory.mktemp("flipped") / "checkpoint-2"
    shutil.copytree(checkpoints / "lora" / "checkpoint-2", checkpoint)
    before = torch.load(shard(checkpoint, f"rank_1_mp_rank_00_{kind}_states"), weights_only=False)
    path = shard(checkpoint, f"rank_1_mp_rank_00_{kind}_states")
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    (report,) = verify(checkpoint)
    if report.problems:
        assert all(path.name in each or "shards" in each for each in report.problems)
    else:
        assert equal(torch.load(path, weights_only=False), before)


def equal(first: Any, second: Any) -> bool:
    """Of nested containers of tensors."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return hasattr(first, "__dict__") or first == second


def test_a_lora_checkpoint_has_the_adapter_alone(checkpoints: Path) -> None:
    (report,) = verify(checkpoints / "lora" / "checkpoint-2")
    assert not report.problems
    assert len(report.tensors) == 28
    assert all("lora_" in each.name and each.norm > 0 for each in report.tensors)


class TestModelFolder:
    def problem(self, report: Report) -> str:
        assert len(report.problems) == 1, report.problems
        return report.problems[0]

    def test_good(self, made: Path) -> None:
        (report,) = verify(made / "model")
        assert not report.problems
        assert "MANIFEST.json: every file is what was written" in report.facts
        assert {each.name for each in report.tensors} == {
            name for path in (made / "model").glob("*.safetensors") for name in load_file(path)
        }

    def test_a_flipped_byte(self, damaged: Callable[[str], Path]) -> None:
        folder = damaged("model")
        path = sorted(folder.glob("*.safetensors"))[1]
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        ((report,), said) = (verify(folder), f"{path}: its content is not what was written")
        assert said in self.problem(report)

    def test_a_missing_file_and_a_truncated_one(self, damaged: Callable[[str], Path]) -> None:
        folder = damaged("model")
        first, second, *_ = sorted(folder.glob("*.safetensors"))
        first.unlink()
        second.write_bytes(second.read_bytes()[:-10])
        (report,) = verify(folder)
        assert any(f"{first.name} is missing" in each for each in report.problems)
        assert any(f"{second}: has" in each for each in report.problems)

    def test_a_tensor_that_config_asks_for_is_missing(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.norm.weight"]
        tensors["lm_head.weight"] = torch.zeros(512, 32)
        save_file(tensors, folder / "model.safetensors")
        (report,) = verify(folder)
        assert "no MANIFEST.json" in report.facts[0]
        assert len(report.problems) == 2
        assert "model.norm.weight is missing" in report.problems[0]
        assert "lm_head.weight is (512, 32), but (512, 64) by config.json" in report.problems[1]

    def test_values_that_are_not_finite(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][:3] = torch.tensor([math.inf, math.nan, 3e38])
        save_file(tensors, folder / "model.safetensors")
        (report,) = verify(folder)
        assert self.problem(report) == "model.norm.weight: 2 values are not finite"
        assert next(each for each in report.tensors if each.not_finite).largest == pytest.approx(3e38)

    def test_a_pickle_beside_the_weights_is_scanned_not_run(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
        executable(folder)
        (folder / "rng_state_1.pth").rename(folder / "pytorch_model.bin")
        (report,) = verify(folder)
        assert "pytorch_model.bin: would call" in self.problem(report)
        assert not (tmp_path / "executed").exists()

    def test_an_index_that_leaves_the_folder(self, damaged: Callable[[str], Path]) -> None:
        folder = damaged("model")
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["lm_head.weight"] = "../x.safetensors"
        (folder / INDEX).write_text(json.dumps(index))
        (report,) = verify(folder)
        assert any("names '../x.safetensors'" in each for each in report.problems)


class TestAdapter:
    def test_good(self, made: Path) -> None:
        (report,) = verify(made / "adapter")
        assert not report.problems
        assert report.facts[-1] == "adapter: 28 tensors, 8192 elements"

    def test_without_weights(self, damaged: Callable[[str], Path]) -> None:
        """What LoRA under ZeRO-3 is known to save when it goes wrong."""
        folder = damaged("adapter")
        save_file({}, folder / ADAPTER_WEIGHTS)
        (report,) = verify(folder)
        assert any("holds no weights at all" in each for each in report.problems)
        save_file({"base_model.model.lm_head.lora_A.weight": torch.empty(0)}, folder / ADAPTER_WEIGHTS)
        (report,) = verify(folder)
        assert any("holds no weights at all" in each for each in report.problems)

    def test_never_trained(self, damaged: Callable[[str], Path]) -> None:
        folder = damaged("adapter")
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        save_file({name: each * ("lora_A" in name) for name, each in tensors.items()}, folder / ADAPTER_WEIGHTS)
        (report,) = verify(folder)
        assert "every lora_B is zero: it was never trained" in report.facts


class TestAgainst:
    """Logits of a folder and of the live model."""

    def test_a_rounded_model_against_its_checkpoint(self, checkpoints: Path, made: Path) -> None:
        found = compare_logits(made / "model", str(checkpoints / "untied" / "checkpoint-2"))
        assert found.relative <= TOLERANCE
        assert found.rounded == "bfloat16"
        assert found.largest > 0.1
        assert compare_logits(made / "model", str(checkpoints / "base-untied")).relative > 100 * TOLERANCE

    @pytest.mark.parametrize("name", ["tied", "moe", "zero2_groups"])
    def test_other_kinds_of_models(self, checkpoints: Path, tmp_path: Path, name: str) -> None:
        checkpoint = checkpoints / name / "checkpoint-2"
        folder = to_hf(checkpoint, tmp_path / "out", torch.bfloat16)
        assert compare_logits(folder, str(checkpoint)).relative <= TOLERANCE

    def test_an_adapter_against_its_checkpoint(self, checkpoints: Path, made: Path) -> None:
        found = compare_logits(made / "adapter", str(checkpoints / "lora" / "checkpoint-2"))
        assert found.relative <= TOLERANCE
        assert found.largest > 0.1

    def test_a_merged_model_against_base_and_adapter(self, checkpoints: Path, made: Path, tmp_path: Path) -> None:
        base = str(checkpoints / "base-untied")
        merge(
            base, made / "adapter", tmp_path / "out", dtype=torch.bfloat16, max_shard_size="5GB", workers=1,
            allow_attacked=False,
        )  # fmt: skip
        assert compare_logits(tmp_path / "out", str(made / "adapter")).relative <= TOLERANCE
        assert compare_logits(tmp_path / "out", str(checkpoints / "lora" / "checkpoint-2")).relative <= TOLERANCE
        assert compare_logits(tmp_path / "out", base).relative > 100 * TOLERANCE

    def test_one_wrong_value_of_a_norm_is_seen(self, checkpoints: Path, tmp_path: Path) -> None:
        checkpoint = str(checkpoints / "untied" / "checkpoint-2")
        folder = to_hf(Path(checkpoint), tmp_path / "out", torch.float32)
        assert compare_logits(folder, checkpoint).relative <= TOLERANCE
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.input_layernorm.weight"][0] *= -1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        assert compare_logits(folder, checkpoint).relative > TOLERANCE

    def test_what_cannot_be_loaded_is_named(self, made: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no-such-model: no such folder"):
            compare_logits(made / "model", "no-such-model")
        with pytest.raises(ValueError, match=r"config\.json|Unrecognized|no weights"):
            compare_logits(made / "model", str(tmp_path))
