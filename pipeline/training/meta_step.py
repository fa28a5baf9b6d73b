"""A training step to trace: the product's model on the meta device, and the method's own step over texts of given
lengths."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import LoraArguments, ModelArguments, TrainArguments
from pipeline.data.cache import EncodedPool
from pipeline.data.chat import IGNORE, Example
from pipeline.data.streams import Layout, Stream
from pipeline.planning.activations import Row, Subject
from pipeline.planning.tracing import META, Backward
from pipeline.sink import attention
from pipeline.training.engine import trained_form
from pipeline.training.losses import TokenLoss
from pipeline.training.method import Method, StepContext


def subject(
    config: Any, model: ModelArguments, lora: LoraArguments, train: TrainArguments, method: Method, *, cuda: bool
) -> Subject:
    """The run's model and step, to trace. cuda: planned for GPUs, whatever this machine is."""
    if train.attention == "blocked":
        kernel = "blocked"
    else:
        # Every flash kernel on CUDA keeps what PyTorch's own keeps: q, k, v, the output and its log-sum-exp.
        kernel = "varlen" if cuda else "cpu_flash"
    name = attention.register(kernel)

    def build(some: Any) -> nn.Module:
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if train.bf16 else torch.float32
        with torch.device(META), warnings.catch_warnings(action="ignore"):
            skeleton = AutoModelForCausalLM.from_config(
                some, dtype=dtype, attn_implementation=name, trust_remote_code=model.trust_remote_code
            )
            built: nn.Module = trained_form(skeleton, model, lora, train)
        for parameter in (p for each, p in built.named_parameters() if "lora_" in each):
            parameter.data = parameter.data.to(dtype)  # on the meta device PEFT leaves it in fp32
        return built

    def step(built: nn.Module, row: Row, backward: Backward) -> None:
        with warnings.catch_warnings(action="ignore"):
            _step(built, method, row, backward)

    return Subject(config, build, step, whole=bool(getattr(method.config, "layers", ())))


def _step(model: Any, method: Method, row: Row, backward: Backward) -> None:
    """One optimizer step of the method on one micro-batch; without reference texts, plain cross-entropy."""
    streams = {"train": _stream("train", row.users, row.trained)}
    if row.references:
        streams |= {name: _stream(name, row.references, 0) for name in method.pools}
    ctx = StepContext(
        step=0, steps=1, rank=0, streams=streams, engine=_Engine(model, backward), token_loss=TokenLoss(model),
        device=next(model.parameters()).device,
    )  # fmt: skip
    if row.references:
        method.step(ctx)
        return
    for micro in ctx.draw("train"):
        batch = ctx.pack(micro)
        ctx.backward(ctx.cross_entropy(micro, batch), micro, batch, last=micro.last)


def _stream(name: str, lengths: tuple[int, ...], trained: int) -> Stream:
    return Stream(name, _Texts(name, lengths, trained), Layout(len(lengths), 1, 1), 0)


class _Texts(EncodedPool):
    """Rows of given lengths without content, of whose last tokens `trained` in all are trained."""

    def __init__(self, name: str, lengths: tuple[int, ...], trained: int) -> None:
        self.fingerprint = name
        self.lengths = np.array(lengths, dtype=np.int64)
        ends = np.cumsum(self.lengths - 1)
        self.trained = np.diff(np.minimum(ends, trained), prepend=0)

    def __getitem__(self, index: int) -> Example:
        length, answer = int(self.lengths[index]), int(self.trained[index])
        labels = [IGNORE] * (length - answer) + [0] * answer
        return Example(self.row_id(index), [0] * length, labels, False)

    def row_id(self, index: int) -> str:
        return f"{self.fingerprint}:{index}"


@dataclass
class _Engine:
    """What `StepContext` uses of a DeepSpeed engine."""

    module: Any
    run: Backward

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        """Without effect: there is one micro-batch."""

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> None:
        self.run(loss)
