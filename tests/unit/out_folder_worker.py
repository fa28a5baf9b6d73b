"""Writes six files of weights at OUT, in a process that a test kills or whose disk is full.

Arguments: OUT [SECONDS | BALLAST].
SECONDS: waits after each tensor. BALLAST: a file that grows to 3 MB while the third tensor is read.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.checkpoints.out_folder import OutFolder
from pipeline.checkpoints.weights_out import TensorSpec
from pipeline.door import run_door

NUMEL = 100_000


def tensor(name: str) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(int(name)))


def write(out: Path, before: Callable[[str], None], source: str = "worker") -> None:
    """Six tensors, each in a file of its own of 400 kB; `before` is told each one that is read."""

    def read(name: str) -> list[torch.Tensor]:
        before(name)
        return [tensor(name)]

    specs = [TensorSpec(str(number), (NUMEL,), torch.float32) for number in range(6)]
    with OutFolder(out, source=source, private=False) as made:
        made.write_weights(specs, read, max_shard_size=4 * NUMEL)
        (made.folder / "config.json").write_text("{}")
        made.finish()


def main() -> None:
    out, how = Path(sys.argv[1]), sys.argv[2]

    def before(name: str) -> None:
        if how.startswith("/"):
            if name == "2":
                Path(how).write_bytes(bytes(3_000_000))
        else:
            time.sleep(float(how))

    write(out, before)


if __name__ == "__main__":
    run_door(main)
