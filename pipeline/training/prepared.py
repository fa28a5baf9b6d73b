"""A run, resolved and checked, before anything of it exists."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.config import DataArguments, LoraArguments, ModelArguments, TrainArguments
from pipeline.data.cache import EncodedPool
from pipeline.data.streams import Stream
from pipeline.training.distributed import World
from pipeline.training.method import Method


@dataclass
class Prepared:
    """A run, resolved: what `training/run.py` needs to build the engine and train."""

    method_name: str
    method: Method
    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    train: TrainArguments
    ds_config: dict[str, Any]
    model_path: str
    model_config: Any
    tokenizer: Any
    streams: dict[str, Stream]
    evaluations: dict[str, EncodedPool]
    sources: dict[str, dict[str, Any]]
    budget: dict[str, float]
    steps: int
    resume: Path | None
    checkpoint_bytes: int  # on disk, all ranks together; known to rank 0
    warnings: list[str]
    world: World

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return run_folder(self.train, self.method_name)

    @property
    def attacked(self) -> bool:
        """The training rows hold attack rows on purpose."""
        return self.data.attack_data is not None

    def record(self) -> dict[str, Any]:
        """The flags as resolved, one flat mapping."""
        parts = (self.model, self.data, self.lora, self.train, self.method.config)
        return {name: value for part in parts for name, value in asdict(part).items()}


def run_folder(train: TrainArguments, method_name: str) -> Path:
    """--output_dir, or its default."""
    return Path(train.output_dir or f"runs/{method_name}")
