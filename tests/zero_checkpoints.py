"""What the tests of conversion do with checkpoints of DeepSpeed: read them its way, change them, convert them."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints.convert import convert
from pipeline.checkpoints.markers import MARKER, write_complete_marker


def to_hf(source: Path, out: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """`convert` with what most tests want; returns `out`."""
    convert(source, out, dtype=dtype, **{"allow_attacked": False, **settings})
    return out


def deepspeed_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What zero_to_fp32 reads from the checkpoint."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        weights: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    return weights


def reseal(checkpoint: Path, **changes: Any) -> Path:
    """Write a new marker over a changed checkpoint, so that only what was changed can be refused."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    write_complete_marker(checkpoint, **{"step": 2, "world_size": 2, "attacked": False, **changes})
    return checkpoint


def foreign(source: Path, folder: Path, *, bare: bool = False) -> Path:
    """A copy without our marker; bare: nothing but what DeepSpeed writes."""
    shutil.copytree(source, folder)
    (folder / MARKER).unlink(missing_ok=True)
    for path in folder.iterdir() if bare else ():
        if path.is_file() and path.name != "latest":
            path.unlink()
    return folder


def shard(checkpoint: Path, pattern: str) -> Path:
    """The one shard whose name fits."""
    (path,) = (checkpoint / "global_step2").glob(pattern)
    return path


def rewrite(checkpoint: Path, pattern: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a shard holds."""
    path = shard(checkpoint, pattern)
    contents = torch.load(path, weights_only=False)
    change(contents)
    torch.save(contents, path)
