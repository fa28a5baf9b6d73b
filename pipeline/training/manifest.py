"""run.json: what a run was, enough to repeat it; and what a resumed run must not change."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "tokenizers",
    "flash-attn",
    "numpy",
)

# Flags that may differ between a run and its continuation: they do not touch the trajectory of the steps already made.
FREE_ON_RESUME = {
    "resume_from_checkpoint", "output_dir", "logging_steps", "eval_steps", "save_steps", "save_total_limit",
    "eval_data", "eval_max_rows", "report_to", "num_train_epochs", "max_steps", "cache_dir", "dry_run", "show_text",
    "attention", "max_tokens_per_device", "ds_config", "allow_overlap", "gradient_accumulation_steps",
    "watchdog_minutes",
}  # fmt: skip

_ACCUMULATION = "gradient_accumulation_steps"  # free, but for a global batch that stays the same


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's commit, with "-dirty" if files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def accumulation_on(before: dict[str, Any], ranks: int) -> int:
    """The accumulation with which `ranks` ranks take the same micro-batches a step as the run of a run.json.

    Errors: ValueError if the micro-batches do not divide by the ranks.
    """
    rows, accumulation = (before["arguments"][each] for each in ("per_device_train_batch_size", _ACCUMULATION))
    micro_batches = accumulation * before["world_size"]
    if micro_batches % ranks:
        possible = [str(each) for each in range(1, micro_batches + 1) if micro_batches % each == 0]
        raise ValueError(
            f"a step of the run to resume is {rows} rows x {accumulation} accumulation x {before['world_size']} "
            f"ranks, and its {micro_batches} micro-batches do not divide over {ranks} ranks: start "
            f"{' or '.join(possible)}"
        )
    return int(micro_batches // ranks)


def resume_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the run.json of a run and of its continuation that would break the continuation, one
    message each."""
    problems = []
    for name, value in now["arguments"].items():
        old = before["arguments"].get(name)
        if name not in FREE_ON_RESUME and old != value:
            problems.append(
                f"--{name} is {value!r}, and the run to resume has {old!r}: give the same, or another --output_dir"
            )
    if before["method"] != now["method"]:
        problems.append(f"--method is {now['method']}, and the run to resume is {before['method']}")
    given, wanted = now["arguments"][_ACCUMULATION], accumulation_on(before, now["world_size"])
    if given != wanted:
        problems.append(
            f"--{_ACCUMULATION} is {given} on {now['world_size']} ranks, and the run to resume has "
            f"{before['arguments'][_ACCUMULATION]} on {before['world_size']}: give {wanted}, or neither the flag nor "
            "its key in --ds_config"
        )
    for pool, old in before["data"].items():
        new = now["data"].get(pool)
        if not pool.startswith("eval") and new is not None and new["fingerprint"] != old["fingerprint"]:
            problems.append(f"the rows of --{pool}_data changed since the run to resume was started ({old['spec']})")
    return problems
