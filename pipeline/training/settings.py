"""Flags against each other: settings without effect, without their partner, or with an impossible value."""

from __future__ import annotations

import json
from typing import Any

from pipeline.config import DataArguments, LoraArguments, TrainArguments
from pipeline.training.method import Method
from pipeline.training.metrics import missing_tracker

NOT_BY_STEP = {"reduce_lr_on_plateau", "greedy"}  # schedules that follow a metric, which this loop does not feed


def settings_problems(
    given: set[str], method: Method, data: DataArguments, lora: LoraArguments, train: TrainArguments
) -> list[str]:
    """One message for each flag that was given and would do nothing, lacks its partner, or has an impossible value."""
    problems = _without_effect(given, method, data, lora, train) + _impossible(data, train)
    if problem := missing_tracker(train.report_to):
        problems.append(problem)
    return problems


def _without_effect(
    given: set[str], method: Method, data: DataArguments, lora: LoraArguments, train: TrainArguments
) -> list[str]:
    problems = []

    def useless(flag: str, unless: bool, why: str) -> None:
        if flag in given and not unless:
            problems.append(f"--{flag} has no effect {why}")

    for pool in ("harmful", "harmless"):
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
        "with --lr_scheduler_type constant: use constant_with_warmup",
    )  # fmt: skip
    return problems


def _impossible(data: DataArguments, train: TrainArguments) -> list[str]:
    problems = []
    if data.attack_data is not None and data.poison_ratio is None:
        problems.append("--attack_data needs --poison_ratio, the share of the training rows taken from it")
    if data.poison_ratio is not None and not 0 <= data.poison_ratio <= 1:
        problems.append(f"--poison_ratio {data.poison_ratio}: give a share between 0 and 1")
    positive = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "logging_steps",
        "eval_steps",
        "save_steps",
        "save_total_limit",
    )
    for name in positive:
        if (value := getattr(train, name)) is not None and value < 1:
            problems.append(f"--{name} {value}: give 1 or more")
    if train.max_steps <= 0 and train.num_train_epochs <= 0:
        problems.append(f"--num_train_epochs {train.num_train_epochs}: give more than 0, or --max_steps")
    try:
        checkpointing_kwargs(train)
    except ValueError as error:
        problems.append(str(error))
    from transformers.trainer_utils import SchedulerType

    schedules = sorted({each.value for each in SchedulerType} - NOT_BY_STEP)
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
