"""Training steps of the product, timed: its loop, method, packing, attention backend and ZeRO-3 engine."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pipeline.training.engine import Engine
from pipeline.training.loop import Loop
from pipeline.training.method import Method, StepContext
from pipeline.training.prepared import Prepared
from tools.bench.memory import peak_bytes
from tools.bench.timing import Seconds, clock


class TimedMethod(Method):
    """A method whose forward and backward passes are timed, or in an untimed step counted for memory."""

    def __init__(self, method: Method, device: torch.device) -> None:
        super().__init__(method.config)
        self._method = method
        self._device = device
        self.seconds = 0.0
        self.count_memory = False
        self.peak_bytes = 0
        self.values: dict[str, torch.Tensor] = {}  # metrics of the last step, on the device

    def step(self, ctx: StepContext) -> None:
        if self.count_memory:
            self.peak_bytes = peak_bytes(lambda: self._method.step(ctx), self._device)
        else:
            began = clock(self._device)
            self._method.step(ctx)
            self.seconds = clock(self._device) - began
        self.values = {name: torch.stack(values).mean() for name, values in ctx.metrics.items()}


@dataclass
class ProductStep:
    """Calls are training steps of one run on an engine, which several runs may share. `values`: the last step's.
    at: the step of the run that every call takes: the same rows."""

    loop: Loop
    method: TimedMethod
    values: dict[str, float]
    at: int = 0

    @classmethod
    def of(cls, run: Prepared, engine: Engine) -> ProductStep:
        """The run's steps on an engine that was built of the same model."""
        method = TimedMethod(run.method, engine.device)
        return cls(Loop(replace(run, method=method), engine, start=0, log=None), method, {})

    def peak(self) -> int:
        """Make one step and return the peak in bytes of its forward and backward passes."""
        self.method.count_memory = True
        self()
        self.method.count_memory = False
        return self.method.peak_bytes

    def __call__(self) -> Seconds:
        """One step; returns its times."""
        device = self.loop.engine.device
        self.loop.step = self.at
        began = clock(device)
        norm = self.loop.train_step()
        whole = clock(device) - began
        self.values = {name: value.item() for name, value in self.method.values.items()} | {"grad_norm": norm}
        return Seconds(self.method.seconds, whole)
