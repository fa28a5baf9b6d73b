"""Tokenised pools on disk: encoded once per node under a file lock, then memory-mapped by every rank.

No process group is needed: whoever holds the lock first writes, the others wait for it and read. So this runs before
``init_process_group``, whose timeout a long tokenisation would hit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.chat import IGNORE, ChatEncoder, Example
from pipeline.data.rows import bad_rows
from pipeline.data.schema import Conversation

if TYPE_CHECKING:
    import datasets

_FORMAT_VERSION = 1
_SIZES = "sizes.json"


class EncodedPool:
    """The examples of one pool, read from a memory-mapped folder.

    Attributes:
        fingerprint: sha256 of the conversations, the encoder and the cache's format.
        lengths: tokens of each example, int64 [rows].
        trained: trained tokens of each example, int64 [rows]: labels other than -100 at positions 1 and up, since the
            shift leaves the first position without a prediction.
    """

    def __init__(self, rows: datasets.Dataset, fingerprint: str) -> None:
        self._rows = rows
        self.fingerprint = fingerprint
        self.lengths: NDArray[np.int64] = rows.data.column("length").to_numpy()
        self.trained: NDArray[np.int64] = rows.data.column("trained").to_numpy()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index]
        return Example(row["row_id"], row["input_ids"], row["labels"], row["truncated"])

    def row_id(self, index: int) -> str:
        """The id of the row that example ``index`` was made of."""
        return str(self._rows.data.column("row_id")[index].as_py())


def encode_pool(conversations: Sequence[Conversation], encoder: ChatEncoder, cache_dir: Path) -> EncodedPool:
    """The tokenised ``conversations``, in order, from ``cache_dir/<fingerprint>`` or written there first.

    Raises:
        ValueError: rows that cannot be encoded (all of them, one a line, up to 20); nothing is written then.
    """
    import datasets
    from filelock import FileLock

    datasets.disable_progress_bars()
    fingerprint = _fingerprint(conversations, encoder)
    folder = cache_dir / fingerprint
    # The tokens of customers' texts are theirs as much as the texts. A folder that is there keeps its owner's choice.
    cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        rows = _load(folder)
        if rows is None:
            _write(conversations, encoder, folder, fingerprint)
            rows = datasets.load_from_disk(str(folder))
        return EncodedPool(rows, fingerprint)


def _fingerprint(conversations: Sequence[Conversation], encoder: ChatEncoder) -> str:
    digest = hashlib.sha256(f"{_FORMAT_VERSION} {encoder.fingerprint}".encode())
    for conversation in conversations:
        digest.update(json.dumps([conversation.id, conversation.key]).encode())
    return digest.hexdigest()


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.iterdir() if file.name != _SIZES}


def _load(folder: Path) -> datasets.Dataset | None:
    """The stored rows, or None where there are none or a file is cut, missing or unreadable."""
    import datasets

    try:
        if json.loads((folder / _SIZES).read_text()) != _sizes(folder):
            return None
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError):
        return None


def _write(conversations: Sequence[Conversation], encoder: ChatEncoder, folder: Path, fingerprint: str) -> None:
    import datasets

    problems: list[str] = []

    def examples() -> Iterator[dict[str, Any]]:
        for conversation in conversations:
            try:
                example = encoder.encode(conversation)
            except ValueError as error:
                problems.append(str(error))
                continue
            yield {
                "row_id": example.row_id,
                "input_ids": example.input_ids,
                "labels": example.labels,
                "truncated": example.truncated,
                "length": len(example.input_ids),
                "trained": sum(label != IGNORE for label in example.labels[1:]),
            }

    tokens = datasets.List(datasets.Value("int32"))
    features = datasets.Features(
        row_id=datasets.Value("string"),
        input_ids=tokens,
        labels=tokens,
        truncated=datasets.Value("bool"),
        length=datasets.Value("int64"),
        trained=datasets.Value("int64"),
    )
    # The lock makes one writer of us: whatever has these names was left by a killed run.
    unfinished, work = Path(f"{folder}.unfinished"), Path(f"{folder}.work")
    for leftover in (folder, unfinished, work):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        try:
            # Streams to disk, so a large pool never lies in memory; the fingerprint spares hashing the generator.
            rows = datasets.Dataset.from_generator(
                examples, features=features, cache_dir=str(work), fingerprint=fingerprint
            )
        except ValueError:
            # datasets refuses a set of no rows, and none is left where every row is bad.
            if not problems:
                raise
        if problems:
            raise bad_rows(problems)
        rows.save_to_disk(str(unfinished))
        (unfinished / _SIZES).write_text(json.dumps(_sizes(unfinished)))
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(unfinished, ignore_errors=True)
