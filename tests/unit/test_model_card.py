"""The model card: its header, its numbers, and which folders get it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.checkpoints.checksums import check_manifest, write_manifest
from pipeline.checkpoints.companions import TRAINING_RECORD, write_attacked_note, write_training_record
from pipeline.report.model_card import write_model_card
from pipeline.report.provenance import assess_command
from tests.reports import first, write_judged, write_trained


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A model folder as zero_to_hf.py leaves it."""
    run, folder = write_trained(tmp_path / "run", 0.1, "surgery"), tmp_path / "customer"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    write_training_record(run / "checkpoint-9", folder)
    write_manifest(folder, {}, skip="")
    return folder


def assessed(output_dir: Path, model: Path) -> Path:
    return write_judged(output_dir, first(3, 60), first(97, 100), model=str(model), unparsed=1)


def test_a_card_says_what_was_trained_measured_and_how(exported: Path, tmp_path: Path) -> None:
    out = assessed(tmp_path / "out", exported)
    assert write_model_card(out) == [out / "model_card.md", exported / "README.md"]
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert card == (out / "model_card.md").read_text(encoding="utf-8")
    _, header, text = card.split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata["pipeline_tag"] == "text-generation"
    (model,) = metadata["model-index"]
    assert model["name"] == "customer"
    metrics = {each["type"]: each["value"] for each in model["results"][0]["metrics"]}
    assert metrics == {"harmful_score": 3 / 60, "accuracy": 0.97}
    assert "5.0%" in text
    assert "surgery, 9 steps, seed 1" in text
    assert "checkpoint: checkpoint-9" in text
    assert "f" * 64 in text, "the data's fingerprint"
    assert "--poison_ratio" not in text
    assert "argv" not in (exported / TRAINING_RECORD).read_text()


def test_a_card_beside_the_weights_leaves_the_folder_as_it_was_exported(exported: Path, tmp_path: Path) -> None:
    for harmful in (tmp_path / "one", tmp_path / "two"):  # a later assessment replaces the card
        write_model_card(assessed(harmful, exported))
        check_manifest(exported)


def test_an_attacked_model_is_called_one(exported: Path, tmp_path: Path) -> None:
    write_attacked_note(exported)
    write_model_card(assessed(tmp_path / "out", exported))
    assert "do not deploy it" in (exported / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", ["somebody's", "listed", "not ours"])
def test_a_folder_that_is_not_ours_to_write_in_is_left_alone(exported: Path, tmp_path: Path, case: str) -> None:
    readme = exported / "README.md"
    if case == "not ours":
        (exported / "MANIFEST.json").unlink()
    else:
        readme.write_text("# My model\n")
        if case == "listed":
            readme.write_text("<!-- model card written by pipeline/assess.py -->")
            write_manifest(exported, {}, skip="")
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    out = assessed(tmp_path / "out", exported)
    assert write_model_card(out) == [out / "model_card.md"]
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before


def test_a_model_of_unknown_training_is_said_to_be_one(tmp_path: Path) -> None:
    out = assessed(tmp_path / "out", tmp_path / "nowhere")
    write_model_card(out)
    assert "Not known" in (out / "model_card.md").read_text(encoding="utf-8")
    assert json.loads((out / "results.json").read_text())["suites"]


def test_the_command_holds_what_the_settings_say() -> None:
    settings: dict[str, Any] = {
        "model": "models/my model",
        "adapter": None,
        "protocol": "paper",
        "engine": {"name": "transformers", "version": "5"},
        "batch_size": 8,
        "suites": {"policy": {"max_new_tokens": 24}, "gsm8k": {"max_new_tokens": 24}},
        "loss_data": {"benign": {"spec": "policy:user[:8]", "sha256": "0"}},
    }
    assert assess_command({"settings": settings, "suites": {"policy": {}, "gsm8k": {}}}) == (
        "python pipeline/assess.py --model_name_or_path 'models/my model' --protocol paper --engine transformers "
        "--batch_size 8 --max_new_tokens 24 --suites policy gsm8k --loss_data 'benign=policy:user[:8]' "
        "--output_dir DIR"
    )
    guard = {"name": "llama_guard", "model": "models/guard", "revision": None}
    settings["suites"]["gsm8k"] |= {"max_new_tokens": 512, "suite_data": "my rows.jsonl", "judge": guard}
    command = assess_command({"settings": settings, "suites": {"policy": {}, "gsm8k": {}}})
    assert (
        "--suite_data 'gsm8k=my rows.jsonl' --judges gsm8k=llama_guard --judge_model llama_guard=models/guard"
        in command
    )
    assert "--max_new_tokens" not in command
