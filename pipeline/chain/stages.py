"""From a recipe to the stages that run: one for each value of the axes it depends on, each with folder and command."""

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
from pipeline.chain.matrix import Point, axes_named, placeholders, points, suffix
from pipeline.chain.recipe import Recipe, StageSpec, names_in
from pipeline.config import Problems, read_recipe

# Stands for the chain's folder until the command is built: a definition is the same wherever the chain writes.
HERE = "{output_dir}"
# A reference and the path that may follow it, which every folder of a joined list gets.
_REFERENCE_AND_PATH = re.compile(r"\{(\w+)\}((?:/[^\s,;{}]*)?)")


@dataclass(frozen=True)
class Stage:
    """One run of a door.

    name: the recipe's name, with `-seedN` and the like when the matrix repeats it.
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
    for point in points(recipe.axes, recipe.axes):
        for spec in recipe.stages:
            if not spec.once:
                expansion.add(spec, expansion.place(spec, point))
    for spec in recipe.stages:
        if spec.once:
            expansion.add(spec, {})
    if expansion.problems:
        raise Problems(expansion.problems)
    return list(expansion.stages.values())


class _Expansion:
    """The stages found so far, each after all it waits for, and what is wrong with them."""

    def __init__(self, recipe: Recipe, output_dir: Path) -> None:
        self.specs = {spec.name: spec for spec in recipe.stages}
        self.axes = recipe.axes
        self.depends = {spec.name: self._depends_on(spec, ()) for spec in recipe.stages}
        self.output_dir = output_dir
        self.stages: dict[str, Stage] = {}
        self.problems: list[str] = []

    def _depends_on(self, spec: StageSpec, path: tuple[str, ...]) -> set[str]:
        """The axes that a stage is repeated over."""
        if spec.name in path:
            raise Problems([f"stages wait for each other: {' -> '.join([*path[path.index(spec.name) :], spec.name])}"])
        # Of a stage that runs once too, because a circle may lead through it.
        others = [self._depends_on(each, (*path, spec.name)) for each in self._waits_for(spec)]
        return set() if spec.once else set(axes_named(self.axes, spec.references())).union(*others)

    def _waits_for(self, spec: StageSpec) -> list[StageSpec]:
        """The stages it refers to, and those it is to run after."""
        named = spec.references() | set(spec.after)
        return [other for name, other in self.specs.items() if name in named]

    def place(self, spec: StageSpec, point: Point) -> Point:
        """The part of a point that makes a difference to a stage."""
        return {axis: number for axis, number in point.items() if axis in self.depends[spec.name]}

    def _skipped(self, spec: StageSpec, point: Point) -> bool:
        """Whether a stage, or one that it refers to, is not for this point."""
        if any(self.axes[axis][point[axis]][axis] in spec.skip.get(axis, ()) for axis in point):
            return True
        read = [self.specs[name] for name in spec.references() & set(self.specs)]
        return not spec.once and any(self._skipped(each, self.place(each, point)) for each in read)

    def add(self, spec: StageSpec, point: Point) -> None:
        """Add a stage behind those it waits for, unless it is skipped."""
        name = spec.name + suffix(self.axes, point)
        if name in self.stages or self._skipped(spec, point):
            return
        settings: dict[str, Any] = {}
        reads: dict[str, tuple[StageSpec, Point]] = {}
        for key, value in spec.settings.items():
            settings[key] = self._resolve(value, point, reads)
        waits = dict(reads)
        for other in spec.after:
            waits |= self._instances(self.specs[other], point)
        for each in waits.values():
            self.add(*each)
        self.stages[name] = self._build(name, spec, settings, tuple(reads), tuple(waits))

    def _instances(self, spec: StageSpec, point: Point) -> dict[str, tuple[StageSpec, Point]]:
        """What a stage at this point means by the name of `spec`: those of all values of axes that are not fixed."""
        found = [each for each in points(self.axes, self.depends[spec.name], point) if not self._skipped(spec, each)]
        return {spec.name + suffix(self.axes, each): (spec, each) for each in found}

    def _resolve(self, value: Any, point: Point, reads: dict[str, tuple[StageSpec, Point]]) -> Any:
        """A value with what its names stand for; adds the stages that it names to `reads`."""
        if isinstance(value, list):
            return [word for each in value for word in self._resolve_item(each, point, reads)]
        if not isinstance(value, str):
            return value
        values = {"output_dir": [HERE]} | {name: [each] for name, each in placeholders(self.axes, point).items()}
        for name in names_in([value]) & set(self.specs):
            instances = self._instances(self.specs[name], point)
            reads.update(instances)
            values[name] = [f"{HERE}/{each}" for each in instances]
        return _REFERENCE_AND_PATH.sub(lambda found: ",".join(each + found[2] for each in values[found[1]]), value)

    def _resolve_item(self, item: Any, point: Point, reads: dict[str, tuple[StageSpec, Point]]) -> list[Any]:
        """An item of a list, repeated over the axes that it names and that are not fixed."""
        names = names_in([item])
        over = {*axes_named(self.axes, names), *point}
        stages = [self.specs[name] for name in names & set(self.specs)]
        return [
            self._resolve(item, each, reads)
            for each in points(self.axes, over, point)
            if all(self._instances(stage, each) for stage in stages)
        ]

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
