"""The flags of `curate.py --method pharmacist`, and the training run that they ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from pipeline.config import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    Parsed,
    Problems,
    TrainArguments,
    nearest,
    out_of_range,
)

BASELINES = ("full", "random", "lowest_loss", "highest_loss", "gradient_cosine", "seal")
ADAM_BETA2 = 0.95  # with Adam's 0.9: SEAL's, for the adapter as for the logits


@dataclass
class PharmacistArguments:
    """Pharmacist ranks the rows of an alignment set and keeps the best (reconstructed: the paper's code is not
    public)."""

    method: str = field(default="pharmacist", metadata={"help": "Curation method: a name of pipeline/curation."})
    output_dir: str = field(default="runs/pharmacist", metadata={"help": "Folder of scores, kept rows and report."})
    train_data: str | None = field(
        default=None, metadata={"help": "The alignment set to choose from. [default: policy:align[:300]]"}
    )
    guide_data: str | None = field(
        default=None,
        metadata={
            "help": "Held-out rows with safe answers, which the upper level is measured on. "
            "[default: policy:align[300:]]"
        },
    )
    harmful_data: str | None = field(
        default=None,
        metadata={"help": "Simulated attack, which the toxic increment is trained on. [default: policy:harmful]"},
    )
    keep_ratio: float = field(default=0.4, metadata={"help": "Share rho of the rows to keep: floor(rho N) rows."})
    variant: Literal["joint", "hypergradient"] = field(
        default="joint", metadata={"help": "joint as in SEAL; or one explicit bilevel step by finite difference."}
    )
    kappa: float = field(default=1.0, metadata={"help": "Scale of the toxic increment; 0: none, which is SEAL."})
    lamb: float = field(
        default=1.0, metadata={"help": "Weight lambda of the upper level (joint), in the first epoch."}
    )
    lamb_decay: float = field(default=0.03, metadata={"help": "How much lambda falls an epoch (joint)."})
    difference_radius: float = field(
        default=0.01, metadata={"help": "Length of the finite difference over all trained weights (hypergradient)."}
    )
    selector_learning_rate: float = field(default=5e-3, metadata={"help": "Adam's learning rate of the logits."})
    selector_update: Literal["lazy", "dense"] = field(
        default="lazy", metadata={"help": "lazy moves the logits of a step's rows alone; dense all of them (SEAL)."}
    )
    baselines: list[str] = field(
        default_factory=list,
        metadata={"help": f"Selectors to compare with: {' '.join(BASELINES)}. seal trains once more."},
    )
    planted_key: str | None = field(
        default=None,
        metadata={
            "help": "To test a selector: field of the rows that is true in planted junk; reports how far it sinks."
        },
    )
    category_key: str = field(default="category", metadata={"help": "Field of the rows with their category, if any."})
    toxic_r: int = field(default=8, metadata={"help": "Rank of the toxic increment."})
    toxic_alpha: int = field(default=16, metadata={"help": "Its scale numerator, as --lora_alpha."})
    toxic_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Linear maps it is added to."}
    )
    toxic_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of its training."})
    toxic_epochs: int = field(default=2, metadata={"help": "Passes over --harmful_data at most."})
    toxic_stop_below: float = field(
        default=0.5, metadata={"help": "Its training ends when its loss is below this share of the first."}
    )
    ds_config: str = field(default="ds_configs/z3.json", metadata={"help": "DeepSpeed configuration file (ZeRO-3)."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows of one forward pass of one rank."})
    gradient_accumulation_steps: int = field(
        default=8, metadata={"help": "Forward passes a step, a rank. Rows x passes x ranks is the selector's batch."}
    )
    num_train_epochs: int = field(default=3, metadata={"help": "Visits of every row."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the adapter phi."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip the gradient to this norm; 0 does not clip."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter phi."})
    lora_alpha: int = field(default=16, metadata={"help": "Its scale numerator."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Module names, or all-linear."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations."})
    bf16: bool | None = field(default=None, metadata={"help": "[default: true on CUDA, else false (fp32)]"})
    system_prompt: str | None = field(
        default=None, metadata={"help": "System turn for conversations that have none; it is not written out."}
    )
    max_length: int = field(default=1024, metadata={"help": "Tokens a row is cut to (right end)."})
    allow_overlap: bool = field(default=False, metadata={"help": "Allow a row to stand in two pools."})
    cache_dir: str = field(default=".cache/tokenized", metadata={"help": "Folder of the tokenised pools."})
    seed: int = field(default=42, metadata={"help": "Seed of the data order, the adapters' start and random."})

    def __post_init__(self) -> None:
        problems = out_of_range(
            self, ("num_train_epochs", "toxic_r", "toxic_alpha", "toxic_epochs", "lora_r", "lora_alpha"), 1
        )
        problems += out_of_range(self, ("kappa", "lamb_decay", "toxic_stop_below"), 0)
        problems += [
            f"--{name} {value}: give a number above 0"
            for name in ("selector_learning_rate", "toxic_learning_rate", "difference_radius", "learning_rate")
            if not 0 < (value := getattr(self, name)) < math.inf
        ]
        if not 0 <= self.lamb <= 1:
            problems.append(f"--lamb {self.lamb}: give a weight between 0 and 1; the lower level has the rest")
        if not 0 < self.keep_ratio <= 1:
            problems.append(f"--keep_ratio {self.keep_ratio}: give a share above 0, up to 1")
        problems += [
            f"--baselines {each}: unknown{nearest(each, BASELINES)}"
            for each in self.baselines
            if each not in BASELINES
        ]
        if problems:
            raise Problems(problems)


def without_effect(parsed: Parsed) -> list[str]:
    """One message for each flag that was given and would do nothing."""
    asked, problems = parsed[PharmacistArguments], []
    groups = {
        "without a toxic increment (--kappa 0)": (
            asked.kappa > 0,
            ("toxic_r", "toxic_alpha", "toxic_target_modules", "toxic_learning_rate", "toxic_epochs",
             "toxic_stop_below"),
        ),
        "with --variant hypergradient": (asked.variant == "joint", ("lamb", "lamb_decay")),
        "with --variant joint": (asked.variant == "hypergradient", ("difference_radius",)),
    }  # fmt: skip
    for why, (useful, names) in groups.items():
        problems += [
            f"--{name} has no effect {why}: leave it out" for name in names if name in parsed.given and not useful
        ]
    if adapter := parsed[ModelArguments].adapter_name_or_path:
        problems.append(
            f"--adapter_name_or_path {adapter}: an adapter of its own is trained: merge this one into the model first "
            "(tools/merge_lora.py)"
        )
    out = Path(asked.output_dir)
    if out.is_dir() and any(out.iterdir()):
        problems.append(f"--output_dir {out}: holds files: name another folder")
    return problems


def doubts(asked: PharmacistArguments, *, bf16: bool) -> list[str]:
    """What a user should know of a selection with these settings."""
    found = []
    if asked.num_train_epochs < 3:
        found.append(
            f"--num_train_epochs {asked.num_train_epochs}: a row's score moves only when it is visited: give 3 or more"
        )
    if bf16 and asked.variant == "hypergradient":
        found.append(
            f"--variant hypergradient in bf16: a step of --difference_radius {asked.difference_radius} and the "
            "differences of losses it makes are near the rounding of bf16: give --bf16 false, or a larger radius"
        )
    return found


def training_flags(parsed: Parsed) -> Parsed:
    """The same settings as flags of training."""
    asked = parsed[PharmacistArguments]
    values = {each.name: getattr(asked, each.name) for each in fields(asked)}

    def filled(kind: type, **more: object) -> object:
        named = {each.name for each in fields(kind)}
        return kind(**{name: value for name, value in values.items() if name in named and value is not None}, **more)

    train = filled(TrainArguments, adam_beta2=ADAM_BETA2)
    parts = [parsed[ModelArguments], filled(DataArguments), filled(LoraArguments), train]
    known = {each.name for part in parts for each in fields(part)}  # type: ignore[arg-type]
    return Parsed(parts, parsed.given & known)
