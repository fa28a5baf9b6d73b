"""The judge phase: needs the answers, the prompts and the judges, not the model that answered."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.evaluation.judging import find_judge, judge
from pipeline.evaluation.record import Record
from pipeline.evaluation.suite import EXACT, Prompts, Protocol
from pipeline.evaluation.suites import SUITES, named
from pipeline.evaluation.workers import Crew

if TYPE_CHECKING:
    from pipeline.evaluation.run import AssessArguments


class VerdictsPhase:
    """Finds the judge of each suite; weights are loaded by `run` alone, and only if a verdict is missing.

    Raises:
        ValueError: a judge that is unknown, missing, or of another architecture.
    """

    def __init__(self, arguments: AssessArguments, prompts: Mapping[str, Prompts], protocol: Protocol) -> None:
        self.folder = Path(arguments.output_dir or "")
        self.prompts = prompts
        chosen = named(arguments.judges, "judges", list(SUITES))
        models = named(arguments.judge_model, "judge_model")
        templates = named(arguments.judge_template, "judge_template")
        self.names = {name: chosen.get(name, SUITES[name].judge[protocol]) for name in prompts}
        for flag, given in (("judge_model", models), ("judge_template", templates)):
            unused = [name for name in given if name not in self.names.values()]
            if unused:
                raise ValueError(
                    f"--{flag} {unused[0]}={given[unused[0]]}: no suite here has this judge; the judges are "
                    f"{', '.join(sorted(set(self.names.values()))) or 'none'}"
                )
        # Suites of one judge share it: it is loaded once.
        found = {
            each: find_judge(name, SUITES[name], each, models, templates)
            for name, each in self.names.items()
            if each != EXACT
        }
        self.judges = {
            name: found.get(each) or find_judge(name, SUITES[name], each, models, templates)
            for name, each in self.names.items()
        }

    def run(self, crew: Crew) -> None:
        """Makes what is missing of verdicts-SUITE.jsonl."""
        record = Record(self.folder)
        for name, each in self.prompts.items():
            answers, verdicts = (self.folder / f"{kind}-{name}.jsonl" for kind in ("answers", "verdicts"))
            if not answers.is_file():
                raise ValueError(f"{answers}: no such file; run `python pipeline/assess.py generate` first")
            identity = self.judges[name].identity()
            if crew.main:
                record.keep_judge(name, identity)
            else:
                crew.wait(partial(_judged_by, record, name, identity))
            judge(self.judges.pop(name), each.prompts, answers, verdicts, crew)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _judged_by(record: Record, suite: str, identity: Any) -> bool:
    return bool(record.read()["suites"][suite].get("judge") == identity)
