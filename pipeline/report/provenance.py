"""Where a report's numbers come from: commands, data, weights, judges and versions, taken from what the stages wrote.

Texts of prompts and answers never stand in those files; the one text that surrounds a prompt is left out all the same.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.report.comparison import Row
from pipeline.report.records import read_json

TEXTS = ("rendered_prompt",)
"""Settings that hold a text around a prompt."""

# Settings by the flag of assess.py that made them.
FLAGS = {
    "model": "model_name_or_path",
    "adapter": "adapter_name_or_path",
    "protocol": "protocol",
    "engine": "engine",
    "batch_size": "batch_size",
    "max_new_tokens": "max_new_tokens",
    "max_length": "max_length",
    "system_prompt": "system_prompt",
}


@dataclass
class Provenance:
    """One model. facts: name and value. commands: how it was trained and assessed. attacked: on purpose."""

    name: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    attacked: bool = False


def provenance(rows: Sequence[Row]) -> tuple[dict[str, str], list[Provenance]]:
    """The settings that all assessments share, and of each model the others, its training and its commands."""
    settings = {row.name: [_settings(folder) for folder in row.folders["assess"]] for row in rows}
    every = [each for seeds in settings.values() for each in seeds]
    shared = {key: value for key, value in every[0].items() if all(each.get(key) == value for each in every)}
    return shared, [_of_row(row, settings[row.name], shared) for row in rows]


def training_facts(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a run.json says about how a model was trained."""
    yield "method", f"{record.get('method')}, {record.get('steps')} steps, seed {record.get('seed')}"
    for name, data in record.get("data", {}).items():
        yield f"data: {name}", f"{data['spec']} ({data['rows']} rows, SHA-256 {data['fingerprint']})"
    if record.get("commit"):
        yield "commit", str(record["commit"])


def assess_command(results: Mapping[str, Any]) -> str:
    """The command that gives these results again; of a judge's prompt of one's own (--judge_template) only the hash is
    known."""
    settings, words = results.get("settings", {}), ["python", "pipeline/assess.py"]
    for key, flag in FLAGS.items():
        value = settings.get(key)
        if value is not None:
            words += [f"--{flag}", str(value["name"] if isinstance(value, Mapping) else value)]
    longest = {each.get("max_new_tokens") for each in settings.get("suites", {}).values()}
    if len(longest) == 1 and None not in longest:
        words += ["--max_new_tokens", str(longest.pop())]
    words += ["--suites", *results["suites"], *_suite_flags(settings.get("suites", {}))]
    if losses := settings.get("loss_data"):
        words += ["--loss_data", *(f"{name}={each['spec']}" for name, each in losses.items())]
    return shlex.join([*words, "--output_dir", "DIR"])


def _suite_flags(suites: Mapping[str, Any]) -> Iterator[str]:
    """Where suites' rows and judges come from, if not from where they do by default."""
    own = {name: each["suite_data"] for name, each in suites.items() if each.get("suite_data")}
    judges = {name: each["judge"] for name, each in suites.items() if isinstance(each.get("judge"), Mapping)}
    models = {each["name"]: each["model"] for each in judges.values() if "model" in each and not each["revision"]}
    named = {"suite_data": own, "judges": {name: each["name"] for name, each in judges.items()}, "judge_model": models}
    for flag, values in named.items():
        if values:
            yield from (f"--{flag}", *(f"{name}={value}" for name, value in values.items()))


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as `outer.inner` and text, without empty ones."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif value is not None and key not in TEXTS:
            yield f"{prefix}{key}", str(value)


def _settings(folder: Path) -> dict[str, str]:
    return dict(flat(read_json(folder / "results.json").get("settings", {})))


def _of_row(row: Row, seeds: Sequence[Mapping[str, str]], shared: Mapping[str, str]) -> Provenance:
    found = Provenance(row.name)
    records = [
        read_json(folder / "run.json") for folder in row.folders.get("run", []) if (folder / "run.json").is_file()
    ]
    for record in records:
        found.facts += training_facts(record)
        found.commands.append(shlex.join(map(str, record.get("argv", []))))
        found.attacked |= record.get("attacked") is True
    found.facts += [("control", match.sentence()) for match in row.matches]
    found.facts += [(key, value) for settings in seeds for key, value in settings.items() if key not in shared]
    found.commands += [assess_command(read_json(folder / "results.json")) for folder in row.folders["assess"]]
    return found
