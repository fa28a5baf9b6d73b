"""All suites by name, and the flags that choose among them."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import nearest
from pipeline.evaluation import harmful_suites, policy, tasks
from pipeline.evaluation.suite import Suite
from pipeline.evaluation.suite_sources import Source

SUITES: dict[str, Suite] = {"policy": policy.SUITE, **harmful_suites.SUITES, **tasks.SUITES}
SOURCES: dict[str, Source] = {**harmful_suites.SOURCES, **tasks.SOURCES}


def own_source(suite: str) -> str:
    """Where a suite's rows come from unless --suite_data says otherwise."""
    return str(SOURCES.get(suite, "built in"))


def suite_names(words: Sequence[str]) -> list[str]:
    """The names in `policy,gsm8k` or `policy gsm8k`. Errors: ValueError for one that is unknown or stands twice."""
    names = [name for word in words for name in word.split(",") if name]
    for name in names:
        if name not in SUITES:
            raise ValueError(f"--suites {name}: unknown{nearest(name, SUITES)}")
        if names.count(name) > 1:
            raise ValueError(f"--suites {name}: stands twice")
    return names


def named(words: Sequence[str], flag: str, known: Sequence[str] | None = None) -> dict[str, str]:
    """NAME=VALUE words as a mapping. Errors: ValueError for another form, an unknown name, or one given twice."""
    found: dict[str, str] = {}
    for each in words:
        name, separator, value = each.partition("=")
        if not (name and separator and value):
            example = "benign=policy:benign" if flag == "loss_data" else f"{(known or ['name'])[0]}=VALUE"
            raise ValueError(f"--{flag} {each}: expected name=SPEC, as in {example}")
        if known is not None and name not in known:
            raise ValueError(f"--{flag} {each}: {name} is unknown{nearest(name, known)}")
        if name in found:
            raise ValueError(f"--{flag} {each}: the name {name} is given twice")
        found[name] = value
    return found
