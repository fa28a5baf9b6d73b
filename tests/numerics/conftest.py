"""What the ZeRO-3 comparisons share: a sharp tiny model, small pools, and a ds_config that shards every parameter."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.numerics.cases import sharp_llama
from tests.ranks import ROOT
from tests.tiny import chat_row, save_model_folder, write_jsonl


def words(generator: random.Random, low: int, high: int) -> str:
    """A few everyday words."""
    vocabulary = ["bread", "kite", "warm", "cold", "tea", "room", "the", "line"]
    return " ".join(generator.choice(vocabulary) for _ in range(generator.randint(low, high)))


@pytest.fixture(scope="session")
def pools(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of the pools, with rows of very different lengths."""
    folder, generator = tmp_path_factory.mktemp("pools"), random.Random(0)
    files = {}
    for name, count in (("train", 30), ("harmful", 6), ("harmless", 6), ("guide", 14), ("tamper", 9), ("many", 16)):
        rows = [chat_row(f"{name} {i} {words(generator, 1, 8)}", words(generator, 1, 12)) for i in range(count)]
        files[name] = str(write_jsonl(folder / f"{name}.jsonl", rows))
        if name == "train":  # other answers to the same prompts
            other = [
                chat_row(row["messages"][0]["content"], words(random.Random(i), 1, 9)) for i, row in enumerate(rows)
            ]
            sevens = [chat_row(row["messages"][0]["content"], "7" * 60) for row in rows]  # no token in common
            files["sevens"] = str(write_jsonl(folder / "sevens.jsonl", sevens))
            files["paired"] = str(write_jsonl(folder / "paired.jsonl", other))
    return files


@pytest.fixture(scope="session")
def base(pools: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that all cases share; every parameter is sharded, however small."""
    config = json.loads((ROOT / "ds_configs/z3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    config["zero_optimization"]["reduce_bucket_size"] = 30_000  # several gradients; as set, a bucket holds one matrix
    folder: Path = tmp_path_factory.mktemp("base")
    (folder / "z3.json").write_text(json.dumps(config))
    model = save_model_folder(sharp_llama(), folder / "model")
    return [
        "--model_name_or_path", str(model), "--ds_config", str(folder / "z3.json"), "--train_data", pools["train"],
        "--seed", "7", "--learning_rate", "1e-3", "--cache_dir", str(folder / "cache"),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def default_ds() -> str:
    """The ds_config that users have: small parameters stay gathered."""
    return str(ROOT / "ds_configs/z3.json")


@pytest.fixture(scope="session")
def references(pools: dict[str, str]) -> list[str]:
    """Flags of Surgery's reference pools."""
    return ["--harmful_data", pools["harmful"], "--harmless_data", pools["harmless"]]
