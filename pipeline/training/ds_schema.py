"""What the installed DeepSpeed accepts as its configuration, found by letting DeepSpeed read one.

DeepSpeed ignores a key it does not know, except inside the sections it models with pydantic. Its own reader therefore
gets a dictionary that remembers what was looked up: no list of keys is kept here.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping
from typing import Any

from pipeline.config import nearest

Keys = tuple[str, ...]  # the way to a value: ("optimizer", "params", "lr")


class _Recorder(dict[str, Any]):
    """A section of the configuration that remembers which keys were looked up, or that all were unpacked."""

    def __init__(self, section: Mapping[str, Any]) -> None:
        super().__init__({k: _Recorder(v) if isinstance(v, dict) else v for k, v in section.items()})
        self.asked: list[str] = []

    def __copy__(self) -> _Recorder:
        return self  # DeepSpeed reads from a shallow copy, and what it reads there counts

    def __contains__(self, key: object) -> bool:
        self.asked.append(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.append(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default

    def __iter__(self) -> Iterator[str]:
        keys = list(super().__iter__())
        self.asked.extend(keys)
        return iter(keys)

    # The views of collections.abc come back to the methods above; those of dict would not.
    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return KeysView(self)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        return ItemsView(self)

    def never_read(self, path: Keys = ()) -> Iterator[tuple[Keys, list[str]]]:
        """Each key that was not looked up, and those that were. A section that nobody looked into is not judged."""
        for key, value in super().items():
            if self.asked and key not in self.asked:
                yield (*path, key), self.asked
            elif isinstance(value, _Recorder):
                yield from value.never_read((*path, key))


def deepspeed_problems(config: dict[str, Any]) -> list[tuple[Keys, str]]:
    """What the installed DeepSpeed rejects or never reads: the way to the key (empty: several keys) and the reason.

    "auto" values and batch sizes are left out: whether they fit depends on the flags and on the ranks.
    """
    from deepspeed.runtime.config import DeepSpeedConfigError
    from pydantic import ValidationError

    problems: list[tuple[Keys, str]] = []
    remaining = _without_auto(config)
    for key in ("train_batch_size", "gradient_accumulation_steps"):
        remaining.pop(key, None)
    remaining["train_micro_batch_size_per_gpu"] = 1
    while True:
        recorder = _Recorder(remaining)
        try:
            _read(recorder)
        except ValidationError as error:  # names keys inside one section: set it aside, go on with the others
            section = next(key for key in reversed(recorder.asked) if key in remaining)
            problems += [((section, *map(str, each["loc"])), _reason(each)) for each in error.errors()]
            del remaining[section]
        except (DeepSpeedConfigError, TypeError, AttributeError) as error:  # raised while a section is read
            section = next(key for key in reversed(recorder.asked) if key in remaining)
            problems.append(((section,), str(error)))
            del remaining[section]
        except (AssertionError, ValueError) as error:  # a combination of sections
            return [*problems, ((), str(error))]
        else:
            break
    problems += [(keys, _unknown(keys[-1], asked)) for keys, asked in recorder.never_read() if keys[0] != "optimizer"]
    return problems + list(_optimizer_problems(config.get("optimizer")))


def _read(recorder: _Recorder) -> None:
    """Let the installed DeepSpeed read ``recorder`` as its configuration. It needs no process group for that."""
    from deepspeed.runtime.config import DeepSpeedConfig

    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its warnings come again when the run starts
    try:
        DeepSpeedConfig(recorder)
    finally:
        logger.setLevel(level)


def _optimizer_problems(optimizer: object) -> Iterator[tuple[Keys, str]]:
    """DeepSpeed hands the parameters on unread, and Adam would reject a typo only after the model is loaded."""
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.runtime.config import ADAM_W_MODE, TORCH_ADAM_PARAM
    from deepspeed.runtime.constants import LEGACY_FUSION, OPTIMIZER_PARAMS, TYPE

    if not isinstance(optimizer, dict):
        return
    for key in optimizer:
        if key not in (TYPE, OPTIMIZER_PARAMS, LEGACY_FUSION):
            yield ("optimizer", key), _unknown(key, (TYPE, OPTIMIZER_PARAMS, LEGACY_FUSION))
    if not isinstance(optimizer.get(TYPE), str):
        yield ("optimizer",), "has no type, and DeepSpeed would ignore the section"
    elif optimizer[TYPE].lower() in ("adam", "adamw"):
        known = {ADAM_W_MODE, TORCH_ADAM_PARAM}
        for kind in (DeepSpeedCPUAdam, FusedAdam, torch.optim.AdamW):
            known |= set(inspect.signature(kind).parameters) - {"params", "model_params"}
        for key in optimizer.get(OPTIMIZER_PARAMS, {}):
            if key not in known:
                yield ("optimizer", OPTIMIZER_PARAMS, key), _unknown(key, known)


def _reason(error: Mapping[str, Any]) -> str:
    """A pydantic error in our words: an unknown key gets the nearest field of DeepSpeed's models."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    if error["type"] != "extra_forbidden":
        return f"{error['msg']}, got {json.dumps(error['input'], default=str)}"
    models = [DeepSpeedConfigModel]
    for model in models:
        models += model.__subclasses__()
    fields = {field.alias or name for model in models for name, field in model.model_fields.items()}
    return _unknown(str(error["loc"][-1]), fields)


def _unknown(key: str, known: Iterable[str]) -> str:
    return "DeepSpeed knows no such key" + nearest(key, known, otherwise="")


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _without_auto(v) if isinstance(v, dict) else v for k, v in section.items() if v != "auto"}
