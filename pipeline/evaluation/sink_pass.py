"""The forward passes of measure.py: the mean sink attention of every text in every layer and head, a few texts at a
time, on one rank or shared between many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipeline.data.packing import pack
from pipeline.evaluation.progress import Progress
from pipeline.evaluation.sink_texts import Texts
from pipeline.sink.divergence import SinkMeans
from pipeline.sink.layout import Segments
from pipeline.training.distributed import World

TOKENS_A_PASS = 4096
"""Tokens packed into one forward pass; a longer text is a pass of its own."""


def passes(lengths: Sequence[int]) -> list[range]:
    """Which texts each forward pass packs: neighbours, up to TOKENS_A_PASS. Fixed by the texts alone, so that the
    values are the same on any number of ranks."""
    groups: list[range] = []
    tokens = 0
    for text, length in enumerate(lengths):
        tokens += length
        if not groups or tokens > TOKENS_A_PASS:
            groups.append(range(text, text))
            tokens = length
        groups[-1] = range(groups[-1].start, text + 1)
    return groups


@torch.no_grad()
def text_means(
    model: Any,
    config: Any,
    texts: Texts,
    *,
    position: int,
    device: torch.device,
    here: World,
    label: str,
) -> NDArray[np.float32]:
    """a_lh of every text, [texts,L,H], on every rank.

    model: takes the keywords of a packed row (with a sink attention registered), on the ranks `here` together if its
    weights are sharded: every rank then runs as many passes, and one with none left repeats the last, which does not
    count. config: of the text model.
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    groups = passes(texts.lengths)
    found = torch.zeros(len(texts.lengths), layers, heads, device=device)
    progress = Progress(label, total=len(texts.lengths)) if here.main else None
    for turn in range(math.ceil(len(groups) / here.size)):
        shared = groups[turn * here.size : (turn + 1) * here.size]
        mine = shared[min(here.rank, len(shared) - 1)]
        batch = pack([], [texts.example(text) for text in mine]).to(device)
        segments = Segments.from_bounds(batch.bounds, device)
        sink = SinkMeans(segments, layers=layers, heads=heads, position=position)
        model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            segments=segments,
            sink=sink,
            logits_to_keep=1,
            use_cache=False,
        )
        if here.rank < len(shared):
            found[mine.start : mine.stop] = sink.means()
        if progress is not None:
            done = texts.lengths[shared[0].start : shared[-1].stop]
            progress.update(len(done), sum(done))
    if here.size > 1:
        dist.all_reduce(found)  # each text has its values on one rank and zeros on the others: exact
    return found.cpu().numpy()
