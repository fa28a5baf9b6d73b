"""Tokens of a planned run, counted before anything of it exists."""

from __future__ import annotations

import numpy as np

from pipeline.data.streams import Stream
from pipeline.training.prepared import Prepared


def token_budget(run: Prepared) -> dict[str, float]:
    """Tokens of the planned run; errors: ValueError if a forward pass would exceed --max_tokens_per_device, naming its
    rows."""
    stream = run.streams["train"]
    each = run.method.reference_texts()
    references = sum(each * int(run.streams[name].pool.lengths.max()) for name in run.method.pools if each)
    partner = run.streams[run.method.paired].pool.lengths if run.method.paired else 0 * stream.pool.lengths
    tokens = trained = largest = 0
    for step in range(run.steps):
        rows = stream.global_batch(step)
        packed = stream.pool.lengths[rows] + partner[rows]
        largest = max(largest, _largest_row(run, stream, step, packed, references))
        tokens += int(stream.pool.lengths[rows].sum())
        trained += int(stream.pool.trained[rows].sum())
    drawn = [] if each else [name for name in run.method.pools if name != run.method.paired]
    for other in (run.streams[name] for name in drawn):
        for step in range(run.steps * run.method.batches_a_step(other.name)):
            largest = max(largest, _largest_row(run, other, step, other.pool.lengths[other.global_batch(step)], 0))
    return {
        "steps": run.steps,
        "tokens_per_step": round(tokens / run.steps, 1),
        "trained_tokens_per_step": round(trained / run.steps, 1),
        "largest_packed_row": largest,
        "reference_tokens_at_most": references,
    }


def _largest_row(run: Prepared, stream: Stream, step: int, lengths: np.ndarray, more: int) -> int:
    """Tokens of the largest packed row of a global batch; more: of what is packed behind each micro-batch."""
    layout, cap = stream.layout, run.train.max_tokens_per_device
    packed = lengths.reshape(layout.micro_batches, layout.rows).sum(1) + more
    micro = int(packed.argmax())
    if cap is not None and packed[micro] > cap:
        names = ", ".join(stream.pool.row_id(int(i)) for i in stream.micro_batch(step, micro)[:4])
        raise ValueError(
            f"--max_tokens_per_device {cap}: step {step + 1} packs {packed[micro]} tokens on rank "
            f"{micro % layout.ranks} ({names}{' ...' if layout.rows > 4 else ''}): lower "
            "--per_device_train_batch_size and raise --gradient_accumulation_steps, or lower --max_length"
        )
    return int(packed[micro])
