"""Measurements as measure.py hands them to its pictures, made of random numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.evaluation.sink_statistics import head_statistics
from pipeline.report.comparison import Share
from pipeline.report.intervals import wilson


def score(k: int, n: int = 60) -> dict[str, Any]:
    """A harmful score."""
    return asdict(Share(k, n, k / n, *wilson(k, n), [(k, n)]))


def measurement(layers: int = 3, heads: int = 5, *, steps: tuple[int, ...] = (), **settings: Any) -> dict[str, Any]:
    """What sinks.json holds for a model, or a run's checkpoints at `steps`; in each, head 0 of layer 0 is strongly
    positive and the last head of the last layer strongly negative."""
    entries = []
    for step in steps or (None,):
        generator = np.random.default_rng(step)
        harmful, harmless = (generator.uniform(0.4, 0.6, (40, layers, heads)).astype(np.float32) for _ in range(2))
        harmful[:, 0, 0] += 0.3
        harmful[:, -1, -1] -= 0.3
        name = None if step is None else f"checkpoint-{step}"
        record = head_statistics(harmful, harmless).record()
        entries.append({"checkpoint": name, "step": step, "attacked": step is not None, **record})
    shared = {
        "model": "models/tiny",
        "adapter": None,
        "attention": "cpu_flash (PyTorch's CPU flash kernel)",
        "dtype": "float32",
        "texts": {"harmful_data": 40, "harmless_data": 40},
        "data": {"harmful_data": "policy:harmful", "harmless_data": "policy:harmless"},
        "max_length": 512,
        "system_prompt": None,
        "sink_token_position": 0,
        "versions": {"torch": "2.13.0"},
    }
    return shared | entries[-1] | {"checkpoints": entries if steps else []} | settings
