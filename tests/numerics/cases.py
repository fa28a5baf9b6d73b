"""Train cases with the product on ranks, read what the worker kept, and compare tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.distributed.lives import Lives
from tests.tiny import tiny_llama

WORKER = Path(__file__).with_name("zero3_worker.py")
ZERO = 1e-7  # a tensor of a smaller norm is compared absolutely

Record = tuple[dict[str, Any], list[dict[str, Any]]]


def sharp_llama() -> Any:
    """The tiny Llama with attention far from uniform, so that heads differ and the penalty matters from the first
    step."""
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.k_proj.weight.mul_(20)
    return model


def train_cases(server: Lives, cases: dict[str, dict[str, Any]], out: Path, *, ranks: int) -> Callable[[str], Record]:
    """Train every case on `ranks` ranks in one process group; returns name -> (what the worker kept, the lines of
    metrics.jsonl)."""
    for name, case in cases.items():
        case["argv"] = [*case["argv"], "--output_dir", str(out / name)]
    (out / "cases.json").write_text(json.dumps(cases))
    server.run(str(WORKER), str(out / "cases.json"), str(out), ranks=ranks, logs=out, timeout=900)

    @cache
    def read(name: str) -> Record:
        metrics = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        return torch.load(out / f"{name}.pt", weights_only=True), metrics

    return read


def distances(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Each tensor's error relative to its norm; where that is zero, relative to ZERO."""
    assert found.keys() == wanted.keys()
    return {name: ((found[name] - want).norm() / want.norm().clamp_min(ZERO)).item() for name, want in wanted.items()}


def updates(record: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What training changed."""
    return {name: record["final"][name] - record["initial"][name] for name in record["final"]}
