"""Folders of weights held against their manifest and read in ranges; damaged ones are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.checkpoints.checksums import MANIFEST, check_manifest
from pipeline.checkpoints.weights_in import INDEX, SafetensorsFile, WeightsFolder
from tests.out_folders import write


class TestManifest:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return write(tmp_path / "out", {f"w{i}": torch.full((500,), float(i)) for i in range(4)}, size=2000)

    def test_it_lists_every_file(self, folder: Path) -> None:
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        assert sorted([*listed, MANIFEST]) == sorted(path.name for path in folder.iterdir())
        assert INDEX in listed
        check_manifest(folder)

    def test_every_damaged_file_is_named(self, folder: Path) -> None:
        first, second, third, _ = sorted(folder.glob("*.safetensors"))
        content = bytearray(first.read_bytes())
        content[-1] ^= 1
        first.write_bytes(content)
        second.write_bytes(second.read_bytes()[:-3])
        third.unlink()
        with pytest.raises(ValueError, match="missing") as raised:
            check_manifest(folder)
        lines = str(raised.value).splitlines()
        assert len(lines) == 3
        for line, (name, said) in zip(
            lines,
            [(first.name, "SHA-256"), (second.name, "bytes instead of"), (third.name, "is missing")],
            strict=True,
        ):
            assert name in line
            assert said in line

    @pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../b"])
    def test_a_path_that_leaves_the_folder_is_refused(self, folder: Path, name: str) -> None:
        (folder / MANIFEST).write_text(json.dumps({"files": {name: {"bytes": 1, "sha256": ""}}}))
        with pytest.raises(ValueError, match="not in the folder"):
            check_manifest(folder)


class TestReading:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return write(tmp_path / "out", {f"w{i}": torch.full((500,), float(i)) for i in range(4)}, size=4000)

    def test_an_index_that_points_elsewhere_is_refused(self, folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["w3"] = "../other/model.safetensors"
        (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises(ValueError, match="no safetensors file in its folder"):
            WeightsFolder(folder)

    def test_an_index_that_does_not_fit_names_the_tensor(self, folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["w9"] = index["weight_map"].pop("w3")
        (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"does not fit the files beside it \(w9\)"):
            WeightsFolder(folder)

    @pytest.mark.parametrize("cut", [1, 3000, 8000])
    def test_a_truncated_file_is_named(self, folder: Path, cut: int) -> None:
        path = sorted(folder.glob("*.safetensors"))[0]
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(ValueError, match=path.name):
            WeightsFolder(folder)

    def test_pickles_are_not_read(self, tmp_path: Path) -> None:
        torch.save({}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle"):
            WeightsFolder(tmp_path)

    @settings(deadline=None, max_examples=200)
    @given(st.binary(max_size=300), st.booleans())
    def test_any_garbage_is_a_clear_error(
        self, tmp_path_factory: pytest.TempPathFactory, content: bytes, framed: bool
    ) -> None:
        assume(content.strip() != b"{}")  # a file without tensors
        path = tmp_path_factory.getbasetemp() / "garbage.safetensors"
        path.write_bytes(len(content).to_bytes(8, "little") + content if framed else content)
        with pytest.raises(ValueError, match=r"garbage\.safetensors: (not a safetensors file|has .* bytes instead)"):
            SafetensorsFile(path)
