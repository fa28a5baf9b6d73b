"""The flags of --method dgr, and what they may be together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config import out_of_range
from pipeline.curation.dgr_guard import GUARDS, RULES
from pipeline.curation.dgr_request import STRENGTHS, Mode, Strength


@dataclass
class DgrArguments:
    """What is rewritten, and how."""

    method: str = field(default="dgr", metadata={"help": "Curation method: a name of pipeline/curation."})
    source_data: str | None = field(
        default=None, metadata={"help": "Safety data to rewrite, one question and one answer a row."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder of refined.jsonl and the report."})
    mode: Mode = field(
        default="native",
        metadata={
            "help": "native: the model's own thought and reply are the rewriting; text: it prints both in tags."
        },
    )
    strength: Literal["auto", "guide", "refer", "decision"] = field(
        default="guide",
        metadata={
            "help": "How the row's text is used: as a guide, closely, or its decision alone. auto: the one that "
            "rewrites most of 50 rows."
        },
    )
    rounds: int = field(
        default=1, metadata={"help": "What fails is tried again, each time with another strength, up to N in all."}
    )
    fallback: Literal["original", "drop"] = field(
        default="original",
        metadata={"help": "A row without a rewriting keeps its original (the paper) or is left out."},
    )
    samples: int = field(default=4, metadata={"help": "Candidates of a row in each round."})
    temperature: float | None = field(
        default=None, metadata={"help": "Of sampling; 0 is greedy. [default: the model's own settings, else 0.6]"}
    )
    top_p: float | None = field(default=None, metadata={"help": "[default: the model's own settings, else 0.95]"})
    top_k: int | None = field(default=None, metadata={"help": "0 is off. [default: the model's own settings, else 0]"})
    max_new_tokens: int = field(default=4096, metadata={"help": "Longest candidate, in tokens."})
    max_length: int = field(default=16384, metadata={"help": "Longest request with its candidate, in tokens."})
    guard: str = field(
        default="llama_guard_3",
        metadata={"help": f"What looks whether thought and reply are safe: {', '.join(GUARDS)}."},
    )
    judge_model: list[str] = field(
        default_factory=list, metadata={"help": "The guard's model, GUARD=FOLDER. [default: the cache]"}
    )
    judge_template: list[str] = field(default_factory=list, metadata={"help": "The guard's prompt, GUARD=FILE."})
    refusal_rule: str = field(
        default="refusal_advbench",
        metadata={"help": f"What tells whether a reply declines: {', '.join(RULES)}."},
    )
    own_answers: int = field(
        default=100, metadata={"help": "Rows that the model also answers by itself, as the reference of the shift."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System turn for rows that have none."})
    engine: Literal["auto", "transformers", "vllm"] = field(
        default="auto", metadata={"help": "What generates; auto takes vLLM where it is installed and has a GPU."}
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = field(
        default="auto", metadata={"help": "Of the model. auto: fp32 on a CPU, bf16 on a GPU."}
    )
    batch_size: int = field(default=32, metadata={"help": "Candidates generated together."})
    num_workers: int = field(
        default=1, metadata={"help": "Processes that share the work, a GPU each or the CPU's cores divided."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of the draws."})
    keep_candidates: bool = field(
        default=False, metadata={"help": "Keep OUT/work, with every candidate, also those that were rejected."}
    )

    def strengths(self, first: Strength) -> list[Strength]:
        """The strength of each round."""
        return [first, *(each for each in STRENGTHS if each != first)][: self.rounds]


def check(arguments: DgrArguments) -> None:
    """Errors: ValueError with every flag that is missing or out of range, one a line."""
    problems = [
        f"--{name}: missing; name {what}"
        for name, what in (("source_data", "the rows to rewrite"), ("output_dir", "a folder for the result"))
        if not getattr(arguments, name)
    ]
    problems += out_of_range(arguments, ("samples", "max_new_tokens", "batch_size"), 1)
    problems += out_of_range(arguments, ("rounds",), 1, len(STRENGTHS) + 1)
    problems += out_of_range(arguments, ("top_k", "own_answers", "temperature"), 0)
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        problems.append(f"--top_p {arguments.top_p}: give more than 0 and 1 or less")
    if arguments.temperature == 0 and arguments.samples > 1:
        problems.append(f"--temperature 0: its {arguments.samples} samples would be the same; give --samples 1")
    for flag, known in (("guard", GUARDS), ("refusal_rule", RULES)):
        if getattr(arguments, flag) not in known:
            problems.append(f"--{flag} {getattr(arguments, flag)}: choose from {', '.join(known)}")
    if problems:
        raise ValueError("\n".join(problems))
