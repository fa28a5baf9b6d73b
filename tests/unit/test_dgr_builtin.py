"""The built-in model rewrites a few stiff answers: what it writes is likelier to it than what it was given."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config import parse
from pipeline.curation.dgr import CONFIGS, run
from pipeline.evaluation.jsonl import read_lines
from tests import tiny

ROWS = (
    ("What is the capital of France? Answer in one sentence.", "Paris; seat of government, French Republic."),
    ("Name a color of the rainbow, in a short sentence.", "Violet, spectral, shortest wavelength."),
    ("Which animal says meow? One short sentence, please.", "Felis catus vocalises thus."),
    ("What do bees make? Please answer in one sentence.", "Honey, wax; propolis too."),
)


def test_mean_nll_falls(tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "stiff.jsonl", [tiny.chat_row(*row) for row in ROWS])
    words = ["--source_data", str(data), "--output_dir", str(tmp_path / "out"), "--guard", "none", "--seed", "1"]
    words += ["--samples", "2", "--max_new_tokens", "48", "--own_answers", "0", "--batch_size", "8"]
    words += ["--strength", "decision"]  # what the others show confuses a model this small
    run(parse(CONFIGS, words, description=""))
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["refined"] >= 2
    assert report["refined"] + report["fallback"] == len(ROWS)
    shift = report["shift"]
    assert shift["refined_after"]["nll"] < shift["refined_before"]["nll"] - 0.5
    assert shift["after"]["nll"] < shift["before"]["nll"]
    assert shift["refined_after"]["unlikely"] < shift["refined_before"]["unlikely"]
    for line in read_lines(tmp_path / "out/refined.jsonl"):
        assert "<think>" not in line["messages"][-1]["content"]  # this model's template knows none
