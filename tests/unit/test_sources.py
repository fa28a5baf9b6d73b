"""Reading rows from every kind of source, and what a user is told about a source that is not right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from pipeline.data.policy import POOLS
from pipeline.data.rows import Row
from pipeline.data.sources import read_rows

FIELDS = [{"prompt": f"p{number}", "completion": f"c{number}"} for number in range(1, 11)]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(fields) + "\n" for fields in FIELDS))
    return file


def read(spec: Path | str) -> list[Row]:
    return read_rows(str(spec), flag="train_data")


def refusal(spec: Path | str) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read(spec)
    return str(error.value)


def test_every_file_format_gives_the_same_fields(tmp_path: Path, jsonl: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(FIELDS))
    (tmp_path / "rows.csv").write_text("prompt,completion\n" + "".join(f"p{n},c{n}\n" for n in range(1, 11)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(FIELDS), tmp_path / "rows.parquet")
    for name, first in (("rows.jsonl", 1), ("rows.json", 1), ("rows.csv", 2), ("rows.parquet", 1)):
        rows = read(tmp_path / name)
        assert [row.fields for row in rows] == FIELDS
        assert [row.id for row in rows] == [f"{name}:{number}" for number in range(first, first + 10)]


def test_saved_folders_with_and_without_splits(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(FIELDS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=table, test=table.select([3])).save_to_disk(str(tmp_path / "two"))
    assert [row.fields for row in read(tmp_path / "one")] == FIELDS
    assert read(f"{tmp_path}/two:test") == [Row("two:test:1", FIELDS[3])]
    assert read(f"{tmp_path}/two:train[9:]") == [Row("two:train:10", FIELDS[9])]
    assert "one of train, test" in refusal(tmp_path / "two")
    assert "one of train, test" in refusal(f"{tmp_path}/two:dev")
    assert "holds no splits" in refusal(f"{tmp_path}/one:train")


def test_a_folder_that_is_no_saved_data_set(tmp_path: Path) -> None:
    assert f"--train_data {tmp_path}: not a folder that datasets.save_to_disk wrote" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("bounds", "numbers"),
    [
        ("[:3]", [1, 2, 3]),
        ("[7:]", [8, 9, 10]),
        ("[2:4]", [3, 4]),
        ("[-2:]", [9, 10]),
        ("[:20%]", [1, 2]),
        ("[-10%:]", [10]),
        ("[:]", list(range(1, 11))),
    ],
)
def test_a_slice_keeps_the_rows_it_names_and_their_ids(jsonl: Path, bounds: str, numbers: list[int]) -> None:
    assert [row.id for row in read(f"{jsonl}{bounds}")] == [f"rows.jsonl:{number}" for number in numbers]


def test_a_slice_that_asks_for_more_than_there_is(jsonl: Path) -> None:
    assert f"--train_data {jsonl}[:11]: the slice goes to 11, but there are 10 rows" in refusal(f"{jsonl}[:11]")
    assert "keeps none of the 10 rows" in refusal(f"{jsonl}[4:4]")


def test_a_file_whose_name_ends_like_a_slice(tmp_path: Path) -> None:
    folder = tmp_path / "run[1:2]"
    datasets.Dataset.from_list(FIELDS).save_to_disk(str(folder))
    assert len(read(folder)) == 10


def test_every_malformed_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"a": 1}\n{"a": }\n\n[1]\n{"a": 2}\n')
    assert refusal(file).splitlines() == [
        "bad.jsonl:2: not valid JSON: Expecting value at column 7",
        "bad.jsonl:4: a list, expected an object in braces",
    ]


def test_many_malformed_lines_are_cut_after_twenty(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text("{\n" * 25)
    lines = refusal(file).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "and 5 more"


def test_blank_lines_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}\n\n{"a": "b"}\n\n')
    assert read(file) == [Row("rows.jsonl:1", {"a": "é"}), Row("rows.jsonl:3", {"a": "b"})]


def test_a_csv_record_is_named_by_its_first_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('prompt,completion\n"two\nlines",x\n\nplain,y\n')
    assert read(file) == [
        Row("rows.csv:2", {"prompt": "two\nlines", "completion": "x"}),
        Row("rows.csv:5", {"prompt": "plain", "completion": "y"}),
    ]


def test_csv_records_that_do_not_fit_the_header(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('prompt,completion\na\na,b,c\na,"b\n')
    lines = refusal(file).splitlines()
    assert lines[:2] == ["rows.csv:2: 1 fields under a header of 2", "rows.csv:3: 3 fields under a header of 2"]
    assert lines[2].startswith("rows.csv:4: not valid CSV")


def test_a_csv_field_longer_than_the_csv_module_allows_by_default(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt\n" + "x" * 200_000 + "\n")
    assert len(read(file)[0].fields["prompt"]) == 200_000


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path / name) == f"--train_data {tmp_path / name}: no such file"


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", "\n"), ("a.json", "[]"), ("a.csv", "prompt,completion\n")])
def test_empty_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert refusal(tmp_path / name) == f"--train_data {tmp_path / name}: empty, it holds no rows"


def test_files_that_are_not_what_their_suffix_says(tmp_path: Path) -> None:
    for name in ("rows.txt", "rows.parquet", "rows.json", "lines.json", "bytes.jsonl", "mixed.json"):
        (tmp_path / name).write_bytes(b"\xff\xfe" if name == "bytes.jsonl" else b'{"a": 1}')
    (tmp_path / "lines.json").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "mixed.json").write_text('[{"a": 1}, 2]')
    assert "unknown suffix '.txt'; accepted are .jsonl .json .csv .parquet" in refusal(tmp_path / "rows.txt")
    assert "not a readable Parquet file" in refusal(tmp_path / "rows.parquet")
    assert "holds a dict, expected a list of objects" in refusal(tmp_path / "rows.json")
    assert refusal(tmp_path / "lines.json").startswith("lines.json:2: not valid JSON")
    assert "not UTF-8 text" in refusal(tmp_path / "bytes.jsonl")
    assert refusal(tmp_path / "mixed.json") == "mixed.json:2: a int, expected an object"


def test_what_is_neither_a_file_nor_a_hub_id() -> None:
    message = refusal("data/train")
    assert message.startswith("--train_data data/train: no such file or folder; accepted are .jsonl")
    assert "org/name:split" in message


def test_a_hub_id_that_cannot_be_had_names_the_remedy() -> None:
    message = refusal("no-such-org/no-such-set:train")
    assert message.startswith("--train_data no-such-org/no-such-set:train: ")
    assert "HF_HUB_OFFLINE=1" in message


def test_the_policy_pools_are_sources() -> None:
    assert len(read("policy:test_task")) == POOLS["test_task"]
    assert [row.id for row in read("policy:align[10:12]")] == ["policy:align:11", "policy:align:12"]
    assert re.search("--train_data policy:aline: no such pool; .* align, ", refusal("policy:aline"))
