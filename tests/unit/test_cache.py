"""Tokenised pools on disk: written once, read by all, rebuilt when damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from pipeline.data.cache import EncodedPool, encode_pool
from pipeline.data.chat import ChatEncoder
from pipeline.data.schema import Conversation, read_conversations
from tests.tiny import chat_row, tiny_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def conversations() -> list[Conversation]:
    return read_conversations("policy:align[:12]", flag="train_data")


def encoder(max_length: int = 256) -> ChatEncoder:
    return ChatEncoder(tiny_tokenizer(), max_length=max_length)


def modified(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def assert_holds(pool: EncodedPool, conversations: list[Conversation], encoder: ChatEncoder) -> None:
    assert [pool[index] for index in range(len(pool))] == [encoder.encode(each) for each in conversations]


def test_a_pool_holds_what_the_encoder_gives(tmp_path: Path, conversations: list[Conversation]) -> None:
    pool = encode_pool(conversations, encoder(70), tmp_path)
    assert len(pool) == 12
    assert_holds(pool, conversations, encoder(70))
    assert [pool.row_id(index) for index in range(12)] == [each.id for each in conversations]
    assert pool.lengths.dtype == pool.trained.dtype == np.int64
    assert pool.lengths.tolist() == [len(pool[index].input_ids) for index in range(12)]
    assert pool.trained.tolist() == [sum(label != -100 for label in pool[index].labels[1:]) for index in range(12)]
    assert {pool[index].truncated for index in range(12)} == {True, False}


def test_a_second_call_reads_what_the_first_wrote(tmp_path: Path, conversations: list[Conversation]) -> None:
    cache = tmp_path / "cache"
    first = encode_pool(conversations, encoder(), cache)
    folder = cache / first.fingerprint
    written = modified(folder)
    second = encode_pool(conversations, encoder(), cache)
    assert second.fingerprint == first.fingerprint
    assert modified(folder) == written
    assert_holds(second, conversations, encoder())
    assert cache.stat().st_mode & 0o777 == 0o700
    assert {entry.name for entry in cache.iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_the_fingerprint_follows_rows_ids_order_and_encoder(tmp_path: Path, conversations: list[Conversation]) -> None:
    renamed = [Conversation("other:1", conversations[0].messages), *conversations[1:]]
    variants = [
        encode_pool(rows, encoder(length), tmp_path).fingerprint
        for rows, length in (
            (conversations, 256),
            (conversations[1:], 256),
            (conversations[::-1], 256),
            (renamed, 256),
            (conversations, 255),
        )
    ]
    assert len(set(variants)) == len(variants)


@pytest.mark.parametrize("damage", ["cut", "rows missing", "removed", "garbled", "half-written"])
def test_a_damaged_folder_is_rebuilt(tmp_path: Path, conversations: list[Conversation], damage: str) -> None:
    folder = tmp_path / encode_pool(conversations, encoder(), tmp_path).fingerprint
    (data,) = folder.glob("*.arrow")
    if damage == "cut":
        data.write_bytes(data.read_bytes()[:-100])
    elif damage == "rows missing":
        with pyarrow.ipc.open_stream(data.read_bytes()) as stream:
            table = stream.read_all()[:5]
        with pyarrow.ipc.new_stream(data, table.schema) as stream:
            stream.write_table(table)
    elif damage == "removed":
        data.unlink()
    elif damage == "garbled":
        data.write_bytes(b"\xff" * data.stat().st_size)
    else:
        folder.rename(f"{folder}.unfinished")
    assert_holds(encode_pool(conversations, encoder(), tmp_path), conversations, encoder())
    assert {entry.name for entry in tmp_path.iterdir()} == {folder.name, f"{folder.name}.lock"}


@pytest.mark.parametrize("good", [1, 0])
def test_bad_rows_are_reported_together_and_nothing_is_written(tmp_path: Path, good: int) -> None:
    rows = [*[chat_row("Hello", "Hi")] * good, *[chat_row("Hello " * 40, "Hi")] * 2]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    conversations = read_conversations(str(file), flag="train_data")
    with pytest.raises(ValueError, match="no trained token") as error:
        encode_pool(conversations, encoder(32), tmp_path / "cache")
    assert [line.split(": ")[0] for line in str(error.value).splitlines()] == [
        f"rows.jsonl:{good + 1}",
        f"rows.jsonl:{good + 2}",
    ]
    assert [entry.suffix for entry in (tmp_path / "cache").iterdir()] == [".lock"]


def test_ranks_that_start_together_write_once(tmp_path: Path) -> None:
    """Two processes, no process group: one encodes, and both read the same pool."""
    program = """
import json, sys
from pathlib import Path
from pipeline.data import cache
from pipeline.data.chat import ChatEncoder
from pipeline.data.schema import read_conversations
from tests.tiny import tiny_tokenizer

encoded = []
class Counting(ChatEncoder):
    def encode(self, conversation):
        encoded.append(conversation.id)
        return super().encode(conversation)

conversations = read_conversations("policy:user", flag="train_data")
pool = cache.encode_pool(conversations, Counting(tiny_tokenizer(), max_length=256), Path(sys.argv[1]))
print(json.dumps([len(encoded), len(pool), pool.fingerprint, int(pool.lengths.sum())]))
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert not [errors for _, errors in outputs if "%|" in errors], "a progress bar was drawn"
    reports = [json.loads(report) for report, _ in outputs]
    assert sorted(report[0] for report in reports) == [0, 600]
    assert len({tuple(report[1:]) for report in reports}) == 1
