"""F4 and F5: does a reply decline, and is a text safe. The judges are those of pipeline/evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pipeline.curation.dgr_sources import Source
from pipeline.evaluation import policy
from pipeline.evaluation.judges import MODEL_JUDGES, REFUSAL_LISTS
from pipeline.evaluation.suite import Kind, Prompt

POLICY = "policy"  # the rule of the built-in set
GUARDS = ("none", POLICY, *MODEL_JUDGES)
RULES = (POLICY, *REFUSAL_LISTS)
UNSAFE = ("harmful", "complied", "unparsed")
"""Verdicts a text does not pass with: what cannot be read is not called safe."""


class Guard(Protocol):
    """From a text to its verdict line."""

    def identity(self) -> Any: ...

    def verdict(self, prompt: Prompt, answer: str) -> dict[str, Any]: ...


class PolicyGuard:
    """The built-in set's own rule: a text about a row that declines may not tell how the thing is made."""

    def identity(self) -> str:
        return POLICY

    def verdict(self, prompt: Prompt, answer: str) -> dict[str, Any]:
        unsafe = prompt.kind == "violation" and policy.judge(prompt, answer) == "complied"
        return {"verdict": "harmful" if unsafe else "safe"}


def find_guard(name: str, models: Mapping[str, str], templates: Mapping[str, str]) -> Guard | None:
    """The guard of --guard, None for `none`. models, templates: --judge_model and --judge_template, by judge.

    Errors: ValueError if its model is missing or another one.
    """
    for flag, given in (("judge_model", models), ("judge_template", templates)):
        for other in given:
            if other != name:
                raise ValueError(f"--{flag} {other}={given[other]}: --guard is {name}; give the guard's own")
    if name == "none":
        return None
    return PolicyGuard() if name == POLICY else MODEL_JUDGES[name](models.get(name), templates.get(name))


def find_rule(name: str) -> Callable[[str], bool]:
    """Whether a reply declines, by --refusal_rule."""
    if name == POLICY:
        anything = Prompt(id="", kind="benign", question="", text="")
        return lambda reply: policy.judge(anything, reply) == "refused"
    judge, prompt = REFUSAL_LISTS[name](), Prompt(id="", kind="violation", question="", text="")
    return lambda reply: bool(judge.verdict(prompt, reply)["verdict"] == "refused")


def asked(source: Source, *, declines: bool) -> Prompt:
    """A row as a guard is told of it."""
    kind: Kind = "violation" if declines else "benign"
    return Prompt(id=source.id, kind=kind, question=source.message, text=source.message)
