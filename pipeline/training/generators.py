"""The random generators that dropout draws from; everything else has generators of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch


def seed_everything(seed: int, rank: int, step: int = 0) -> None:
    """Dropout differs between ranks; everything drawn by numpy elsewhere has generators of its own."""
    digest = hashlib.sha256(repr((seed, rank, step)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))
    np.random.seed(int.from_bytes(digest[8:12], "little"))


def rng_state() -> dict[str, torch.Tensor]:
    """This rank's generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, torch.Tensor]) -> None:
    """Continue from what `rng_state` returned: the next passes draw the same dropout again."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
