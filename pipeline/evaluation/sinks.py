"""The sink divergence of every head of a model over two pools of texts (the statistic of arXiv 2602.05228, without
training)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import ModelArguments
from pipeline.data.chat import ChatEncoder, Example
from pipeline.data.packing import pack
from pipeline.data.schema import read_conversations
from pipeline.evaluation.model import EvaluatedModel
from pipeline.sink import attention, backends
from pipeline.sink.layout import Segments
from pipeline.sink.divergence import SinkStep, penalty
from pipeline.training.manifest import write_json

TEXTS_AT_ONCE = 16  # texts packed into one forward pass


@dataclass
class MeasureArguments:
    """Flags of measure.py."""

    harmful_data: str = field(default="policy:harmful", metadata={"help": "Harmful texts."})
    harmless_data: str = field(default="policy:harmless", metadata={"help": "Harmless texts."})
    output_dir: str = field(default="runs/sinks", metadata={"help": "Folder of sinks.json."})
    max_texts: int | None = field(default=None, metadata={"help": "Use the first N texts of each pool."})
    max_length: int = field(default=512, metadata={"help": "Tokens a text is cut to."})
    system_prompt: str | None = field(default=None, metadata={"help": "System turn for texts that have none."})
    sink_token_position: int = field(default=0, metadata={"help": "Position of the sink key in each text."})


def measure(model: ModelArguments, arguments: MeasureArguments) -> dict[str, Any]:
    """Write sinks.json and return it: `divergence` [layers][heads], every text weighing the same, and its summary.

    Errors: ValueError for data or a model that cannot be measured, naming flag or row.
    """
    evaluated = EvaluatedModel(model)
    encoder = ChatEncoder(evaluated.tokenizer, max_length=arguments.max_length)
    texts = {}
    for flag, keep in (("harmful_data", "unsafe"), ("harmless_data", "safe")):
        rows = read_conversations(
            getattr(arguments, flag),
            flag=flag,
            keep=keep,  # type: ignore[arg-type]
            system_prompt=arguments.system_prompt,
        )
        texts[flag] = [encoder.encode(row) for row in rows[: arguments.max_texts]]
        short = [each.row_id for each in texts[flag] if len(each.input_ids) < arguments.sink_token_position + 2]
        if short or not texts[flag]:
            raise ValueError(
                f"--{flag} {getattr(arguments, flag)}: "
                + (f"{short[0]} is too short for --sink_token_position" if short else "no usable text")
            )
    backend, reason = backends.choose("auto", evaluated.device.type, half=evaluated.dtype != torch.float32)
    loaded = evaluated.load(attention.register(backend))
    means = {flag: sink_mean(loaded, group, arguments.sink_token_position) for flag, group in texts.items()}
    divergence = means["harmful_data"] - means["harmless_data"]
    result = {
        "model": evaluated.name,
        "adapter": evaluated.adapter,
        "attention": f"{backend} ({reason})",
        "texts": {flag: len(group) for flag, group in texts.items()},
        "positive_heads": float((divergence > 0).float().mean()),
        "penalty": float(penalty(divergence)),
        "divergence": divergence.tolist(),
    }
    out = Path(arguments.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "sinks.json", result)
    return result


@torch.no_grad()
def sink_mean(model: Any, texts: Sequence[Example], position: int) -> Tensor:
    """a_lh [L,H] fp32 on the CPU: the mean over texts of the mean sink attention of a text's queries."""
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    total = torch.zeros(config.num_hidden_layers, config.num_attention_heads)
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        packed = texts[first : first + TEXTS_AT_ONCE]
        batch = pack([], packed).to(device)
        segments = Segments.from_bounds(batch.bounds, device)
        sink = SinkStep(
            segments, start=0, harmful=len(packed), layers=config.num_hidden_layers, heads=config.num_attention_heads,
            alpha=0.0, position=position,
        )  # fmt: skip
        model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            segments=segments,
            sink=sink,
            logits_to_keep=1,
            use_cache=False,
        )
        total += len(packed) * sink.divergence().cpu()  # against no harmless text: the mean of these texts
    return total / len(texts)
