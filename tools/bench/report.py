"""What every benchmark says beside its numbers: the machine, the versions, a table, and a JSON file."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.config import peek
from pipeline.training.manifest import commit, versions, write_json


def choose_device(argv: Sequence[str]) -> None:
    """Check `--device`; `cpu` hides the GPUs, which the product would take otherwise: call it before CUDA is touched.

    Errors: ValueError for another value, or no CUDA device.
    """
    asked = peek("device", argv)
    if asked not in (None, "cpu", "cuda"):
        raise ValueError(f"--device {asked}: choose cpu or cuda")
    if asked == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here: use --device cpu")


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were taken on."""
    found = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    return found


def header(device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """The part of the report that names command, machine, versions and settings."""
    return {
        "command": sys.argv,
        "device": device.type,
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "settings": settings,
    }


def describe(report: dict[str, Any]) -> str:
    """The header in two lines."""
    found, packages = report["machine"], report["versions"]
    where = f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads, {found['memory_gib']} GiB"
    if "gpu" in found:
        where = f"{found['gpu']} ({found['gpu_memory_gib']} GiB); " + where
    names = ("python", "torch", "transformers", "deepspeed", "flash-attn")
    return where + "\n" + ", ".join(f"{name} {packages[name]}" for name in names if name in packages)


def table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown; the first line is the head."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in (lines[0], rule, *lines[1:]))


def save(report: dict[str, Any], output: str | None) -> None:
    """Write the report to `--output`, if given, at once or not at all."""
    if output:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, report)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
