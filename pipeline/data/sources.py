"""Rows from files, saved folders, the hub and the built-in policy set, each with an id that leads to its place."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.policy import POOLS, policy_rows
from pipeline.data.rows import Row, bad_rows

_SLICE = re.compile(r"^(?P<body>.+)\[(?P<first>-?\d+%?)?:(?P<stop>-?\d+%?)?\]$")
_HUB_ID = re.compile(r"^(?P<name>[\w.-]+/[\w.-]+):(?P<split>[\w.-]+)$")


def read_rows(spec: str, *, flag: str) -> list[Row]:
    """Reads every row that ``spec`` names.

    Args:
        spec: a ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or ``.jsonl.gz`` file; a folder written by
            ``datasets.save_to_disk`` (``folder:split`` if it holds several splits); a hub id ``org/name:split``; or
            ``policy:POOL``. A slice ``[a:b]`` may follow, in rows or per cent as in datasets' split names: ``[:100]``,
            ``[-10%:]``.
        flag: the command-line flag ``spec`` was given to, for messages.

    Raises:
        ValueError: nothing there, nothing in it, a malformed line, or a slice beyond its end.
    """
    body, bounds = spec, None
    match = _SLICE.match(spec)
    try:
        if match and not Path(spec).exists():
            body, bounds = match["body"], (match["first"], match["stop"])
        rows = _read(body)
        if not rows:
            raise _SpecError("empty, it holds no rows")
        return rows if bounds is None else _cut(rows, *bounds)
    except (_SpecError, OSError) as error:
        raise ValueError(f"--{flag} {spec}: {error}") from error


class _SpecError(Exception):
    """What is wrong with a whole spec; ``read_rows`` adds the flag and the spec."""


def _read(body: str) -> list[Row]:
    path = Path(body)
    if body.startswith("policy:"):
        return _read_policy(body.removeprefix("policy:"))
    if path.is_dir():
        return _read_saved(path, split=None)
    if _suffix(path) in _READERS or path.is_file():
        return _read_file(path)
    folder, _, split = body.rpartition(":")
    if folder and Path(folder).is_dir():
        return _read_saved(Path(folder), split=split)
    hub_id = _HUB_ID.match(body)
    if hub_id:
        return _read_hub(hub_id["name"], hub_id["split"])
    raise _SpecError(f"no such file or folder; accepted are {_ACCEPTED}")


def _cut(rows: list[Row], first: str | None, stop: str | None) -> list[Row]:
    def bound(text: str | None, default: int) -> int:
        if text is None:
            return default
        value = round(len(rows) * int(text[:-1]) / 100) if text.endswith("%") else int(text)
        if abs(value) > len(rows):
            raise _SpecError(f"the slice goes to {text}, but there are {len(rows)} rows")
        return value + len(rows) if value < 0 else value

    kept = rows[bound(first, 0) : bound(stop, len(rows))]
    if not kept:
        raise _SpecError(f"the slice keeps none of the {len(rows)} rows")
    return kept


def _read_file(path: Path) -> list[Row]:
    if not path.is_file():
        raise _SpecError("no such file")
    if _suffix(path) not in _READERS:
        raise _SpecError(f"unknown suffix {path.suffix!r}; accepted are {_ACCEPTED}")
    try:
        return _READERS[_suffix(path)](path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _SpecError(f"not a whole gzip file ({error})") from error
    except UnicodeDecodeError as error:
        raise _SpecError(f"not UTF-8 text ({error.reason} at byte {error.start})") from error


def _read_jsonl(path: Path) -> list[Row]:
    rows, problems = [], []
    opened = gzip.open(path) if path.suffix == ".gz" else path.open("rb")
    with opened as lines:  # not as text, whose decoder reads ahead and cannot name the line
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                # utf-8-sig: spreadsheet programs write a byte-order mark.
                fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                problems.append(f"{path.name}:{number}: not UTF-8 text ({error.reason} at byte {error.start + 1})")
                continue
            except json.JSONDecodeError as error:
                problems.append(f"{path.name}:{number}: not valid JSON: {error.msg} at column {error.colno}")
                continue
            if isinstance(fields, dict):
                rows.append(Row(f"{path.name}:{number}", fields))
            else:
                problems.append(f"{path.name}:{number}: a {type(fields).__name__}, expected an object in braces")
    if problems:
        raise bad_rows(problems)
    return rows


def _read_json(path: Path) -> list[Row]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path.name}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}"
            " (a file of one object a line is named .jsonl)"
        ) from error
    if not isinstance(content, list):
        raise _SpecError(f"holds a {type(content).__name__}, expected a list of objects")
    return _numbered(path.name, content)


def _read_csv(path: Path) -> list[Row]:
    rows, problems = [], []
    # The default limit of 128 KiB a field is shorter than a long-context row.
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        header: list[str] = []
        previous = 0
        try:
            for values in reader:
                # A quoted field may span lines: a record is named by its first.
                row_id, previous = f"{path.name}:{previous + 1}", reader.line_num
                if not values:
                    continue
                if not header:
                    header = values
                elif len(values) != len(header):
                    problems.append(f"{row_id}: {len(values)} fields under a header of {len(header)}")
                else:
                    rows.append(Row(row_id, dict(zip(header, values, strict=True))))
        except csv.Error as error:
            problems.append(f"{path.name}:{previous + 1}: not valid CSV: {error}")
    if problems:
        raise bad_rows(problems)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        content = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise _SpecError(f"not a readable Parquet file: {error}") from error
    return _numbered(path.name, content)


def _suffix(path: Path) -> str:
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".jsonl.gz": _read_jsonl,
}
_ACCEPTED = f"{' '.join(_READERS)} files, a folder of datasets.save_to_disk, a hub id org/name:split, policy:POOL"


def _read_saved(folder: Path, split: str | None) -> list[Row]:
    import datasets

    try:
        content = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow, json and datasets each have their own for a folder that is not one
        raise _SpecError(f"not a folder that datasets.save_to_disk wrote: {error}") from error
    if isinstance(content, datasets.Dataset):
        if split is not None:
            raise _SpecError(f"the folder holds no splits; name it without {split!r}")
        return _numbered(folder.name, content)
    if split not in content:
        raise _SpecError(f"name one of its splits, {folder}:SPLIT with SPLIT one of {', '.join(content)}")
    return _numbered(f"{folder.name}:{split}", content[split])


def _read_hub(name: str, split: str) -> list[Row]:
    import datasets

    datasets.disable_progress_bars()
    try:
        content = datasets.load_dataset(name, split=split)
    except Exception as error:  # what the hub client raises differs by version and by what failed
        raise _SpecError(
            f"not a local file or folder, and the hub gave no such data set ({error}); check the name and the split, "
            "or, without a network, download it elsewhere, copy the cache and set HF_HUB_OFFLINE=1 "
            "HF_DATASETS_OFFLINE=1"
        ) from error
    return _numbered(f"{name}:{split}", content)


def _read_policy(pool: str) -> list[Row]:
    if pool not in POOLS:
        raise _SpecError(f"no such pool; the built-in ones are {', '.join(POOLS)}")
    return policy_rows(pool)


def _numbered(name: str, content: Sequence[Any]) -> list[Row]:
    problems = [
        f"{name}:{number}: a {type(fields).__name__}, expected an object"
        for number, fields in enumerate(content, start=1)
        if not isinstance(fields, dict)
    ]
    if problems:
        raise bad_rows(problems)
    return [Row(f"{name}:{number}", fields) for number, fields in enumerate(content, start=1)]
