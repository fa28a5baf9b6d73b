"""The flags that every benchmark has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass
class BenchArguments:
    """What is measured, where, and into which file."""

    model_name_or_path: str = field(default="builtin", metadata={"help": "Model folder or hub id, or 'builtin'."})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda. [default: cuda where there is one]"})
    bf16: bool | None = field(default=None, metadata={"help": "Run in bf16. [default: true on CUDA, else false]"})
    attention: str = field(default="auto", metadata={"help": "Attention kernel, as train.py's flag."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})

    def half(self, device: torch.device) -> bool:
        """Whether to run in bf16 on this device."""
        return device.type == "cuda" if self.bf16 is None else self.bf16


@dataclass
class StepArguments(BenchArguments):
    """The same for training steps, on an engine of DeepSpeed's."""

    ds_config: str = field(default="ds_configs/z3.json", metadata={"help": "DeepSpeed configuration file."})
