"""Choosing and rewriting data before a model is trained on it: `--method NAME` -> module.

A module has CONFIGS, the dataclasses of its flags (one of them has `method`), and run(parsed), which does the work.
"""

from __future__ import annotations

import importlib
from dataclasses import fields
from types import ModuleType

MODULES = {
    "dgr": "pipeline.curation.dgr",
    "pharmacist": "pipeline.curation.pharmacist",
}


def load_module(name: str | None) -> ModuleType:
    """The module of a method. Errors: ValueError listing the known ones."""
    if name not in MODULES:
        given = "--method" if name is None else f"--method {name}"
        raise ValueError(f"{given}: choose from {', '.join(MODULES)}")
    return importlib.import_module(MODULES[name])


def flags_of_others(name: str | None) -> dict[str, str]:
    """The flags of all other methods, each with the `--method` it belongs to."""
    owners: dict[str, list[str]] = {}
    for each in MODULES:
        for config in load_module(each).CONFIGS if each != name else ():
            for flag in fields(config):
                owners.setdefault(flag.name, []).append(each)
    return {flag: f"--method {' or '.join(names)}" for flag, names in owners.items()}
