"""One training step on the meta device: every operation runs with its shapes and without its numbers.

What autograd keeps for the backward pass, what is alive at one time, and in which order modules ask for their weights
(`order.py`) come from the model, the kernels' own shape rules and the product's own step, not from formulas about
architectures.

On the meta device nothing can be read back: a value that the step reads is taken to be one or true (every head has a
positive divergence, which costs the most).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.planning.order import Event, Order

Backward = Callable[[Tensor], None]
META = torch.device("meta")


@dataclass
class Trace:
    """What one step did. Bytes; parameters are not in them."""

    saved: int = 0  # kept by autograd when the backward pass begins (the largest one, if there are several)
    peak: int = 0  # alive at one time, whole gradients of weights included until they are handed over
    logits: int = 0  # alive at one time in the output projection's forward pass, beyond what lived before
    layer_saved: list[int] = field(default_factory=list)  # of `saved`, what each layer but the last added
    layer_kept: list[int] = field(default_factory=list)  # what each layer but the last left alive in its forward pass
    events: list[Event] = field(default_factory=list)


def trace(
    model: nn.Module, layers: nn.ModuleList, step: Callable[[Backward], None], *, efficient_linear: bool = True
) -> Trace:
    """Run `step` on a model on the meta device. It calls the function it is given to run a backward pass.

    layers: the model's decoder layers. efficient_linear: DeepSpeed's linear function, which keeps its input even where
    the weight is frozen (`memory_efficient_linear`).
    """
    found, order = Trace(), Order(model)
    memory, saved = _Memory(model), _Saved(model)

    def backward(loss: Tensor) -> None:
        kept = saved.of_layers(), memory.of_layers()
        if saved.total >= found.saved:
            found.saved, (found.layer_saved, found.layer_kept) = saved.total, kept
        order.backward = True
        loss.backward()
        order.backward = False

    with ExitStack() as stack:
        if efficient_linear:
            stack.enter_context(_deepspeed_linear())
        stack.enter_context(order.watched())
        for layer in layers:
            for counter in (saved, memory):
                stack.callback(layer.register_forward_pre_hook(counter.before_layer).remove)
        head = model.get_output_embeddings()  # type: ignore[operator]
        stack.callback(head.register_forward_pre_hook(memory.before_head).remove)
        stack.callback(head.register_forward_hook(memory.after_head).remove)
        for parameter in (each for each in model.parameters() if each.requires_grad):
            stack.callback(parameter.register_post_accumulate_grad_hook(_drop_gradient).remove)
        stack.enter_context(memory)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor))
        step(backward)
    found.peak, found.logits, found.events = max(memory.peak, memory.passed), memory.logits, order.events
    return found


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None  # ZeRO-3 reduces it to its shard


@contextmanager
def _deepspeed_linear() -> Iterator[None]:
    """DeepSpeed replaces this function, once and for the process, when a model is first loaded under ZeRO-3."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    before = F.linear
    F.linear = zero3_linear_wrap
    try:
        yield
    finally:
        F.linear = before


class _Storages:
    """Bytes of distinct storages while they live."""

    def __init__(self, ignored: nn.Module) -> None:
        tensors = (*ignored.parameters(), *ignored.buffers())
        self._ignored = {each.untyped_storage()._cdata for each in tensors}
        self._alive: dict[int, Any] = {}
        self.total = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._ignored:
            return
        size = storage.nbytes()

        def gone(_: object) -> None:
            del self._alive[key]
            self.total -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.total += size


class _PerLayer(_Storages):
    """The same, with what each decoder layer's forward pass added to it."""

    def __init__(self, ignored: nn.Module) -> None:
        super().__init__(ignored)
        self._begins: list[int] = []

    def before_layer(self, *_: Any) -> None:
        """A layer's forward pass begins."""
        self._begins.append(self.total)

    def of_layers(self) -> list[int]:
        """What each layer but the last added until the next one began; counts from the next layer on anew."""
        added = [after - before for before, after in pairwise(self._begins)]
        self._begins = []
        return added


class _Saved(_PerLayer):
    """What autograd keeps."""

    def pack(self, tensor: Tensor) -> Tensor:
        self.add(tensor)
        return tensor.detach()  # the tensor itself would keep an output's graph alive in a circle


class _Memory(_PerLayer, TorchDispatchMode):
    """Everything that operations make, and answers to what they read."""

    def __init__(self, ignored: nn.Module) -> None:
        _PerLayer.__init__(self, ignored)
        TorchDispatchMode.__init__(self)
        self.peak = self.passed = self.logits = 0  # passed: the peak before the output projection
        self._at_head = 0

    def before_head(self, *_: Any) -> None:
        """A peak of its own begins."""
        self.passed, self.peak, self._at_head = max(self.passed, self.peak), self.total, self.total

    def after_head(self, *_: Any) -> None:
        """It ends."""
        self.logits = max(self.logits, self.peak - self._at_head)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool or 1
        device = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and args[0].device == META and device not in (None, META):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=device)
        if func is torch.ops.aten.histc.default:  # experts count their tokens with it; it has no shape rule
            return args[0].new_empty(args[1])
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:  # its rule takes bf16 alone
            half = func(*(each.bfloat16() for each in args[:2]), *args[2:], **kwargs)
            out = torch.empty_like(half, dtype=args[0].dtype)
        else:
            out = func(*args, **kwargs)
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and each.device == META:
                self.add(each)
        self.peak = max(self.peak, self.total)
        return out
