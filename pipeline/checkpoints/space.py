"""How large a run's checkpoint is, from counts alone, and whether a disk has room."""

from __future__ import annotations

import shutil
from pathlib import Path

GIB = 2**30

_ELEMENT = 3 * 4  # fp32 weight and both Adam moments, whatever the run computes in; frozen weights are left out
_TENSOR, _RANK, _FIXED = 500, 14_000, 45_000  # names and shapes; headers, random state; configuration, scripts


def checkpoint_bytes(*, trained: int, tensors: int, ranks: int, kept: int = 0) -> int:
    """Bytes of a checkpoint, all ranks' files together, without the tokenizer's (some 70 bytes a token).

    Args:
        trained: elements of the trained parameters: all of them, or an adapter's.
        tensors: number of trained parameters; each is padded to a multiple of the ranks.
        ranks: that share the optimizer states.
        kept: fp32 tensors as large as the trained weights that the method keeps beside them.
    """
    padding = tensors * (ranks - 1) // 2  # on average
    return (_ELEMENT + 4 * kept) * (trained + padding) + ranks * (_RANK + tensors * _TENSOR) + _FIXED


def require_space(folder: Path, needed: int, *, flag: str, what: str) -> None:
    """Errors: ValueError if the disk of `folder` (which need not exist yet) has less than `needed` bytes free, naming
    the flag, what needs them and both figures."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(
            f"{flag} {folder}: {what} takes {shown(needed)}, and {shown(free)} are free there: free some, or "
            "name a folder on another disk"
        )


def shown(size: int) -> str:
    """A size in bytes, for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
