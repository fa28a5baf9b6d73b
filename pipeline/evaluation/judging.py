"""Phase 2: from answers-SUITE.jsonl to verdicts-SUITE.jsonl; a killed run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import nearest
from pipeline.evaluation.jsonl import read_lines
from pipeline.evaluation.judges import MODEL_JUDGES, REFUSAL_LISTS, Judge
from pipeline.evaluation.shared_lines import make_lines
from pipeline.evaluation.suite import EXACT, Prompt, Suite
from pipeline.evaluation.workers import Crew

JUDGES = (EXACT, *MODEL_JUDGES, *REFUSAL_LISTS)
TOGETHER = 16  # answers whose verdicts are written together


class ExactJudge:
    """The rule of a suite whose right answers are known."""

    def __init__(self, rule: Callable[[Prompt, str], str]) -> None:
        self._rule = rule

    def identity(self) -> str:
        return EXACT

    def verdict(self, prompt: Prompt, answer: str) -> dict[str, Any]:
        return {"verdict": self._rule(prompt, answer)}


def find_judge(
    suite_name: str, suite: Suite, name: str, models: Mapping[str, str], templates: Mapping[str, str]
) -> Judge | ExactJudge:
    """The judge of a suite by its name in JUDGES.

    Args:
        models, templates: --judge_model and --judge_template, by judge.

    Raises:
        ValueError: an unknown judge, one that this suite cannot have, or a judge whose model is missing.
    """
    if name not in JUDGES:
        raise ValueError(f"--judges {suite_name}={name}: {name} is unknown{nearest(name, JUDGES)}")
    if name == EXACT or suite.exact is not None:
        if suite.exact is None or name != EXACT:
            known = EXACT if suite.exact is not None else ", ".join(JUDGES[1:])
            raise ValueError(f"--judges {suite_name}={name}: this suite is judged by {known}")
        return ExactJudge(suite.exact)
    if name in REFUSAL_LISTS:
        return REFUSAL_LISTS[name]()
    return MODEL_JUDGES[name](models.get(name), templates.get(name))


def judge(judge_: Judge | ExactJudge, prompts: Sequence[Prompt], answers: Path, verdicts: Path, crew: Crew) -> None:
    """Completes `verdicts`: one line {"id", "kind", "category", "verdict", "truncated", ...} an answer, in the order
    of the prompts; what a judge may say beside is in judges.Judge.

    Raises:
        ValueError: the answers are not exactly one for each prompt.
    """
    lines = read_lines(answers)
    if [line.get("id") for line in lines] != [prompt.id for prompt in prompts]:
        raise ValueError(
            f"{answers}: {len(lines)} answers do not match the {len(prompts)} prompts; remove it and run again"
        )

    def work(batch: Sequence[int]) -> list[dict[str, Any]]:
        made = []
        for i in batch:
            prompt, line = prompts[i], lines[i]
            fields = {"id": prompt.id, "kind": prompt.kind}
            fields |= {"category": prompt.category} if prompt.category else {}
            made.append(fields | judge_.verdict(prompt, line["answer"]) | {"truncated": line["truncated"]})
        return made

    batches = [range(start, min(start + TOGETHER, len(lines))) for start in range(0, len(lines), TOGETHER)]
    make_lines(verdicts, [prompt.id for prompt in prompts], batches, work, crew, label=verdicts.stem)
