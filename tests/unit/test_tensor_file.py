"""Ranges of torch.save files: the elements that torch.load gives, checksums in any order, shards cut in any way."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from pipeline.checkpoints import tensor_file
from pipeline.checkpoints.crc import combine
from pipeline.checkpoints.shards import Shards
from pipeline.checkpoints.tensor_file import Region, RegionReader, TensorFile
from tests.zero_checkpoints import deepspeed_weights
from tools.bench.synthetic_zero3 import write_checkpoint


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_checksum_of_two_pieces(first: bytes, second: bytes) -> None:
    assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, torch.Tensor]:
    base = torch.arange(1000.0)
    tensors = {
        "whole": base,
        "view": base[100:350],
        "half": torch.arange(77).to(torch.bfloat16),
        "steps": torch.tensor(3.0),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.empty(0),
    }
    torch.save({"nested": [tensors]}, tmp_path / "file.pt")
    return tensors


@pytest.fixture(params=[8, 56, 4096], ids=lambda size: f"pieces of {size}")
def piece_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", request.param)


def locate(path: Path, name: str) -> Region:
    file = TensorFile(path)
    return file.locate(file.contents["nested"][0][name])


@pytest.mark.usefixtures("piece_bytes")
def test_elements_are_those_of_torch_load(saved: dict[str, torch.Tensor], tmp_path: Path) -> None:
    reader = RegionReader()
    for name, tensor in saved.items():
        region = locate(tmp_path / "file.pt", name)
        pieces = [piece.clone() for piece in reader.read([region])]
        assert torch.equal(torch.cat(pieces) if pieces else torch.empty(0), tensor.flatten()), name
    reader.check()


@pytest.mark.usefixtures("piece_bytes")
@pytest.mark.parametrize("order", [1, -1, None])
def test_changed_record_is_found_whatever_was_read_of_it(
    saved: dict[str, torch.Tensor], tmp_path: Path, order: int | None
) -> None:
    path = tmp_path / "file.pt"
    region = locate(path, "whole")
    ranges = [(0, 10), (200, 400), (400, 401), (390, 420), (0, 10)][::order] if order else []

    def check() -> None:
        reader = RegionReader()
        for first, last in ranges:
            list(reader.read([region.cut(first, last)]))
        reader.check([] if order else [region])

    check()
    content = bytearray(path.read_bytes())
    for element in (5, 100, 300, 400, 999):  # read once, twice, never
        content[region.start + 4 * element] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"file\.pt: its content is not what was written"):
            check()
        content[region.start + 4 * element] ^= 1


def test_file_that_becomes_shorter_is_named(saved: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    region = locate(path, "whole")
    path.write_bytes(path.read_bytes()[: region.start + 100])
    with pytest.raises(ValueError, match=r"file\.pt: ends before"):
        list(RegionReader().read([region]))


@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("buffers", [1, 4])
def test_shards_cut_in_any_way_equal_zero_to_fp32(tmp_path: Path, ranks: int, buffers: int) -> None:
    """Parameters that do not divide by the ranks, and flat buffers that begin within parameters."""
    config = LlamaConfig(
        vocab_size=101, hidden_size=36, intermediate_size=50, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=3,
    )  # fmt: skip
    folder = write_checkpoint(tmp_path / "checkpoint", config, ranks)
    expected = deepspeed_weights(folder)
    for path in folder.glob("*/*optim_states.pt"):
        contents = torch.load(path, weights_only=True)
        (flat,) = contents["optimizer_state_dict"]["fp32_flat_groups"]
        contents["optimizer_state_dict"]["fp32_flat_groups"] = [part.clone() for part in flat.chunk(buffers)]
        torch.save(contents, path)
    shards, reader = Shards(folder), RegionReader()
    found = {name: torch.cat([part.clone() for part in reader.read(shards.regions(name))]) for name in shards.tensors}
    reader.check()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].flatten()) for name in found)
