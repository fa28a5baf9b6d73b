"""Requests that a model should refuse (BeaverTails, HarmBench, SORRY-Bench), and those that only sound so (XSTest)."""

from __future__ import annotations

from functools import partial
from typing import Any

from pipeline.data.rows import Row
from pipeline.evaluation.suite import (
    HARMFUL_SCORE,
    OVER_REFUSAL,
    Kind,
    Prompt,
    Prompts,
    Protocol,
    Score,
    Suite,
)
from pipeline.evaluation.suite_rows import suite_rows, text
from pipeline.evaluation.suite_sources import GitHubFile, HubFiles, Source
from pipeline.evaluation.templates import fill, read_template

BEAVERTAILS = HubFiles(
    "PKU-Alignment/BeaverTails", "8401fe609d288129cc684a9b3be6a93e41cfe678", ("round0/30k/test.jsonl.gz",)
)
HARMBENCH = GitHubFile(
    "centerforaisafety/HarmBench",
    "8e1604d1171fe8a48d8febecd22f600e462bdcdd",
    "data/behavior_datasets/harmbench_behaviors_text_all.csv",
    "8d81accedd38eaaf8b760618622bb888417d1fd0c86eba65c427a16f1cbb4afc",
)
SORRYBENCH = HubFiles(
    "sorry-bench/sorry-bench-202503", "612a4e1f45db8adf884fa62318ddf9fa1c6e75e9", ("question.jsonl",)
)
XSTEST = GitHubFile(
    "paul-rottger/exaggerated-safety",
    "d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d",
    "xstest_prompts.csv",
    "11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a",
)
FIRST = 1000  # rows of BeaverTails' 30k_test, as the public codes take them
COPYRIGHT_TAG = "hash_check"
LEFT_OUT = "copyright behaviours (HarmBench judges them by hashes of the works, which are not here)"


def _prompt(
    row: Row,
    question: str,
    *,
    kind: Kind = "violation",
    text: str | None = None,
    context: str = "",
    category: str = "",
) -> Prompt:
    asked = question if text is None else text
    return Prompt(id=row.id, kind=kind, question=question, text=asked, context=context, category=category)


def beavertails(spec: str | None, protocol: Protocol) -> Prompts:
    """The prompts, with repeats, of safe and unsafe rows alike: so the public Surgery and Lisa codes take them."""
    rows = suite_rows("beavertails", spec, BEAVERTAILS, ["prompt"], first=FIRST)
    return Prompts([_prompt(row, text(row, row.fields["prompt"], "prompt")) for row in rows])


def harmbench(spec: str | None, protocol: Protocol) -> Prompts:
    """The behaviours; a contextual one is asked behind its context, as HarmBench's direct request does.

    Copyright behaviours are left out. The public Surgery code (`paper`) asks all of them, without contexts.
    """
    columns = ["Behavior", "Tags", "ContextString", "SemanticCategory"]
    prompts: list[Prompt] = []
    copyright_rows = 0
    for row in suite_rows("harmbench", spec, HARMBENCH, columns):
        behavior = text(row, row.fields["Behavior"], "Behavior")
        tags = [each.strip() for each in str(row.fields["Tags"] or "").split(",")]
        category = str(row.fields["SemanticCategory"] or "")
        if protocol == "paper":
            prompts.append(_prompt(row, behavior, category=category))
        elif COPYRIGHT_TAG in tags:
            copyright_rows += 1
        elif "context" in tags:
            context = text(row, row.fields["ContextString"], "ContextString")
            asked = fill(read_template("harmbench_request_contextual.txt"), context_str=context, behavior=behavior)
            prompts.append(_prompt(row, behavior, text=asked, context=context, category=category))
        else:
            prompts.append(_prompt(row, behavior, category=category))
    if not prompts:
        raise ValueError(f"--suites harmbench: none of its {copyright_rows} behaviours can be judged")
    return Prompts(prompts, {LEFT_OUT: copyright_rows} if copyright_rows else {})


def sorrybench(spec: str | None, protocol: Protocol) -> Prompts:
    """The first turn of each question."""
    rows = suite_rows("sorrybench", spec, SORRYBENCH, ["turns", "category"])
    return Prompts([_prompt(row, _first_turn(row), category=str(row.fields["category"])) for row in rows])


def _first_turn(row: Row) -> str:
    turns: Any = row.fields["turns"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{row.id}: 'turns' is not a list of texts")
    return text(row, turns[0], "turns")


def xstest(spec: str | None, protocol: Protocol) -> Prompts:
    """Safe prompts that look unsafe are benign; their unsafe contrasts are violations."""
    prompts = []
    for row in suite_rows("xstest", spec, XSTEST, ["prompt", "type"]):
        form = str(row.fields["type"])
        kind: Kind = "violation" if form.startswith("contrast_") else "benign"
        prompts.append(_prompt(row, text(row, row.fields["prompt"], "prompt"), kind=kind, category=form))
    return Prompts(prompts)


_asked = partial(Suite, paper="alpaca", scores=(HARMFUL_SCORE,))

SUITES: dict[str, Suite] = {
    "beavertails": _asked(
        read=beavertails,
        judge={"chat": "beaver_dam", "paper": "beaver_dam"},
        max_new_tokens={"chat": 512, "paper": 512},
        licence="CC-BY-NC-4.0 (non-commercial)",
    ),
    "harmbench": _asked(
        read=harmbench,
        judge={"chat": "harmbench", "paper": "beaver_dam"},
        max_new_tokens={"chat": 512, "paper": 512},
        licence="MIT",
    ),
    "sorrybench": _asked(
        read=sorrybench,
        judge={"chat": "sorrybench", "paper": "beaver_dam"},
        max_new_tokens={"chat": 1024, "paper": 512},
        licence="sorry-bench (its owners' own terms, gated)",
        note="official answers are sampled at temperature 0.7; these are greedy",
    ),
    "xstest": Suite(
        read=xstest,
        judge={"chat": "refusal_xstest", "paper": "refusal_xstest"},
        max_new_tokens={"chat": 256, "paper": 256},
        # A refusal's first words say nothing of harm, so this is no harmful_score.
        scores=(OVER_REFUSAL, Score("unsafe_compliance", kind="violation", hits=("complied",))),
        licence="CC-BY-4.0",
    ),
}
SOURCES: dict[str, Source] = {
    "beavertails": BEAVERTAILS,
    "harmbench": HARMBENCH,
    "sorrybench": SORRYBENCH,
    "xstest": XSTEST,
}
