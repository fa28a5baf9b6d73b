"""The recipe of a chain, read strictly: every problem is found before the first stage runs.

    name: demo                        # required
    output_dir: runs/demo             # where the chain writes unless --output_dir is given [default: runs/NAME]
    matrix:                           # optional axes; a stage runs once for each value of the axes it depends on
      seed: [1, 2, 3]                 # its folder then ends in -seed1, -seed2 ...
      ratio: [{ratio: 0, rows: 240}, {ratio: 0.1, rows: 216}] # a value may bring more placeholders with it
    stages:
      - name: sft                     # required, unique: letters, digits and _; the folder is OUTPUT_DIR/sft
        run: train                    # required: curate | train | convert | match | measure | assess | compare
        ranks: 2                      # train only: above 1 it is started by the deepspeed launcher [default: 1]
        with:                         # the door's flags, by name; a list gives several values, true and false a switch
          model_name_or_path: "{aligned}"
          seed: "{seed}"
          eval_data: ["poisoned=policy:attack[:60]", "benign=policy:user[:60]"]
        after: [surgery]              # stages to wait for beside those that `with` refers to
        skip: {ratio: [0]}            # not for these values, nor any stage that refers to this one
        once: false                   # true: one stage for all values of all axes

Inside a value, `{sft}` is the folder of stage sft, `{output_dir}` the chain's folder, and `{seed}`, `{ratio}` or
`{rows}` what the axes say. A stage depends on an axis that it names, or that a stage it refers to depends on. A stage
with `once: true` sees the folders of all values, joined by commas (`{control}/checkpoint` gives each its suffix); an
item of a list that names an axis is there repeated for each of its values, without those that are skipped. The runner
fills in the stage's own folder (`output_dir`, and convert's second position) and `resume_from_checkpoint`, so `with`
must not; what a door takes by position (`checkpoint` of convert, `run` of match) is a key of `with` as well. Stages
run from the current folder, where relative paths start. YAML anchors and merge keys (`<<`) work.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.chain.doors import DOORS, Door
from pipeline.chain.matrix import read_matrix
from pipeline.config import Problems, nearest

RECIPE_KEYS = ("name", "output_dir", "matrix", "stages")
STAGE_KEYS = ("name", "run", "ranks", "with", "after", "skip", "once")
# Folders and placeholders of the runner's own; `logs` would be the folder of a stage of that name.
RESERVED_NAMES = ("output_dir", "logs")
# What the runner fills in by itself.
RUNNER_FLAGS = ("output_dir", "resume_from_checkpoint")

REFERENCE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class StageSpec:
    """A stage as the recipe writes it, before the matrix repeats it. `settings` is its `with`; `skip` the values, by
    axis, that it is not repeated for."""

    name: str
    run: str
    ranks: int
    settings: dict[str, Any]
    after: tuple[str, ...]
    skip: dict[str, list[str]]
    once: bool

    @property
    def door(self) -> Door:
        return DOORS[self.run]

    def references(self) -> set[str]:
        """Every name in braces in the stage's values, stages and placeholders alike."""
        return names_in(self.settings.values())


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `axes`: each axis's values in the order of the matrix, a value being what every placeholder
    of the axis stands for, the axis's own name first."""

    name: str
    output_dir: str
    axes: dict[str, list[dict[str, str]]]
    stages: tuple[StageSpec, ...]


def names_in(values: Iterable[Any]) -> set[str]:
    """Every name in braces."""
    return {name for text in _texts(values) for name in REFERENCE.findall(text)}


def _texts(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, list):
            yield from _texts(value)
        elif isinstance(value, str):
            yield value


def _repeated_keys(node: Any, seen: set[int]) -> list[str]:
    """Every mapping key that is given twice: PyYAML keeps the last one in silence."""
    if id(node) in seen:  # an anchor that is used again
        return []
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        return [each for child in node.value for each in _repeated_keys(child, seen)]
    found = []
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        line = node.start_mark.line + 1
        found = [f"line {line}: key {name} stands twice" for name in dict.fromkeys(names) if names.count(name) > 1]
        found += [each for _, child in node.value for each in _repeated_keys(child, seen)]
    return found


def load_recipe(path: Path) -> Recipe:
    """Read and check a chain's recipe. Errors: Problems, one line for each thing that is wrong."""
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe")
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        problems = _repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader), set())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping with the keys {', '.join(RECIPE_KEYS)}")
    problems += [f"key {key} is unknown{nearest(str(key), RECIPE_KEYS)}" for key in content if key not in RECIPE_KEYS]
    name = content.get("name")
    if not isinstance(name, str) or not name:
        problems.append(f"name: expected a text, got {name!r}")
    output_dir = content.get("output_dir", f"runs/{name}")
    if not isinstance(output_dir, str) or not output_dir:
        problems.append(f"output_dir: expected a folder, got {output_dir!r}")
    stages = _read_stages(content.get("stages"), problems)
    names = _names(content.get("stages"))
    axes = read_matrix(content.get("matrix", {}), names, problems)
    _check_references(stages, names, axes, problems)
    if problems:
        raise Problems([f"{path}: {problem}" for problem in problems])
    return Recipe(str(name), output_dir, axes, tuple(stages))


def _read_stages(entries: Any, problems: list[str]) -> list[StageSpec]:
    if not isinstance(entries, list) or not entries:
        problems.append(f"stages: expected a list of stages, got {entries!r}")
        return []
    stages: list[StageSpec] = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            problems.append(f"stage {number}: expected a mapping with the keys {', '.join(STAGE_KEYS)}, got {entry!r}")
        elif stage := _read_stage(entry, f"stage {entry.get('name', number)}", problems):
            if stage.name in {each.name for each in stages}:
                problems.append(f"stage {stage.name}: the name stands twice")
            stages.append(stage)
    return stages


def _read_stage(entry: Mapping[Any, Any], where: str, problems: list[str]) -> StageSpec | None:
    found = [f"key {key} is unknown{nearest(str(key), STAGE_KEYS)}" for key in entry if key not in STAGE_KEYS]
    name, run, ranks = entry.get("name"), entry.get("run"), entry.get("ranks", 1)
    settings, after, once = entry.get("with", {}), entry.get("after", []), entry.get("once", False)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name) or name in RESERVED_NAMES:
        found.append(f"name {name!r}: expected letters, digits and _, and none of {', '.join(RESERVED_NAMES)}")
    if run not in DOORS:
        found.append(f"run: {run} is no door{nearest(str(run), DOORS)}")
    if type(ranks) is not int or ranks < 1 or (ranks > 1 and run != "train"):
        found.append(f"ranks: {ranks!r} is not a whole number above 0, or above 1 for a door other than train")
    if not isinstance(after, list) or not all(isinstance(each, str) for each in after):
        found.append(f"after: expected a list of stage names, got {after!r}")
    skip = entry.get("skip", {})
    if not isinstance(skip, dict) or not all(isinstance(each, list) and each for each in skip.values()):
        found.append(f"skip: expected {{axis: [values]}}, got {skip!r}")
    if not isinstance(once, bool):
        found.append(f"once: expected true or false, got {once!r}")
    if not isinstance(settings, dict):
        found.append(f"with: expected a mapping of the door's flags to values, got {settings!r}")
    elif run in DOORS:
        found += _check_settings(settings, DOORS[run])
    problems += [f"{where}: {each}" for each in found]
    if found:
        return None
    skipped = {str(axis): [str(each) for each in values] for axis, values in skip.items()}
    return StageSpec(str(name), str(run), ranks, settings, tuple(after), skipped, once)


def _check_settings(settings: Mapping[Any, Any], door: Door) -> list[str]:
    found = []
    for key, value in settings.items():
        values = value if isinstance(value, list) else [value]
        if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z]\w*", key):
            found.append(f"with: {key!r} is no flag name (write it without the dashes)")
        elif key in RUNNER_FLAGS:
            found.append(f"with: {key} is filled in by the runner; take it out")
        elif not values or not all(isinstance(each, str | int | float | bool | dict) for each in values):
            found.append(f"with: {key}: expected a text, a number, true, false, or a list of them, got {value!r}")
    found += [f"with: {key} is missing" for key in door.positional if key not in settings]
    return found


def _names(entries: Any) -> set[str]:
    """The names of all stages, of those with problems too: a reference to one of them is not a second problem."""
    if not isinstance(entries, list):
        return set()
    return {str(entry.get("name")) for entry in entries if isinstance(entry, dict)}


def _check_references(
    stages: list[StageSpec], names: set[str], axes: Mapping[str, list[dict[str, str]]], problems: list[str]
) -> None:
    placeholders = {name for values in axes.values() for name in values[0]}
    known = names | placeholders | {"output_dir"}
    named: set[str] = set()
    for stage in stages:
        where = f"stage {stage.name}"
        references = stage.references()
        named |= references
        problems += [f"{where}: {{{each}}} is unknown{nearest(each, known)}" for each in sorted(references - known)]
        problems += [
            f"{where}: after: {each} is unknown{nearest(each, names)}" for each in stage.after if each not in names
        ]
        problems += [f"{where}: skip: {each}" for each in _check_skip(stage, axes)]
        if stage.once and not axes:
            problems.append(f"{where}: once: has no effect without a matrix; take it out")
        if stage.once:
            alone = {key: value for key, value in stage.settings.items() if not isinstance(value, list)}
            problems += [
                f"{where}: {{{each}}} has several values in a stage that runs once: name it in an item of a list"
                for each in sorted(names_in(alone.values()) & placeholders)
            ]
    problems += [
        f"matrix: {axis} is named by no stage, so it has no effect: take it out, or name {{{axis}}} where it matters"
        for axis, values in axes.items()
        if not named & set(values[0])
    ]


def _check_skip(stage: StageSpec, axes: Mapping[str, list[dict[str, str]]]) -> list[str]:
    found = ["has no effect on a stage that runs once; take it out"] if stage.skip and stage.once else []
    for axis, values in stage.skip.items():
        if axis not in axes:
            found.append(f"{axis} is no axis of the matrix{nearest(axis, axes)}")
        else:
            there = [each[axis] for each in axes[axis]]
            found += [f"{axis} has no value {each}{nearest(each, there)}" for each in values if each not in there]
    return found
