"""From a recipe to the stages that run: one for each seed of the matrix, in order, each with folder and command."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.chain.doors import DOORS, ROOT, Door
from pipeline.chain.recipe import Recipe, StageSpec
from pipeline.config import Problems, read_recipe

# Stands for the chain's folder until the command is built: a definition is the same wherever the chain writes.
HERE = "{output_dir}"
# A reference and the path that may follow it, which every folder of a joined list gets.
_REFERENCE_AND_PATH = re.compile(r"\{(\w+)\}((?:/[^\s,;{}]*)?)")


@dataclass(frozen=True)
class Stage:
    """One run of a door.

    name: the recipe's name, with `-seedN` when the matrix repeats it.
    settings: the recipe's `with`, references resolved except `{output_dir}`.
    reads: names of the stages it refers to; waits: those and its `after`.
    definition: SHA-256 of what the stage is told to do; a finished stage is skipped only while it is unchanged.
    attacked: its weights come from a model trained on attack data. reads_attacked: it reads such weights.
    """

    name: str
    run: str
    ranks: int
    output_dir: Path
    settings: Mapping[str, Any]
    reads: tuple[str, ...]
    waits: tuple[str, ...]
    definition: str
    attacked: bool
    reads_attacked: bool

    @property
    def door(self) -> Door:
        return DOORS[self.run]

    @property
    def folder(self) -> Path:
        return self.output_dir / self.name

    @property
    def log(self) -> Path:
        return self.output_dir / "logs" / f"{self.name}.log"

    def command(self, *, resume: bool = False) -> list[str]:
        """The words to start; `resume` lets the door go on with what its folder holds."""
        launcher = [sys.executable]
        if self.ranks > 1:
            launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(self.ranks)]
        flags = self.door.resume_flags if resume else ()
        return [*launcher, str(ROOT / self.door.file), *self.arguments(), *flags]

    def arguments(self) -> list[str]:
        """The words after the door's file."""
        words = []
        for key in self.door.positional:
            words += self._words(self.settings[key])
        words += [str(self.folder)] if self.door.output_by_position else ["--output_dir", str(self.folder)]
        for key, value in self.settings.items():
            if key not in self.door.positional:
                words += [f"--{key}"] if value is True else [f"--{key}", *self._words(value)]
        return words

    def _words(self, value: Any) -> list[str]:
        values = value if isinstance(value, list) else [value]
        words = [json.dumps(each) if isinstance(each, bool | dict) else str(each) for each in values]
        return [word.replace(HERE, str(self.output_dir)) for word in words]


def expand(recipe: Recipe, output_dir: Path) -> list[Stage]:
    """The stages of a recipe in the order they run: the recipe's, but each after all it waits for.

    Errors: Problems for stages that wait for each other, a settings file that is missing, and an attacked model given
    to a stage that does not allow it.
    """
    expansion = _Expansion(recipe, output_dir)
    for seed in recipe.seeds or (None,):
        for spec in recipe.stages:
            if not spec.once:
                expansion.add(spec, seed, ())
    for spec in recipe.stages:
        if spec.once:
            expansion.add(spec, None, ())
    if expansion.problems:
        raise Problems(expansion.problems)
    return list(expansion.stages.values())


class _Expansion:
    """The stages found so far, each after all it waits for, and what is wrong with them."""

    def __init__(self, recipe: Recipe, output_dir: Path) -> None:
        self.specs = {spec.name: spec for spec in recipe.stages}
        self.seeds = recipe.seeds
        self.output_dir = output_dir
        self.stages: dict[str, Stage] = {}
        self.problems: list[str] = []

    def add(self, spec: StageSpec, seed: int | None, path: tuple[str, ...]) -> None:
        """Add a stage behind those it waits for; `path` holds the stages that wait for it."""
        name = _instance_name(spec, seed)
        if name in path:
            raise Problems([f"stages wait for each other: {' -> '.join([*path[path.index(name) :], name])}"])
        if name in self.stages:
            return
        reads = {each: self._instances(self.specs[each], seed) for each in self.specs if each in spec.references()}
        read = {_instance_name(*each): each for instances in reads.values() for each in instances}
        after = [each for other in spec.after for each in self._instances(self.specs[other], seed)]
        waits = read | {_instance_name(*each): each for each in after}
        for each in waits.values():
            self.add(*each, path=(*path, name))
        values = {each: [f"{HERE}/{_instance_name(*one)}" for one in instances] for each, instances in reads.items()}
        values |= {"output_dir": [HERE], "seed": [str(seed)]}
        settings = {key: _resolve(value, values) for key, value in spec.settings.items()}
        self.stages[name] = self._build(name, spec, settings, tuple(read), tuple(waits))

    def _instances(self, spec: StageSpec, seed: int | None) -> list[tuple[StageSpec, int | None]]:
        """What a stage of this seed means by the name of `spec`; one of no single seed means those of all seeds."""
        if spec.once or not self.seeds:
            return [(spec, None)]
        return [(spec, each) for each in (self.seeds if seed is None else [seed])]

    def _build(
        self, name: str, spec: StageSpec, settings: dict[str, Any], reads: tuple[str, ...], waits: tuple[str, ...]
    ) -> Stage:
        reads_attacked = spec.door.reads_weights and any(self.stages[each].attacked for each in reads)
        allowed = settings.get("allow_attacked_model") is True
        if reads_attacked and spec.door.guarded and not allowed:
            self.problems.append(
                f"stage {name}: reads an attacked model; if that is meant, set allow_attacked_model: true"
            )
        files = self._settings_files(name, settings)
        flags = settings | (read_recipe(str(settings["config"])) if "config" in files else {})
        told = {"run": spec.run, "ranks": spec.ranks, "with": settings, "files": files, "waits": sorted(waits)}
        return Stage(
            name=name,
            run=spec.run,
            ranks=spec.ranks,
            output_dir=self.output_dir,
            settings=settings,
            reads=reads,
            waits=waits,
            definition=hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest(),
            attacked=spec.door.weights is not None and (reads_attacked or allowed or "attack_data" in flags),
            reads_attacked=reads_attacked,
        )

    def _settings_files(self, name: str, settings: Mapping[str, Any]) -> dict[str, str]:
        """The contents of the settings files a stage is given: they are part of what it is told to do."""
        contents = {}
        for key in ("config", "ds_config"):
            path = str(settings.get(key, HERE))
            if HERE in path:  # none, or one that an earlier stage makes
                continue
            if Path(path).is_file():
                contents[key] = Path(path).read_text(encoding="utf-8")
            else:
                self.problems.append(f"stage {name}: {key} {path}: no such file")
        return contents


def _instance_name(spec: StageSpec, seed: int | None) -> str:
    return spec.name if seed is None else f"{spec.name}-seed{seed}"


def _resolve(value: Any, values: Mapping[str, list[str]]) -> Any:
    if isinstance(value, list):
        return [_resolve(each, values) for each in value]
    if not isinstance(value, str):
        return value
    return _REFERENCE_AND_PATH.sub(lambda found: ",".join(each + found[2] for each in values[found[1]]), value)
