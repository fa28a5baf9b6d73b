"""The conversion benchmark end to end on a small checkpoint: what it reports, never a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import ROOT
from tools.bench.synthetic_zero3 import llama_config, shapes_of, write_checkpoint


def bench(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/bench/convert.py", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("given", [False, True])
def test_both_converters_are_measured_on_the_same_files(tmp_path: Path, given: bool) -> None:
    flags: list[object] = ["--sizes", "0.003", "--ranks", "3"]
    if given:
        flags = ["--checkpoint", write_checkpoint(tmp_path / "checkpoint", llama_config(3e6), 3)]
    (tmp_path / "scratch").mkdir()
    done = bench(
        *flags,
        "--dtypes",
        "bf16",
        "--repeats",
        "1",
        "--scratch",
        tmp_path / "scratch",
        "--output",
        tmp_path / "out.json",
    )
    assert done.returncode == 0, done.stderr
    assert "Ours stays within 1 GB and the largest tensor in every conversion" in done.stdout
    found: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    (conversion,) = found["conversions"]
    shapes = shapes_of(llama_config(3e6))
    assert conversion["parameters"] == sum(shape.numel() for shape in shapes.values())
    assert conversion["bound_bytes"] == 10**9 + 4 * max(shape.numel() for shape in shapes.values())
    assert conversion["within_bound"]
    for way in ("ours", "zero_to_fp32"):
        assert len(conversion[way]["seconds"]) == 1
        assert conversion[way]["peak_bytes"] > 10**8
    assert not list((tmp_path / "scratch").iterdir())
    assert (tmp_path / "checkpoint").is_dir() == given


def test_bad_flags_are_named(tmp_path: Path) -> None:
    done = bench("--sizes", "0", "--ranks", "0", "--dtypes", "int8", "--repeats", "0")
    assert done.returncode == 2
    for problem in ("--sizes 0.0: ", "--ranks 0: ", "--dtypes int8: choose", "--repeats 0: "):
        assert problem in done.stderr
    done = bench("--sizes", "1000", "--scratch", tmp_path)
    assert done.returncode == 2
    assert "has no room" in done.stderr
