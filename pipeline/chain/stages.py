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
        """The words to start; `resume` lets a train stage go on from its newest complete checkpoint."""
        launcher = [sys.executable]
        if self.ranks > 1:
            launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(self.ranks)]
        resumed = ["--resume_from_checkpoint", "auto"] if resume else []
        return [*launcher, str(ROOT / self.door.file), *self.arguments(), *resumed]

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
    specs = {spec.name: spec for spec in recipe.stages}
    wanted = {
        _instance_names(spec, seed, recipe)[0]: (spec, seed)
        for seed in recipe.seeds or (None,)
        for spec in recipe.stages
        if not spec.once
    }
    wanted |= {spec.name: (spec, None) for spec in recipe.stages if spec.once}
    stages: dict[str, Stage] = {}
    problems: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise Problems(
                [*problems, f"stages wait for each other: {' -> '.join([*path[path.index(name) :], name])}"]
            )
        if name in stages:
            return
        spec, seed = wanted[name]
        reads = {each: _instance_names(specs[each], seed, recipe) for each in specs if each in spec.references()}
        after = [each for other in spec.after for each in _instance_names(specs[other], seed, recipe)]
        waits = tuple(dict.fromkeys([*(each for names in reads.values() for each in names), *after]))
        for each in waits:
            visit(each, (*path, name))
        stages[name] = _build(name, spec, seed, reads, waits, stages, output_dir, problems)

    for name in wanted:
        visit(name, ())
    if problems:
        raise Problems(problems)
    return list(stages.values())


def _instance_names(spec: StageSpec, seed: int | None, recipe: Recipe) -> list[str]:
    """What a stage of this seed means by the name of `spec`; a stage of no single seed means those of all seeds."""
    if spec.once or not recipe.seeds:
        return [spec.name]
    return [f"{spec.name}-seed{each}" for each in (recipe.seeds if seed is None else [seed])]


def _build(
    name: str,
    spec: StageSpec,
    seed: int | None,
    reads: Mapping[str, list[str]],
    waits: tuple[str, ...],
    earlier: Mapping[str, Stage],
    output_dir: Path,
    problems: list[str],
) -> Stage:
    values = {key: [f"{HERE}/{each}" for each in names] for key, names in reads.items()}
    values |= {"output_dir": [HERE], "seed": [str(seed)]}
    settings = {key: _resolve(value, values) for key, value in spec.settings.items()}
    files = {key: str(settings[key]) for key in ("config", "ds_config") if HERE not in str(settings.get(key, HERE))}
    missing = [f"stage {name}: {key} {path}: no such file" for key, path in files.items() if not Path(path).is_file()]
    problems += missing
    read_names = tuple(each for names in reads.values() for each in names)
    reads_attacked = spec.door.reads_weights and any(earlier[each].attacked for each in read_names)
    allowed = settings.get("allow_attacked_model") is True
    if reads_attacked and spec.door.guarded and not allowed:
        problems.append(f"stage {name}: reads an attacked model; if that is meant, set allow_attacked_model: true")
    flags = dict(settings)
    if "config" in files and not missing:
        flags = read_recipe(files["config"]) | flags
    told = {
        "run": spec.run,
        "ranks": spec.ranks,
        "with": settings,
        "waits": sorted(waits),
        # A settings file is part of what the stage is told: its content counts, not its name alone.
        "files": {} if missing else {key: Path(path).read_text(encoding="utf-8") for key, path in files.items()},
    }
    return Stage(
        name=name,
        run=spec.run,
        ranks=spec.ranks,
        output_dir=output_dir,
        settings=settings,
        reads=read_names,
        waits=waits,
        definition=hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest(),
        attacked=spec.door.weights is not None and (reads_attacked or allowed or "attack_data" in flags),
        reads_attacked=reads_attacked,
    )


def _resolve(value: Any, values: Mapping[str, list[str]]) -> Any:
    if isinstance(value, list):
        return [_resolve(each, values) for each in value]
    if not isinstance(value, str):
        return value
    return _REFERENCE_AND_PATH.sub(lambda found: ",".join(each + found[2] for each in values[found[1]]), value)
