"""The training methods: `--method NAME` -> module:Class. One paper, one file."""

from __future__ import annotations

import importlib

from pipeline.training.method import Method

METHODS = {
    "sft": "pipeline.methods.sft:SFT",
    "surgery": "pipeline.methods.surgery:Surgery",
}


def load_method(name: str) -> type[Method]:
    """The class of a method. Errors: ValueError listing the known ones."""
    if name not in METHODS:
        raise ValueError(f"--method {name}: choose from {', '.join(METHODS)}")
    module, cls = METHODS[name].split(":")
    loaded: type[Method] = getattr(importlib.import_module(module), cls)
    return loaded
