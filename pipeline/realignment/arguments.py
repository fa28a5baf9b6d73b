"""The flags of realign.py, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config import Problems, out_of_range

Norm = Literal["neuron", "token", "none"]
TokenScope = Literal["response", "all"]


@dataclass
class RealignArguments:
    """What is realigned, by which safety vector, and how."""

    method: Literal["lssf", "resta"] = field(
        default="lssf",
        metadata={"help": "lssf: the safety vector within each map's safety subspace; resta: all of it, no anchors."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The fine-tuned model to repair: a folder, 'builtin', or a cached hub id."}
    )
    safe_model: str | None = field(default=None, metadata={"help": "The aligned model it was fine-tuned from."})
    unsafe_model: str | None = field(
        default=None, metadata={"help": "The safe model after fine-tuning on harmful data: a model folder."}
    )
    unsafe_adapter: str | None = field(
        default=None, metadata={"help": "The same as a PEFT LoRA adapter on the safe model. Cheaper."}
    )
    anchors: str | None = field(
        default=None, metadata={"help": "lssf: harmful requests with the safe model's refusals; a file or dataset."}
    )
    anchor_answers: str | None = field(
        default=None,
        metadata={"help": "answers-SUITE.jsonl that assess.py wrote for the rows of --anchors, as their answers."},
    )
    alpha: float = field(default=1.0, metadata={"help": "Strength of the whole update."})
    eta: float = field(
        default=0.85, metadata={"help": "lssf: share of a map's spectral entropy that its safety subspace holds."}
    )
    alpha_1: float = field(default=1.5, metadata={"help": "lssf: weight of the subspace's first direction; last: 1."})
    norm: Norm = field(
        default="neuron", metadata={"help": "lssf: outputs are standardised per neuron, per token, or not at all."}
    )
    token_scope: TokenScope = field(
        default="response", metadata={"help": "lssf: tokens of the anchors that count: the answers', or all."}
    )
    max_length: int = field(default=512, metadata={"help": "Tokens an anchor is cut to (right end)."})
    output_dir: str | None = field(default=None, metadata={"help": "The new folder; absent or empty."})
    output_form: Literal["model", "adapter"] = field(
        default="model", metadata={"help": "A whole model, or the update alone as a PEFT adapter of the tuned model."}
    )
    work_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the subspaces. Runs that name the same one, such as a grid over --eta, --alpha_1 and "
            "--alpha, compute them once. [default: beside --output_dir, removed at the end]"
        },
    )
    dtype: Literal["bf16", "fp16", "fp32"] | None = field(
        default=None, metadata={"help": "Of what is written. [default: the tuned model's; of an adapter fp32]"}
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Of a file of weights."})
    workers: int = field(default=1, metadata={"help": "Files written at once."})
    allow_attacked_model: bool = field(
        default=False, metadata={"help": "Realign a model that was trained on --attack_data, for study."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Check everything, print the plan, stop."})

    def __post_init__(self) -> None:
        """Errors: Problems, a line each."""
        problems = [f"--{name}: is missing" for name in self._required() if getattr(self, name) is None]
        if self.unsafe_model is None and self.unsafe_adapter is None:
            problems.append("--unsafe_adapter or --unsafe_model: give one; the safety vector is safe minus unsafe")
        if self.unsafe_model is not None and self.unsafe_adapter is not None:
            problems.append("--unsafe_adapter and --unsafe_model: give one of them")
        problems += out_of_range(self, ["alpha"], 0)
        if self.method == "lssf":
            problems += out_of_range(self, ["alpha_1"], 0)
            if not 0 < self.eta <= 1:
                problems.append(f"--eta {self.eta}: give more than 0, up to 1")
        elif self.anchors is not None or self.anchor_answers is not None:
            problems.append("--anchors: resta takes the whole safety vector and reads none; leave it out")
        elif self.output_form == "adapter":
            problems.append(
                "--output_form adapter: of resta that would be the unsafe adapter with its sign turned, which is "
                "never exported; use --output_form model"
            )
        if self.max_length < 2:
            problems.append(f"--max_length {self.max_length}: give at least 2")
        if problems:
            raise Problems(problems)

    def _required(self) -> list[str]:
        anchors = ["anchors"] if self.method == "lssf" else []
        return ["model_name_or_path", "safe_model", *anchors, "output_dir"]
