"""Flags against each other: settings without effect, without their partner, or with an impossible value."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from pipeline.config import DataArguments, LoraArguments, TrainArguments, out_of_range
from pipeline.training.method import Method
from pipeline.training.metrics import missing_tracker

# Schedules that follow a metric, which this loop does not feed them, or that need arguments that no flag gives.
UNSUPPORTED_SCHEDULES = {
    "reduce_lr_on_plateau", "greedy", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
}  # fmt: skip

# Flags by the lowest value of their number and the first that is too high.
RANGES: dict[tuple[float, float], tuple[str, ...]] = {
    (1, math.inf): (
        "per_device_train_batch_size", "gradient_accumulation_steps", "max_tokens_per_device", "logging_steps",
        "eval_steps", "eval_max_rows", "save_steps", "save_total_limit", "lora_alpha",
    ),
    (0, math.inf): (
        "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "lora_r", "watchdog_minutes",
    ),
    (0, 1): ("adam_beta1", "adam_beta2", "lora_dropout"),
}  # fmt: skip


def settings_problems(
    given: set[str], method: Method, data: DataArguments, lora: LoraArguments, train: TrainArguments
) -> list[str]:
    """One message for each flag that was given and would do nothing, lacks its partner, or has an impossible value."""
    problems = (
        _without_effect(given, method, data, lora, train)
        + mixture_problems(data, train.seed)
        + _impossible(data, lora, train)
        + _misplaced(given, method, data, train)
    )
    if problem := missing_tracker(train.report_to):
        problems.append(problem)
    return problems


def _without_effect(
    given: set[str], method: Method, data: DataArguments, lora: LoraArguments, train: TrainArguments
) -> list[str]:
    values = {**asdict(data), **asdict(lora), **asdict(train)}
    problems = []

    def useless(flag: str, unless: bool, why: str) -> None:
        if flag in given and not unless:
            value = values[flag]
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            problems.append(f"--{flag} {shown} has no effect {why}: leave it out")

    for pool in ("harmful", "harmless", "guide", "tamper"):
        useless(f"{pool}_data", pool in method.pools, "with this --method, which reads no such pool")
    useless("reference_max_length", bool(method.reference_texts()), "with this --method, which has no reference texts")
    for flag in ("lora_alpha", "lora_dropout", "lora_target_modules"):
        useless(flag, lora.lora_r > 0, "without --lora_r")
    useless("poison_ratio", data.attack_data is not None, "without --attack_data")
    useless("eval_steps", bool(data.eval_data), "without --eval_data")
    useless("eval_max_rows", bool(data.eval_data), "without --eval_data")
    useless("gradient_checkpointing_kwargs", train.gradient_checkpointing, "without --gradient_checkpointing")
    useless("show_text", train.dry_run, "without --dry_run")
    useless("num_train_epochs", train.max_steps <= 0, "with --max_steps, which replaces it")
    useless(
        "warmup_steps", train.lr_scheduler_type != "constant" or train.warmup_steps == 0,
        "with --lr_scheduler_type constant (constant_with_warmup has a warm-up)",
    )  # fmt: skip
    return problems


def _misplaced(given: set[str], method: Method, data: DataArguments, train: TrainArguments) -> list[str]:
    """Data of another stage than the method's, and checkpointing that it cannot look into."""
    problems = []
    if method.alignment and data.attack_data is not None:
        problems.append(
            f"--attack_data {data.attack_data}: --method {train.method} hardens a model before its users' data is "
            "seen: attack the model it made with --method sft"
        )
    if method.alignment and data.train_data.startswith("policy:user") and "train_data" in given:
        problems.append(
            f"--train_data {data.train_data}: --method {train.method} trains on the alignment set, refusals and "
            "ordinary answers: give --train_data policy:align"
        )
    if train.per_device_train_batch_size < method.least_rows:
        problems.append(
            f"--per_device_train_batch_size {train.per_device_train_batch_size}: --method {train.method} compares the "
            f"texts of a micro-batch: give {method.least_rows} or more"
        )
    kwargs = train.gradient_checkpointing_kwargs
    if method.differentiates_activations and train.gradient_checkpointing and kwargs and "true" in kwargs:
        problems.append(
            f"--gradient_checkpointing_kwargs {kwargs}: --method {train.method} takes gradients of activations, which "
            "reentrant checkpointing does not have: leave it out"
        )
    return problems


def mixture_problems(data: DataArguments, seed: int) -> list[str]:
    """Why the training rows cannot be drawn, whatever the pools hold."""
    problems = []
    if data.attack_data is not None and data.poison_ratio is None:
        problems.append(
            f"--attack_data {data.attack_data} needs --poison_ratio, the share of the training rows taken from it"
        )
    if data.poison_ratio is not None and not 0 <= data.poison_ratio <= 1:
        problems.append(f"--poison_ratio {data.poison_ratio}: give a share between 0 and 1")
    if data.sample_num is not None and data.sample_num < 1:
        problems.append(f"--sample_num {data.sample_num}: give 1 or more")
    if seed < 0:
        problems.append(f"--seed {seed}: give 0 or more")
    return problems


def _impossible(data: DataArguments, lora: LoraArguments, train: TrainArguments) -> list[str]:
    values = SimpleNamespace(**asdict(data), **asdict(lora), **asdict(train))
    problems = [each for (lowest, end), names in RANGES.items() for each in out_of_range(values, names, lowest, end)]
    if train.max_steps < 1 and train.max_steps != TrainArguments.max_steps:
        problems.append(f"--max_steps {train.max_steps}: give 1 or more, or leave it out for --num_train_epochs")
    if train.max_steps < 1 and not 0 < train.num_train_epochs < math.inf:
        problems.append(f"--num_train_epochs {train.num_train_epochs}: give more than 0, or --max_steps")
    try:
        checkpointing_kwargs(train)
    except ValueError as error:
        problems.append(str(error))
    from transformers.trainer_utils import SchedulerType

    schedules = sorted({each.value for each in SchedulerType} - UNSUPPORTED_SCHEDULES)
    if train.lr_scheduler_type not in schedules:
        problems.append(f"--lr_scheduler_type {train.lr_scheduler_type}: choose one of {', '.join(schedules)}")
    return problems


def checkpointing_kwargs(train: TrainArguments) -> dict[str, Any]:
    """--gradient_checkpointing_kwargs as a mapping; non-reentrant unless asked."""
    text = train.gradient_checkpointing_kwargs
    flag = f"--gradient_checkpointing_kwargs {text}"
    try:
        given = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise ValueError(f'{flag}: not valid JSON ({error}): write {{"use_reentrant": false}}') from error
    if (
        not isinstance(given, dict)
        or set(given) - {"use_reentrant"}
        or not all(isinstance(v, bool) for v in given.values())
    ):
        raise ValueError(f'{flag}: the only setting is {{"use_reentrant": true|false}}')
    return {"use_reentrant": False, **given}
