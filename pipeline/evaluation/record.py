"""settings.json: everything the numbers of a folder depend on. It keeps answers and verdicts of different models,
settings and judges apart, and lets each phase go on from the folder alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.evaluation.suite import Prompts
from pipeline.report.records import read_json
from pipeline.training.manifest import write_json

GROUPS = ("suites", "loss_data", "versions")  # more of them may join later
ELSEWHERE = ("model", "adapter")  # where the weights lie does not matter; what they are, their hash says


class Record:
    """The settings.json of an output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "settings.json"

    def read(self) -> dict[str, Any]:
        """Errors: ValueError if there is none."""
        if not self.path.is_file():
            raise ValueError(
                f"--output_dir {self.folder}: holds no answers; run `python pipeline/assess.py generate` first"
            )
        return read_json(self.path)

    def keep(self, settings: Mapping[str, Any]) -> None:
        """Writes the settings of the answers, after comparing them with those an earlier run left.

        Raises:
            ValueError: something both depend on differs.
        """
        before = read_json(self.path) if self.path.is_file() and any(self.folder.glob("*.jsonl*")) else {}
        old, now = _flat(before), _flat(settings)
        for name in now:
            if name in old and name not in ELSEWHERE and now[name] != old[name]:
                raise ValueError(
                    f"--output_dir {self.folder}: holds an evaluation with {name} {old[name]!r}, now {now[name]!r}; "
                    "choose another folder or remove that one"
                )
        kept = {**before, **settings}
        for group in GROUPS:
            kept[group] = {**before.get(group, {}), **settings[group]}
        for name, each in before.get("suites", {}).items():
            if "judge" in each and name in settings["suites"]:
                kept["suites"][name] = {**kept["suites"][name], "judge": each["judge"]}
        write_json(self.path, kept)

    def holds(self, settings: Mapping[str, Any]) -> bool:
        """Whether these settings are written already."""
        if not self.path.is_file():
            return False
        old, now = _flat(read_json(self.path)), _flat(settings)
        return all(name in ELSEWHERE or old.get(name) == now[name] for name in now)

    def keep_judge(self, suite: str, identity: Any) -> None:
        """Writes the judge of a suite's verdicts.

        Raises:
            ValueError: there are verdicts of another judge.
        """
        settings = self.read()
        before = settings["suites"][suite].get("judge")
        verdicts = sorted(self.folder.glob(f"verdicts-{suite}.jsonl*"))
        if verdicts and before != identity:
            differing = [key for key in {**_fields(before), **_fields(identity)}
                         if _fields(before).get(key) != _fields(identity).get(key)]  # fmt: skip
            raise ValueError(
                f"{verdicts[0]}: holds verdicts of another judge (its {', '.join(differing)} differs); remove it to "
                "judge the answers again"
            )
        settings["suites"][suite]["judge"] = identity
        write_json(self.path, settings)


def prompts_sha256(prompts: Prompts) -> str:
    """Of everything that is asked and that a judge is told."""
    return digest([asdict(each) for each in prompts.prompts])


def digest(value: Any) -> str:
    """sha256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in settings.items() if name not in GROUPS}
    for group in GROUPS:
        for name, value in settings.get(group, {}).items():
            # A suite's judge came later than its answers.
            shown = {key: each for key, each in value.items() if key != "judge"} if group == "suites" else value
            flat[f"{group} {name}"] = shown
    return flat


def _fields(identity: Any) -> dict[str, Any]:
    return identity if isinstance(identity, dict) else {"name": identity}
