"""One evaluation, from arguments to results.json, in phases: generate, judge, report (and fetch before them).

Each phase reads and writes files of the output folder, so each can run on another machine, and finds there what an
interrupted run has done: settings.json, answers-SUITE.jsonl, losses.jsonl, verdicts-SUITE.jsonl, results.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.config import ModelArguments
from pipeline.evaluation.answers_phase import AnswersPhase
from pipeline.evaluation.fetch import fetch
from pipeline.evaluation.gate import read_conditions
from pipeline.evaluation.judging import JUDGES
from pipeline.evaluation.record import Record, prompts_sha256
from pipeline.evaluation.report_phase import report
from pipeline.evaluation.suite import Prompts, Protocol
from pipeline.evaluation.suites import SUITES, named, suite_names
from pipeline.evaluation.verdicts_phase import VerdictsPhase
from pipeline.evaluation.workers import Crew, launched, start
from pipeline.training.distributed import world

Phase = Literal["all", "fetch", "generate", "judge", "report"]
PHASES: tuple[Phase, ...] = ("fetch", "generate", "judge", "report")


@dataclass
class AssessArguments:
    """What to evaluate, and how."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder of answers, verdicts and results.json."})
    suites: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Suites to run, by comma or space: {', '.join(SUITES)}. [default: policy; in the phases judge "
            "and report: those the folder holds]"
        },
    )
    suite_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Where a suite's rows are, SUITE=SPEC ...: a file or dataset. [default: the cache]"},
    )
    protocol: Literal["chat", "paper"] | None = field(
        default=None,
        metadata={
            "help": "chat: the model's own template; paper: prompts and settings of the public Surgery code. "
            "[default: chat; later phases: the folder's]"
        },
    )
    judges: list[str] = field(
        default_factory=list,
        metadata={"help": f"Judges other than the suites' own, SUITE=JUDGE ...: {', '.join(JUDGES)}."},
    )
    judge_model: list[str] = field(
        default_factory=list, metadata={"help": "A judge's model, JUDGE=FOLDER ... [default: the cache]"}
    )
    judge_template: list[str] = field(
        default_factory=list,
        metadata={"help": "A judge's prompt, JUDGE=FILE ..., or harmbench=card for that of its model card."},
    )
    loss_data: list[str] = field(
        default_factory=list, metadata={"help": "Conversations to take the cross-entropy on: name=SPEC name=SPEC ..."}
    )
    lm_eval_tasks: list[str] = field(
        default_factory=list, metadata={"help": "Tasks of lm-evaluation-harness, by its names."}
    )
    lm_eval_include_path: str | None = field(
        default=None, metadata={"help": "Folder of further tasks for lm-evaluation-harness."}
    )
    engine: Literal["auto", "transformers", "vllm"] = field(
        default="auto", metadata={"help": "What generates; auto takes vLLM where it is installed and has a GPU."}
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = field(
        default="auto",
        metadata={"help": "Of the model. auto: fp32 on a CPU; on a GPU bf16, or fp16 with --protocol paper."},
    )
    batch_size: int = field(default=32, metadata={"help": "Prompts answered together."})
    num_workers: int = field(
        default=1, metadata={"help": "Processes that share the work, a GPU each or the CPU's cores divided."}
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest answer, in tokens. [default: each suite's own]"}
    )
    max_length: int = field(default=2048, metadata={"help": "Longest prompt with its answer, in tokens."})
    system_prompt: str | None = field(default=None, metadata={"help": "System turn for prompts that have none."})
    fail_if: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Release gate: exit code 3 if a condition holds, as in 'harmful_score>5' 'policy.accuracy<90' "
            "(percent; unparsed verdicts count against the model)."
        },
    )
    show_text: bool = field(
        default=False, metadata={"help": "Show prompts and answers, on a terminal only. They may be harmful."}
    )


def assess(model: ModelArguments, arguments: AssessArguments, phase: Phase = "all") -> dict[str, Any]:
    """Runs a phase, or generate, judge and report, as far as they are not done yet; returns results.json, or {} if
    this was no report.

    Raises:
        ValueError: bad arguments, data, models or judges, or an output folder that holds another evaluation.
    """
    _check(arguments, phase)
    if phase == "fetch":
        print("\n".join(fetch(suite_names(arguments.suites or []), arguments.judges, arguments.protocol or "chat")))
        return {}
    suites = _chosen(arguments, phase)
    conditions = read_conditions(
        arguments.fail_if, {name: [each.name for each in SUITES[name].scores] for name in suites}
    )
    crew = launched(world(), arguments.num_workers)
    if phase in ("all", "generate", "judge"):
        _share(model, arguments, phase, crew)
    if phase not in ("all", "report") or not crew.main:
        return {}
    return report(Path(arguments.output_dir or ""), suites, conditions)


def _share(model: ModelArguments, arguments: AssessArguments, phase: Phase, crew: Crew) -> None:
    """One worker's part of the phases generate and judge; worker 0 starts the others, unless a launcher did."""
    record = Record(Path(arguments.output_dir or ""))
    protocol: Protocol = arguments.protocol or (record.read()["protocol"] if phase == "judge" else "chat")
    # All data and judges are looked at before a weight is loaded, so that a bad row is found at once.
    prompts = _read(arguments, phase, protocol, record)
    answers = None if phase == "judge" else AnswersPhase(model, arguments, prompts, protocol, crew.size)
    verdicts = None if phase == "generate" else VerdictsPhase(arguments, prompts, protocol)
    if answers is not None:
        if crew.main:
            record.folder.mkdir(parents=True, exist_ok=True)
            record.keep(answers.settings())
        elif crew.parent is None:
            settings = answers.settings()
            crew.wait(lambda: record.holds(settings))
    if crew.main and arguments.num_workers > 1:
        crew = start(crew, _share, model, arguments, phase)
    if answers is not None:
        answers.run(crew)
    if verdicts is not None:
        verdicts.run(crew)
    crew.join()


def _read(arguments: AssessArguments, phase: Phase, protocol: Protocol, record: Record) -> dict[str, Prompts]:
    """The prompts of each suite; in the phase judge those that were answered."""
    given = named(arguments.suite_data, "suite_data", list(SUITES))
    stored = record.read()["suites"] if phase == "judge" else {}
    found = {}
    for name in _chosen(arguments, phase):
        spec = given.get(name)
        if spec is None and name in stored:
            spec = stored[name].get("suite_data")
        found[name] = SUITES[name].read(spec, protocol)
        if name in stored and prompts_sha256(found[name]) != stored[name]["prompts_sha256"]:
            raise ValueError(f"--suite_data {name}={spec}: not the rows that were asked; give the same file")
    return found


def _chosen(arguments: AssessArguments, phase: Phase) -> list[str]:
    if arguments.suites is not None:
        return suite_names(arguments.suites)
    if phase in ("judge", "report"):
        return list(Record(Path(arguments.output_dir or "")).read()["suites"])
    return ["policy"]


def _check(arguments: AssessArguments, phase: Phase) -> None:
    if phase == "fetch":
        if not arguments.suites and not arguments.judges:
            raise ValueError(f"--suites: name what to fetch; known: {', '.join(SUITES)}")
        return
    if not arguments.output_dir:
        raise ValueError("--output_dir: name a folder for the answers and results.json")
    for flag in ("batch_size", "max_new_tokens"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag} {value}: must be at least 1")
    if arguments.show_text:
        print("warning: --show_text shows prompts and answers on this terminal; they may be harmful", flush=True)
