"""Files of torch.save opened as data, never as programs.

A .pt file is a zip with a pickle, and a pickle can run code. Whatever is read here is read with `weights_only=True`
and an allow-list. DeepSpeed itself opens its files without either, hence `refuse_unsafe_pickles` before it loads any.
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from typing import Any

import torch


class _ZeroStage(IntEnum):
    """Stands in for DeepSpeed's enum, so that a checkpoint is read without importing deepspeed."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


class _Record:
    """Stands in for DeepSpeed's loss scalers and fragment addresses; nothing reads their fields."""


# All that an honest shard names beyond tensors and plain containers. The dynamic scaler appears under fp16, the
# fragment addresses under ZeRO-1 and ZeRO-2.
_ALLOWED: list[Any] = [
    (_ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Record, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Record, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Record, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def refuse_unsafe_pickles(folder: Path) -> None:
    """Scans every .pt and .pth file under `folder`, as `refuse_unsafe_pickle`."""
    for path in sorted((*folder.rglob("*.pt"), *folder.rglob("*.pth"))):
        refuse_unsafe_pickle(path)


def refuse_unsafe_pickle(path: Path) -> None:
    """Scans a file without opening it as a pickle.

    Raises:
        ValueError: it names a global beyond tensors, containers and DeepSpeed's stage enum, loss scalers and fragment
            addresses, or is no file of torch.save; names the file and the global.
    """
    with torch.serialization.safe_globals(_ALLOWED):
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        except Exception as error:  # a damaged zip or pickle fails in many ways, none of them is loadable
            reason = str(error).split(". ")[0]
            raise ValueError(f"{path}: not a readable file of torch.save ({reason}); do not load it") from error
    if unsafe:
        raise ValueError(
            f"{path}: would call {', '.join(sorted(unsafe))} when loaded, which no checkpoint of ours needs; "
            "do not load it, and find out who wrote it"
        )


def load_shard(path: Path, *, data: bool = True) -> dict[str, Any]:
    """What a file of torch.save holds, its tensors mapped and not read.

    data: if False, the tensors are on the meta device, and the storage of each has an attribute `_checkpoint_offset`,
        where its bytes begin in the file (`tensor_file.TensorFile` reads them).

    Raises:
        ValueError: as `refuse_unsafe_pickle`; or the file is damaged or holds no dictionary.
    """
    refuse_unsafe_pickle(path)
    with torch.serialization.safe_globals(_ALLOWED):
        try:
            loaded = torch.load(path, map_location="cpu" if data else "meta", weights_only=True, mmap=data)
        except Exception as error:  # as above; an OSError would otherwise reach the user as a traceback
            raise ValueError(f"{path}: cannot be read as a shard: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: not a DeepSpeed shard (holds a {type(loaded).__name__})")
    return loaded
