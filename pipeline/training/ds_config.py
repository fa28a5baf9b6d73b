"""The DeepSpeed file: read it strictly, and bring its values and the flags together before a model is loaded."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from pipeline.config import Problems
from pipeline.training.ds_schema import Keys, deepspeed_problems

# Where a DeepSpeed value and a flag say the same thing. A missing key counts as "auto": DeepSpeed's default would
# otherwise win over the flag in silence. Nothing is added below an optimizer section that is not there.
FLAGS_OF: dict[Keys, tuple[str, ...]] = {
    ("train_micro_batch_size_per_gpu",): ("per_device_train_batch_size",),
    ("gradient_accumulation_steps",): ("gradient_accumulation_steps",),
    ("gradient_clipping",): ("max_grad_norm",),
    ("bf16", "enabled"): ("bf16",),
    ("optimizer", "params", "lr"): ("learning_rate",),
    ("optimizer", "params", "betas"): ("adam_beta1", "adam_beta2"),
    ("optimizer", "params", "eps"): ("adam_epsilon",),
    ("optimizer", "params", "weight_decay"): ("weight_decay",),
}

# Settings that would have no effect in this training loop, or a wrong one.
REFUSED = {
    "scheduler": "the schedule is set with --lr_scheduler_type and --warmup_steps; remove the section",
    "sequence_parallel_size": "sequence parallelism splits the keys that the sink column reads; remove the key",
    "bfloat16": "this is the old name of the section bf16; rename it",
    "datastates_ckpt": "checkpoints must be on the disk when they are marked complete; remove the section",
}

# The same of the section checkpoint: the value that is refused, or any (None).
REFUSED_CHECKPOINT: dict[str, tuple[object, str]] = {
    "load_universal": (True, "--resume_from_checkpoint goes on with any number of ranks without it"),
    "use_node_local_storage": (True, "the shards of all ranks must lie in one folder"),
    "checkpoint_serialization": (False, "only torch's zip format can be checked for damage and for code"),
    "writer": (None, "checkpoints must be on the disk when they are marked complete"),
}


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed configuration file and check it; "auto" values stay as they are.

    Errors: Problems, each with ``file:line``: not strict JSON, a duplicate key, an unknown key (with the nearest known
    one), a value that DeepSpeed's own models reject, a setting that this training loop cannot honour.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--ds_config {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(text, object_pairs_hook=_unique, parse_constant=_not_json)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except ValueError as error:
        raise ValueError(f"--ds_config {path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}:1: expected a JSON object, got {type(config).__name__}")
    problems: list[tuple[Keys, str]] = [((key,), reason) for key, reason in REFUSED.items() if key in config]
    problems += deepspeed_problems({key: value for key, value in config.items() if key not in REFUSED})
    problems += _refused_checkpoint(config.get("checkpoint"))
    if not problems and config.get("fp16", {}).get("enabled", "auto") not in ("auto", False):
        problems.append((("fp16", "enabled"), "fp16 is not supported: use bf16, or fp32 (--bf16 false)"))
    if problems:
        raise Problems(
            [": ".join([f"{path}:{_line(text, keys)}", *_dotted(keys), reason]) for keys, reason in problems]
        )
    return config


def _refused_checkpoint(section: object) -> Iterator[tuple[Keys, str]]:
    for key, value in section.items() if isinstance(section, dict) else ():
        refused, reason = REFUSED_CHECKPOINT.get(key, ("", ""))
        if reason and refused in (None, value):
            yield ("checkpoint", key), f"{json.dumps(value)} is not supported: {reason}; remove the key"


def resolve_ds_config(
    config: dict[str, Any], values: Mapping[str, Any], given: set[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fill every "auto" from the flags, and every flag that was not given from the file.

    ``values`` holds the flags of ``FLAGS_OF`` plus ``world_size`` (ranks) and ``hidden_size`` (of the model, for the
    bucket sizes of ZeRO-3, which follow transformers' formulas); ``given`` names the flags that the user set.
    Returns the resolved configuration and, by flag name, the values that the file decides.
    Errors: Problems: a value in the file that contradicts a given flag, batch sizes whose product is another one, an
    "auto" that nothing fills, a combination that DeepSpeed rejects.
    """
    resolved = copy.deepcopy(config)
    decided: dict[str, Any] = {}
    problems = list(_merge_flags(resolved, values, given, decided))
    if not problems:
        problems += _merge_train_batch_size(resolved, config, values["world_size"], given, decided)
    _fill_zero_buckets(resolved.get("zero_optimization"), values["hidden_size"])
    problems += [
        f'ds_config {".".join(keys)} is "auto", which no flag fills: correct its name or give it a value'
        for keys in _autos(resolved)
        if keys not in FLAGS_OF and keys != ("train_batch_size",)
    ]
    if not problems:
        problems += [": ".join(["ds_config", *_dotted(keys), reason]) for keys, reason in deepspeed_problems(resolved)]
    if problems:
        raise Problems(problems)
    return resolved, decided


def _merge_flags(
    resolved: dict[str, Any], values: Mapping[str, Any], given: set[str], decided: dict[str, Any]
) -> Iterator[str]:
    """Bring flags and file together in ``resolved`` and ``decided``; yield what does not fit."""
    if resolved.get("fp16", {}).get("enabled") == "auto":
        resolved["fp16"]["enabled"] = False
    for keys, flags in FLAGS_OF.items():
        if keys[0] == "optimizer" and "optimizer" not in resolved:
            continue
        section = resolved
        for key in keys[:-1]:
            section = section.setdefault(key, {})
        wanted = [values[flag] for flag in flags]
        if section.get(keys[-1], "auto") == "auto":
            section[keys[-1]] = wanted if len(flags) > 1 else wanted[0]
            continue
        fixed = section[keys[-1]]
        parts = fixed if len(flags) > 1 else [fixed]
        if not isinstance(parts, list) or [_kind(part) for part in parts] != [_kind(value) for value in wanted]:
            expected = [_kind(value) for value in wanted]
            yield f"ds_config {'.'.join(keys)} {json.dumps(fixed)}: expected {' and '.join(expected)}"
            continue
        for flag, value in zip(flags, parts, strict=True):
            if value != values[flag] and flag in given:
                yield (
                    f"ds_config {'.'.join(keys)} {json.dumps(fixed)} contradicts --{flag} {values[flag]}: "
                    'drop the flag, or write "auto" into the file'
                )
            elif value != values[flag]:
                decided[flag] = value


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    return "a number" if isinstance(value, int | float) else f"not {type(value).__name__}"


def _merge_train_batch_size(
    resolved: dict[str, Any], config: dict[str, Any], world_size: int, given: set[str], decided: dict[str, Any]
) -> Iterator[str]:
    """Total = micro-batch x accumulation x ranks. A total in the file decides the factor that is left open."""
    open_factors = (  # accumulation first: it costs no memory
        ("gradient_accumulation_steps", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu"),
        ("train_micro_batch_size_per_gpu", "per_device_train_batch_size", "gradient_accumulation_steps"),
    )
    micro, accumulation = resolved["train_micro_batch_size_per_gpu"], resolved["gradient_accumulation_steps"]
    product = micro * accumulation * world_size
    total = config.get("train_batch_size", "auto")
    sizes = (("train_micro_batch_size_per_gpu", micro), ("gradient_accumulation_steps", accumulation))
    for key, value in (*sizes, ("train_batch_size", product if total == "auto" else total)):
        if type(value) is not int or value < 1:
            yield f"ds_config {key} {json.dumps(value)}: expected a whole number above 0"
            return
    if total in ("auto", product):
        resolved["train_batch_size"] = product
        return
    for key, flag, other in open_factors:
        rest = resolved[other] * world_size
        if config.get(key, "auto") == "auto" and flag not in given and total % rest == 0:
            resolved[key] = decided[flag] = total // rest
            return
    yield (
        f"ds_config train_batch_size {json.dumps(total)} is not per_device_train_batch_size {micro} x "
        f"gradient_accumulation_steps {accumulation} x {world_size} ranks = {product}"
    )


def _fill_zero_buckets(zero: dict[str, Any] | None, hidden_size: int) -> None:
    """The sizes (in elements) that transformers fills in: buckets of about one square weight matrix."""
    sizes = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for key, size in sizes.items():
        if zero and zero.get(key) == "auto":
            zero[key] = size


def _dotted(keys: Keys) -> list[str]:
    return [".".join(keys)] if keys else []


def _autos(section: Mapping[str, Any], path: Keys = ()) -> Iterator[Keys]:
    for key, value in section.items():
        if value == "auto":
            yield (*path, key)
        elif isinstance(value, dict):
            yield from _autos(value, (*path, key))


def _line(text: str, keys: Keys) -> int:
    """The line of a key: each key of the way is searched behind the one before it."""
    position = 0
    for key in keys:
        if found := re.compile(rf'"{re.escape(key)}"\s*:').search(text, position):
            position = found.start()
    return text.count("\n", 0, position) + 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    section = dict(pairs)
    if len(section) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)}")
    return section


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")
