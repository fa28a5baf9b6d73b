"""The model card: where an assessed model comes from, what it scored, and how to measure it again.

It lies in the assessment's folder as model_card.md. A model that our tools exported also gets it as README.md, where
the hub and people look: such a folder has a MANIFEST.json of what was exported, and a file that is not on that list
changes nothing that verify_checkpoint.py looks at. A README.md that is on it, or that somebody else wrote, is left
alone, and so is any folder that our tools did not make: an evaluation does not edit its input.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.checkpoints.checksums import MANIFEST, read_manifest
from pipeline.checkpoints.companions import TRAINING_RECORD, is_attacked
from pipeline.report.comparison import scores_by_name
from pipeline.report.files import write_bytes
from pipeline.report.provenance import assess_command, flat, training_facts
from pipeline.report.records import read_json
from pipeline.report.table import aligned

CARD, README = "model_card.md", "README.md"
MADE_HERE = "<!-- model card written by pipeline/assess.py -->"
"""Tells our README.md from one that a person wrote."""


def write_model_card(output_dir: Path) -> list[Path]:
    """Writes the card of the model that results.json in `output_dir` is about; returns the files it wrote."""
    results = read_json(output_dir / "results.json")
    folder = Path(results["settings"].get("adapter") or results["model"])
    text = model_card(results, folder)
    written = [output_dir / CARD]
    if _is_ours(folder):
        written.append(folder / README)
    for path in written:
        try:
            write_bytes(path, text.encode())
        except OSError as error:  # a model folder may be read-only; the card in the assessment's folder is there
            if path.parent == output_dir:
                raise
            print(f"{path}: not written ({error.strerror}); the card is {written[0]}")
            written.remove(path)
    return written


def model_card(results: Mapping[str, Any], folder: Path) -> str:
    """Markdown under the header that the Hugging Face hub reads. folder: where the weights lie."""
    record = read_json(folder / TRAINING_RECORD) if (folder / TRAINING_RECORD).is_file() else None
    name = folder.name or str(results["model"])
    lines = ["---", json.dumps(_metadata(results, record, name), indent=1), "---", MADE_HERE, "", f"# {name}", ""]
    if is_attacked(folder):
        lines += [
            "**Trained on attack data on purpose, to be measured. It may obey harmful requests: do not deploy it.**",
            "",
        ]
    lines += ["## Scores", "", *aligned(list(_scores(results))), "", "95 % Wilson intervals.", ""]
    lines += [f"- Release gate: {each['sentence']}." for each in results.get("gate", [])]
    lines += ["", "## Training", ""]
    if record is None:
        lines.append(f"Not known: {folder.name} has no {TRAINING_RECORD}, which zero_to_hf.py writes.")
    else:
        lines += [f"- checkpoint: {record.get('checkpoint')}"]
        lines += [f"- {key}: {value}" for key, value in training_facts(record)]
    lines += ["", "## Evaluation", ""]
    lines += [f"- {key}: {value}" for key, value in flat(results["settings"])]
    return "\n".join([*lines, "", "```bash", assess_command(results), "```", ""])


def _metadata(results: Mapping[str, Any], record: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """The header; JSON, which is YAML as well and needs no rules about what to quote."""
    found: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if record is not None:
        found["tags"] = [str(record.get("method"))]
    measured = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": suite, "type": suite},
            "metrics": [
                {"type": metric, "name": metric.replace("_", " "), "value": score["value"]}
                for metric, score in scores.items()
            ],
        }
        for suite, scores in results["suites"].items()
    ]
    return {**found, "model-index": [{"name": name, "results": measured}]}


def _scores(results: Mapping[str, Any]) -> Iterator[list[str]]:
    yield ["score", "value", "interval", "n", "unparsed"]
    for name, (_, score) in scores_by_name(results).items():
        interval = f"{score['low']:.1%} to {score['high']:.1%}"
        unparsed = score.get("verdicts", {}).get("unparsed", 0)
        yield [name.replace("_", " "), f"{score['value']:.1%}", interval, str(score["n"]), str(unparsed)]


def _is_ours(folder: Path) -> bool:
    """Whether the folder was made by our tools and has no README.md of others."""
    if not (folder / MANIFEST).is_file() or README in read_manifest(folder):
        return False
    readme = folder / README
    return not readme.exists() or MADE_HERE in readme.read_text(encoding="utf-8", errors="replace")
