"""The only file that touches partitioned parameters: under ZeRO-3 a rank holds a shard of each weight and of each
gradient.

Outside a gather a parameter has no elements and no `.grad`; its gradient shard is fp32 inside the optimizer, averaged
over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def squared_gradient_norm(engine: Any) -> Tensor:
    """This rank's part of the squared gradient norm (scalar, fp64 on the device) after the step's last backward; the
    sum over ranks is the whole, because shards are disjoint and padded with zeros."""
    return squared_norm(Shards(engine).gradients())


def release_gathered(engine: Any) -> None:
    """Drop gathered copies of weights: a lone forward (evaluation) leaves some behind."""
    engine.optimizer.empty_partition_cache()


def size(parameter: Tensor) -> int:
    """Elements of the whole parameter, sharded or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def flat_groups(engine: Any) -> tuple[list[Mapping[str, torch.Size]], list[int]]:
    """How the optimizer holds its parameters: names and whole shapes in each flat tensor, and each flat tensor's group
    of settings."""
    shapes: list[Mapping[str, torch.Size]] = engine._get_zero_param_shapes()
    return shapes, [engine.optimizer.sub_group_to_group_id[flat] for flat in range(len(shapes))]


def load_states(
    engine: Any, model_states: Mapping[str, Any], optimizer_states: dict[str, Any], *, strict: bool
) -> None:
    """What `engine.load_checkpoint` does with this rank's two files, from their contents. Collective."""
    import torch.distributed as dist

    optimizer = engine.optimizer
    optimizer.checkpoint_event_prologue()
    engine.load_module_state_dict(model_states, strict=strict)
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(model_states["lr_scheduler"])
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, model_states[counter])
    of_ranks = [
        optimizer_states | {"loss_scaler": optimizer.loss_scaler}
    ] * dist.get_world_size()  # each reads its own
    optimizer.load_state_dict(of_ranks)
    optimizer.checkpoint_event_epilogue()


def activation_gradients(engine: Any, loss: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """d loss / d inputs. The gradient shards stay as they are, now and in the next backward."""
    gradients = torch.autograd.grad(loss, list(inputs))
    # DeepSpeed saw a backward pass and would count it as a micro-step: the next one would add to stale gradients.
    engine.optimizer._epilogue_ran_this_backward = False
    return gradients


def shard_refusals(ds_config: Mapping[str, Any]) -> list[str]:
    """Settings under which an edited weight shard is not what the next forward reads, or a gradient shard is not there
    before the step's last backward."""
    zero = ds_config.get("zero_optimization", {})
    reasons = []
    if int(zero.get("zero_hpz_partition_size", 1)) > 1:
        reasons.append("weights are gathered from a second copy (hpZ), which edits of the shards do not reach")
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if zero.get(key):
            reasons.append(f"{key} rounds weights on every gather")
    for key in ("offload_param", "offload_optimizer"):
        if (zero.get(key) or {}).get("device", "none") != "none":
            reasons.append(f"{key} keeps shards away from the device between the passes of a step")
    return [f"ds_config zero_optimization: this --method works on shards, and {each}: turn it off" for each in reasons]


def graph_refusals(ds_config: Mapping[str, Any]) -> list[str]:
    """Settings under which hooks on modules, or edits of shards, do not reach the passes that run."""
    if (ds_config.get("compile") or {}).get("deepcompile"):
        return [
            "ds_config compile.deepcompile: this --method changes what passes see from outside the graph: turn it off"
        ]
    return []


class Shards:
    """This rank's shards of the trained parameters: flat, padded with zeros to equal length on all ranks.

    Lists are in the order of `names`. Sums over shards are partial: all-reduce them.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        trained = {name: each for name, each in engine.module.named_parameters() if each.requires_grad}
        self.names, self._parameters = list(trained), list(trained.values())

    def gradients(self) -> list[Tensor]:
        """Gradients accumulated so far, averaged over ranks (fp32)."""
        from deepspeed.utils import safe_get_local_grad

        return [safe_get_local_grad(each) for each in self._parameters]

    def add_to_gradients(self, values: Iterable[Tensor]) -> None:
        """Add to the accumulated gradients, after the step's last backward."""
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        for parameter, value in zip(self._parameters, values, strict=True):
            safe_set_local_grad(parameter, safe_get_local_grad(parameter) + value)

    def forget_gradients(self, names: Collection[str] | None = None) -> None:
        """Set the accumulated gradients of some parameters, or of all, to zero."""
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        for name, parameter in zip(self.names, self._parameters, strict=True):
            if names is None or name in names:
                safe_set_local_grad(parameter, torch.zeros_like(safe_get_local_grad(parameter)))

    def weights(self) -> list[Tensor]:
        """The optimizer's fp32 weights; to be read only."""
        from deepspeed.utils import safe_get_local_fp32_param

        return [safe_get_local_fp32_param(each) for each in self._parameters]

    @contextmanager
    def edited(self) -> Iterator[Callable[[Iterable[Tensor]], None]]:
        """Yields a function that sets the weights that forward passes see. They are restored bit for bit at the end;
        the optimizer's fp32 weights never change."""
        saved = [each.ds_tensor.clone() for each in self._parameters]
        try:
            yield self._write
        finally:
            self._write(saved)

    def seen(self) -> list[Tensor]:
        """The weights that forward passes see, in the dtype of the model; to be read only."""
        return [each.ds_tensor for each in self._parameters]

    @torch.no_grad()
    def _write(self, values: Iterable[Tensor]) -> None:
        # A gathered copy outlives the pass that made it, and is read in place of the shard.
        release_gathered(self._engine)
        for parameter, value in zip(self._parameters, values, strict=True):
            assert parameter.ds_status.name == "NOT_AVAILABLE", "a write behind a gathered copy would not be seen"
            parameter.ds_tensor.copy_(value.view_as(parameter.ds_tensor))
        _settle()

    def hold(self, names: Collection[str]) -> Callable[[], None]:
        """Remember some parameters as they are; returns what puts them back after the optimizer's step.

        That a parameter needs no gradient does not keep ZeRO-3 from moving it: its momentum and weight decay go on.
        """
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        chosen = [each for name, each in zip(self.names, self._parameters, strict=True) if name in names]
        saved = [
            (each.ds_tensor.clone(), safe_get_local_fp32_param(each).clone(), self._moments(each)) for each in chosen
        ]

        def restore() -> None:
            release_gathered(self._engine)
            for parameter, (seen, weight, moments) in zip(chosen, saved, strict=True):
                parameter.ds_tensor.data.copy_(seen)
                safe_set_local_fp32_param(parameter, weight)
                for name, now in self._moments(parameter).items():
                    self._set_moment(parameter, name, moments.get(name, torch.zeros_like(now)))
            _settle()

        return restore

    def attach(self, states: Mapping[str, Sequence[Tensor]]) -> None:
        """Put tensors of the form of `weights` among the optimizer's states, with which they are saved and cut anew
        for other ranks. `detach` takes them out again."""
        optimizer = self._engine.optimizer
        for name, shards in states.items():
            for flat in optimizer.fp32_partitioned_groups_flat:
                optimizer.optimizer.state[flat][name] = torch.zeros_like(flat)
            for parameter, shard in zip(self._parameters, shards, strict=True):
                self._set_moment(parameter, name, shard)

    def detach(self, names: Iterable[str]) -> dict[str, list[Tensor]]:
        """Take tensors out of the optimizer's states. Errors: KeyError for one that is not there."""
        optimizer = self._engine.optimizer
        found = {}
        for name in names:
            found[name] = [self._moments(each)[name] for each in self._parameters]
            for flat in optimizer.fp32_partitioned_groups_flat:
                del optimizer.optimizer.state[flat][name]
        return found

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Copies of the optimizer's states of a parameter that have one value an element."""
        from deepspeed.utils import safe_get_local_optimizer_state

        optimizer = self._engine.optimizer
        group, _, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        states = optimizer.optimizer.state.get(optimizer.fp32_partitioned_groups_flat[group], {})
        return {
            name: safe_get_local_optimizer_state(parameter, name).clone()
            for name, each in states.items()
            if isinstance(each, Tensor) and each.dim() == 1
        }

    @staticmethod
    def _set_moment(parameter: Tensor, name: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        safe_set_local_optimizer_state(parameter, value, name)


def _settle() -> None:
    """Wait for what was written to shards: gathers run on a stream of their own, which does not."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def squared_norm(shards: Iterable[Tensor]) -> Tensor:
    """This rank's part of a squared L2 norm (scalar, fp64)."""
    return torch.stack([each.double().square().sum() for each in shards]).sum()
