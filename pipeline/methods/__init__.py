"""The training methods: `--method NAME` -> module:Class. One paper, one file."""

from __future__ import annotations

import importlib
from dataclasses import fields

from pipeline.training.method import Method

METHODS = {
    "sft": "pipeline.methods.sft:SFT",
    "surgery": "pipeline.methods.surgery:Surgery",
    "vaccine": "pipeline.methods.vaccine:Vaccine",
    "t_vaccine": "pipeline.methods.t_vaccine:TVaccine",
    "repnoise": "pipeline.methods.repnoise:RepNoise",
    "booster": "pipeline.methods.booster:Booster",
    "tar": "pipeline.methods.tar:TAR",
    "lisa": "pipeline.methods.lisa:Lisa",
}


def load_method(name: str) -> type[Method]:
    """The class of a method. Errors: ValueError listing the known ones."""
    if name not in METHODS:
        raise ValueError(f"--method {name}: choose from {', '.join(METHODS)}")
    module, cls = METHODS[name].split(":")
    loaded: type[Method] = getattr(importlib.import_module(module), cls)
    return loaded


def flags_of_others(name: str) -> dict[str, str]:
    """The flags of all other methods, each with the `--method` it belongs to: one is easily left over from another
    run."""
    owners: dict[str, list[str]] = {}
    for each in METHODS:
        for flag in fields(load_method(each).Config) if each != name else ():
            owners.setdefault(flag.name, []).append(each)
    return {flag: f"--method {' or '.join(names)}" for flag, names in owners.items()}
