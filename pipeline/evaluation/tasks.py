"""The user's tasks of the field, SST-2, AG News and GSM8K, with its instructions and its rules of what is right.

Rules of the public Surgery code, under both protocols: see sst2_right, agnews_right, gsm8k_right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from pipeline.evaluation.suite import ACCURACY, EXACT, Prompt, Prompts, Protocol, Suite
from pipeline.evaluation.suite_rows import choice, suite_rows, text
from pipeline.evaluation.suite_sources import HubFiles, Source
from pipeline.evaluation.templates import read_template

SST2 = HubFiles("stanfordnlp/sst2", "8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb", ("data/validation-*.parquet",))
AGNEWS = HubFiles("fancyzhx/ag_news", "eb185aade064a813bc0b7f42de02595523103ca4", ("data/test-*.parquet",))
GSM8K = HubFiles("openai/gsm8k", "e53f048856ff4f594e959d75785d2c2d37b678ee", ("main/test-*.parquet",))
FIRST = 1000  # rows of AG News and GSM8K, as the public codes take them

SENTIMENTS = ("negative", "positive")
TOPICS = ("World", "Sports", "Business", "Sci/Tech")
_NUMBER = re.compile(r"-?\d+\.?\d*")


def sst2(spec: str | None, protocol: Protocol) -> Prompts:
    """Sentences of the validation set (872)."""
    return _labelled("sst2", spec, protocol, SST2, "sentence", SENTIMENTS, None)


def agnews(spec: str | None, protocol: Protocol) -> Prompts:
    """Articles of the test set."""
    return _labelled("agnews", spec, protocol, AGNEWS, "text", TOPICS, FIRST)


def gsm8k(spec: str | None, protocol: Protocol) -> Prompts:
    """Questions of the test set; the label is the number behind the last "####" of the answer."""
    prompts = []
    for row in suite_rows("gsm8k", spec, GSM8K, ["question", "answer"], first=FIRST):
        question = text(row, row.fields["question"], "question")
        reference = text(row, row.fields["answer"], "answer").rpartition("####")[2]
        if math.isinf(gsm8k_number(reference)):
            raise ValueError(f"{row.id}: 'answer' ends without a number")
        prompts.append(Prompt(id=row.id, kind="task", question=question, text=question, label=reference.strip()))
    return Prompts(prompts)


def sst2_right(answer: str, label: str) -> bool:
    """The answer is the label, in any case."""
    return answer.strip().lower() == label


def agnews_right(answer: str, label: str) -> bool:
    """The label stands in the answer, in any case."""
    return label.lower() in answer.lower()


def gsm8k_right(answer: str, label: str) -> bool:
    """The answer's number is the reference's."""
    return gsm8k_number(answer) == gsm8k_number(label)


def gsm8k_number(answer: str) -> float:
    """The first number behind the marker, else the last of all, commas removed; infinity if there is none."""
    answer = answer.replace(",", "")
    parts = answer.split(read_template("gsm8k_answer_marker.txt"))
    behind = _NUMBER.findall(parts[1]) if len(parts) > 1 else []
    found = behind[:1] or _NUMBER.findall(answer)[-1:]
    return float(found[0]) if found else math.inf


def _labelled(
    suite: str,
    spec: str | None,
    protocol: Protocol,
    source: HubFiles,
    column: str,
    names: Sequence[str],
    first: int | None,
) -> Prompts:
    instruction = read_template(f"{suite}.txt")
    if protocol == "paper":  # the Surgery code has AG News' instruction without its last newline
        instruction = instruction.removesuffix("\n")
    prompts = []
    for row in suite_rows(suite, spec, source, [column, "label"], first=first):
        shown = text(row, row.fields[column], column)
        label = choice(row, "label", names)
        prompts.append(Prompt(id=row.id, kind="task", question=shown, text=instruction, input=shown, label=label))
    return Prompts(prompts)


def _verdict(right: Callable[[str, str], bool]) -> Callable[[Prompt, str], str]:
    return lambda prompt, answer: "correct" if right(answer, prompt.label) else "wrong"


def _task(
    read: Callable[[str | None, Protocol], Prompts], right: Callable[[str, str], bool], tokens: int, licence: str
) -> Suite:
    return Suite(
        read=read,
        judge={"chat": EXACT, "paper": EXACT},
        exact=_verdict(right),
        max_new_tokens={"chat": tokens, "paper": tokens},
        scores=(ACCURACY,),
        licence=licence,
        paper="task",
        note="the public Surgery code gives no attention mask here, so its answers depend on the batch; these do not",
    )


SUITES = {
    "gsm8k": _task(gsm8k, gsm8k_right, 512, "MIT"),
    "sst2": _task(sst2, sst2_right, 10, "unknown (none on the data card)"),
    "agnews": _task(agnews, agnews_right, 10, "unknown (for non-commercial activity, by its description)"),
}
SOURCES: dict[str, Source] = {"gsm8k": GSM8K, "sst2": SST2, "agnews": AGNEWS}
