"""A good command line, and what becomes of it when a mistake is added.

Its model folder has no weights: a check that loaded them would fail with another error.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.preflight import ROWS, Refused, resolve
from tests.tiny import chat_row, write_jsonl


@pytest.fixture(scope="session")
def model(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder without its weights."""
    folder = tmp_path_factory.mktemp("models") / "no-weights"
    shutil.copytree(tiny_model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="session")
def pools(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good file for each data flag, of rows of about 30 tokens."""
    folder = tmp_path_factory.mktemp("data")
    return {
        name: write_jsonl(folder / f"{name}.jsonl", [chat_row(f"{name} number {i}", "warm") for i in range(ROWS)])
        for name in ("train", "harmful", "harmless")
    }


@pytest.fixture
def good_flags(model: Path, pools: dict[str, Path], tmp_path: Path) -> list[str]:
    """A good command line, whose flags a later one replaces."""
    data = [word for name, path in pools.items() for word in (f"--{name}_data", str(path))]
    folders = ["--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache")]
    return ["--model_name_or_path", str(model), *data, *folders, "--per_device_train_batch_size", "4"]


@pytest.fixture
def refused(good_flags: list[str], tmp_path: Path) -> Refused:
    """The problems of the good command line with more words behind it; `{tmp}` in a word is the test's folder."""

    def problems(*words: object) -> list[str]:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            resolve([*good_flags, *(str(word).replace("{tmp}", str(tmp_path)) for word in words)])
        assert not (tmp_path / "run").exists()
        return [line.replace(str(tmp_path), "{tmp}") for line in str(error.value).splitlines()]

    return problems
