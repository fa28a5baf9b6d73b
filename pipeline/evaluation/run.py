"""One evaluation, from arguments to results.json: generate -> judge -> report, and the cross-entropies.

Every phase reads and writes JSONL in the output folder and finds there what an interrupted run has done:
answers-SUITE.jsonl, verdicts-SUITE.jsonl, losses.jsonl. settings.json, written first, keeps answers of different
models or settings apart.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config import ModelArguments, nearest
from pipeline.data.chat import ChatEncoder, Example
from pipeline.data.schema import read_conversations
from pipeline.evaluation import policy
from pipeline.evaluation.gate import read_conditions
from pipeline.evaluation.generate import generate
from pipeline.evaluation.jsonl import append_lines, resume_lines
from pipeline.evaluation.judging import judge, scores
from pipeline.evaluation.losses import cross_entropy
from pipeline.evaluation.model import EvaluatedModel, pad_token
from pipeline.evaluation.suite import Prompt, Suite
from pipeline.report.comparison import read_row
from pipeline.report.model_card import write_model_card
from pipeline.report.page import write_report
from pipeline.training.manifest import versions, write_json

SUITES: dict[str, Suite] = {"policy": policy.SUITE}


@dataclass
class AssessArguments:
    """What to evaluate, and how."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder of answers, verdicts and results.json."})
    suites: list[str] = field(
        default_factory=lambda: ["policy"], metadata={"help": f"Suites to run: {', '.join(SUITES)}."}
    )
    loss_data: list[str] = field(
        default_factory=list, metadata={"help": "Conversations to take the cross-entropy on: name=SPEC name=SPEC ..."}
    )
    batch_size: int = field(default=32, metadata={"help": "Prompts answered together."})
    max_new_tokens: int = field(default=24, metadata={"help": "Longest answer, in tokens."})
    max_length: int = field(default=1024, metadata={"help": "Longest conversation, in tokens."})
    system_prompt: str | None = field(default=None, metadata={"help": "System turn for prompts that have none."})
    fail_if: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Release gate: exit code 3 if a condition holds, as in 'harmful_score>5' 'policy.accuracy<90' "
            "(percent; unparsed verdicts count against the model)."
        },
    )


def assess(model_arguments: ModelArguments, arguments: AssessArguments) -> dict[str, Any]:
    """Runs the phases that are not done yet and writes results.json, which it returns.

    Raises:
        ValueError: bad arguments or data, or an output folder that holds another evaluation.
    """
    return _Evaluation(model_arguments, arguments).run()


def summary(results: dict[str, Any]) -> str:
    """The scores for a terminal: numbers only, never an answer."""
    lines = []
    for suite, shares in results["suites"].items():
        for name, score in shares.items():
            share, interval = f"{score['value']:.1%}", f"{score['low']:.1%} to {score['high']:.1%}"
            lines.append(f"{suite:<12} {name:<16} {share:>7}  ({interval}, {score['k']} of {score['n']})")
    for name, loss in results["losses"].items():
        lines.append(f"{'loss':<12} {name:<16} {loss['value']:>7.4f}  ({loss['tokens']} tokens)")
    lines += [f"gate failed: {each['sentence']}" for each in results["gate"] if each["failed"]]
    return "\n".join(lines)


class _Evaluation:
    def __init__(self, model_arguments: ModelArguments, arguments: AssessArguments) -> None:
        _check(arguments)
        self.arguments = arguments
        given = {name: [score.name for score in SUITES[name].scores] for name in arguments.suites}
        self.gate = read_conditions(arguments.fail_if, given)
        self.folder = Path(arguments.output_dir or "")
        # All data is read before the model, so that a bad row is found at once.
        self.prompts: dict[str, list[Prompt]] = {
            name: list(SUITES[name].prompts(arguments.system_prompt)) for name in arguments.suites
        }
        self.model = EvaluatedModel(model_arguments)
        self.encoder = ChatEncoder(self.model.tokenizer, max_length=arguments.max_length)
        self.losses = {name: self._examples(spec) for name, spec in _named(arguments.loss_data).items()}

    def run(self) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = self._settings()
        _keep_apart(self.folder / "settings.json", settings)
        suites = {name: self._suite(name) for name in self.prompts}
        losses = self._cross_entropies()
        gate = [each.verdict(suites) for each in self.gate]
        results = {
            "model": self.model.name, "suites": suites, "losses": losses, "settings": settings, "gate": gate
        }  # fmt: skip
        write_json(self.folder / "results.json", results)
        write_report([read_row(Path(self.model.name).name, {"assess": [self.folder]})], self.folder)
        write_model_card(self.folder)
        return results

    @cached_property
    def _loaded(self) -> Any:
        print(f"Loading {self.model.name} ({self.model.dtype}, {self.model.device}) ...", flush=True)
        return self.model.load()

    def _suite(self, name: str) -> dict[str, Any]:
        answers, verdicts = self.folder / f"answers-{name}.jsonl", self.folder / f"verdicts-{name}.jsonl"
        prompts = self.prompts[name]
        generate(
            lambda: self._loaded,
            self.encoder,
            prompts,
            answers,
            batch_size=self.arguments.batch_size,
            max_new_tokens=self.arguments.max_new_tokens,
        )
        judge(SUITES[name], {prompt.id: prompt for prompt in prompts}, answers, verdicts)
        return scores(SUITES[name], verdicts)

    def _cross_entropies(self) -> dict[str, Any]:
        path = self.folder / "losses.jsonl"
        done = {line["name"]: line for line in resume_lines(path)}
        for name, examples in self.losses.items():
            if name not in done:
                loss = cross_entropy(
                    self._loaded, examples, pad_token=pad_token(self.model.tokenizer), label=f"cross-entropy {name}"
                )
                done[name] = {
                    "name": name,
                    "value": loss.value,
                    "tokens": loss.tokens,
                    "rows": len(examples),
                    "truncated_rows": sum(example.truncated for example in examples),
                }
                append_lines(path, [done[name]])
        return {name: {key: done[name][key] for key in done[name] if key != "name"} for name in self.losses}

    def _examples(self, spec: str) -> list[Example]:
        conversations = read_conversations(spec, flag="loss_data", system_prompt=self.arguments.system_prompt)
        return [self.encoder.encode(conversation) for conversation in conversations]

    def _settings(self) -> dict[str, Any]:
        """Everything the numbers depend on. Prompts stand as hashes: a suite may hold text nobody should meet here."""
        system = self.arguments.system_prompt
        probe = [{"role": "user", "content": "PROMPT"}]
        if system is not None:
            probe.insert(0, {"role": "system", "content": system})
        rendered = self.encoder.encode_prompt(probe)
        tokenizer = self.model.tokenizer
        return {
            "model": self.model.name,
            "adapter": self.model.adapter,
            "weights_sha256": self.model.weights_fingerprint(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "decoding": "greedy",
            "padding_side": "left",
            "batch_size": self.arguments.batch_size,
            "max_new_tokens": self.arguments.max_new_tokens,
            "max_length": self.arguments.max_length,
            "system_prompt": system,
            "encoder": self.encoder.fingerprint,
            "rendered_prompt": tokenizer.decode(rendered),
            "bos_tokens": rendered[:2].count(tokenizer.bos_token_id),
            "suites": {name: _digest([prompt.messages for prompt in each]) for name, each in self.prompts.items()},
            "loss_data": {
                name: {"spec": spec, "sha256": _digest([[each.input_ids, each.labels] for each in self.losses[name]])}
                for name, spec in _named(self.arguments.loss_data).items()
            },
            "versions": versions(),
        }


def _check(arguments: AssessArguments) -> None:
    if not arguments.output_dir:
        raise ValueError("--output_dir: name a folder for the answers and results.json")
    for flag in ("batch_size", "max_new_tokens"):
        if getattr(arguments, flag) < 1:
            raise ValueError(f"--{flag} {getattr(arguments, flag)}: must be at least 1")
    for name in arguments.suites:
        if name not in SUITES:
            raise ValueError(f"--suites {name}: unknown{nearest(name, SUITES)}")


def _named(specs: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for each in specs:
        name, separator, spec = each.partition("=")
        if not (name and separator and spec):
            raise ValueError(f"--loss_data {each}: expected name=SPEC, as in benign=policy:benign")
        if name in named:
            raise ValueError(f"--loss_data {each}: the name {name} is given twice")
        named[name] = spec
    return named


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _keep_apart(path: Path, settings: dict[str, Any]) -> None:
    """Writes settings.json, after comparing it with the one an earlier run left: its answers must still hold.

    Raises:
        ValueError: something both runs depend on differs.
    """
    # Where the model lies does not matter; what it is, its hash says.
    now = {name: value for name, value in settings.items() if name not in ("model", "adapter")}
    for group in ("suites", "loss_data", "versions"):  # further suites and data sets may join
        now.update({f"{group} {name}": value for name, value in now.pop(group).items()})
    answered = path.is_file() and any(path.parent.glob("*.jsonl"))
    before = json.loads(path.read_text(encoding="utf-8")) if answered else {}
    for name in now:
        if name in before and now[name] != before[name]:
            raise ValueError(
                f"--output_dir {path.parent}: holds an evaluation with {name} {before[name]!r}, now {now[name]!r}; "
                "choose another folder or remove that one"
            )
    write_json(path, {**before, **now})
