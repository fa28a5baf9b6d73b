"""What Pharmacist cannot work with is refused before a weight is read, by the name of the flag or the row; nothing is
written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import parse
from pipeline.curation import flags_of_others, load_module
from tests.tiny import chat_row, write_jsonl

Refused = Callable[..., list[str]]


@pytest.fixture(scope="module")
def good(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A good command line; its model has no weights, so that a check that comes too late meets another error."""
    folder = tmp_path_factory.mktemp("good")
    shutil.copytree(tiny_model_dir, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    words = ["--method", "pharmacist", "--model_name_or_path", str(folder / "model"), "--cache_dir", str(folder / "c")]
    for name in ("train", "guide", "harmful"):
        rows = [chat_row(f"{name} number {i}", "warm", planted=i % 2 == 0) for i in range(16)]
        words += [f"--{name}_data", str(write_jsonl(folder / f"{name}.jsonl", rows))]
    return [*words, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]


def select(argv: list[str]) -> None:
    """What the door does."""
    module = load_module("pharmacist")
    module.run(parse(module.CONFIGS, argv, description="", elsewhere=flags_of_others("pharmacist")))


@pytest.fixture
def refused(good: list[str], tmp_path: Path) -> Refused:
    """The problems of the good command line with more words behind it; {tmp} in a word is the test's folder. A word
    that begins with "-no" takes that flag out."""

    def problems(*words: str) -> list[str]:
        argv = [*good, "--output_dir", str(tmp_path / "out")]
        for word in words:
            if word.startswith("-no"):
                place = argv.index("--" + word.removeprefix("-no"))
                del argv[place : place + 2]
        argv += [word.replace("{tmp}", str(tmp_path)) for word in words if not word.startswith("-no")]
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError) as error:  # noqa: PT011
            select(argv)
        assert sorted(tmp_path.rglob("*")) == before
        return [line.replace(str(tmp_path), "{tmp}") for line in str(error.value).splitlines()]

    return problems


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--keep_ratio 0", "--keep_ratio 0.0: give a share above 0, up to 1"),
        ("--keep_ratio 0.01", "--keep_ratio 0.01: keeps none of 16 rows of --train_data: raise it"),
        ("--kappa -1", "--kappa -1.0: give 0 or more"),
        ("--kappa nan", "--kappa nan: give 0 or more"),
        ("--lamb 1.5", "--lamb 1.5: give a weight between 0 and 1; the lower level has the rest"),
        ("--selector_learning_rate 0", "--selector_learning_rate 0.0: give a number above 0"),
        ("--lora_r 0", "--lora_r 0: give 1 or more"),
        ("--num_train_epochs 0", "--num_train_epochs 0: give 1 or more"),
        ("--seed -1", "--seed -1: give 0 or more"),
        ("--baselines sael", "--baselines sael: unknown; did you mean seal?"),
        ("--lamb_decy 0.1", "--lamb_decy is unknown; did you mean lamb_decay?"),
        (
            "--variant hypergradient --lamb 0.9",
            "--lamb has no effect with --variant hypergradient: leave it out",
        ),
        ("--difference_radius 0.1", "--difference_radius has no effect with --variant joint: leave it out"),
        (
            "-noharmful_data --kappa 0 --toxic_r 4",
            "--toxic_r has no effect without a toxic increment (--kappa 0): leave it out",
        ),
        ("-noguide_data", "--guide_data is needed by this --method: the reference pool of guide texts"),
        ("--planted_key junk", "train.jsonl:1: --planted_key junk: None is there, expected true or false"),
        ("--lora_target_modules c_attn", "--lora_target_modules c_attn: matches no module"),
    ],
)  # fmt: skip
def test_a_flag_is_refused(refused: Refused, words: str, message: str) -> None:
    found = refused(*words.split())
    assert found[0].startswith(message)


def test_maps_that_the_model_lacks_are_refused(refused: Refused) -> None:
    (found,) = refused("--toxic_target_modules", "q_proj", "c_attn")
    assert found.endswith("it has no linear map c_attn, which --toxic_target_modules names: name some that it has")


def test_an_output_folder_that_holds_something_is_left_alone(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept.jsonl").write_text("mine")
    assert refused() == ["--output_dir {tmp}/out: holds files: name another folder"]
    assert (tmp_path / "out/kept.jsonl").read_text() == "mine"


def test_a_pool_smaller_than_a_batch_is_refused(refused: Refused, tmp_path: Path) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", [chat_row(f"few {i}", "warm") for i in range(7)])
    for pool in ("guide", "harmful"):
        (found,) = refused(f"--{pool}_data", str(few))
        assert found.startswith(f"--{pool}_data: its 7 rows are fewer than the 8 that this --method draws a step")


def test_rows_of_two_pools_are_refused(refused: Refused, good: list[str]) -> None:
    train = good[good.index("--train_data") + 1]
    assert refused("--guide_data", train)[0].startswith("--train_data and --guide_data share 16 rows")


def test_a_bad_row_is_named_by_its_line(refused: Refused, tmp_path: Path) -> None:
    rows = [chat_row("one", "warm"), {"messages": [{"role": "user", "content": "two"}]}]
    file = write_jsonl(tmp_path / "bad.jsonl", rows)
    assert refused("--train_data", str(file)) == ["bad.jsonl:2: does not end with the assistant"]


def test_junk_that_is_planted_everywhere_is_refused(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps(chat_row(f"all {i}", "warm", planted=True)) + "\n" for i in range(9)))
    found = refused("--train_data", str(file), "--planted_key", "planted")
    assert found == ["--planted_key planted: it is True in every row: plant some and leave some, or drop it"]


def test_an_adapter_below_has_to_be_merged_first(refused: Refused) -> None:
    found = refused("--adapter_name_or_path", "{tmp}/adapter")
    assert found[0] == (
        "--adapter_name_or_path {tmp}/adapter: an adapter of its own is trained: merge this one into the model first "
        "(tools/merge_lora.py)"
    )
