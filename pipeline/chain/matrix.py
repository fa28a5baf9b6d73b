"""The axes of a recipe's matrix, and where on them the runs of its stages lie."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import product
from typing import Any

# axis -> the number of one of its values; an axis that is not there is not fixed.
Point = Mapping[str, int]
Axes = dict[str, list[dict[str, str]]]


def read_matrix(content: Any, stages: Collection[str], problems: list[str]) -> Axes:
    """The axes of a recipe: of each value what its placeholders stand for, the axis's own name first."""
    if not isinstance(content, dict):
        problems.append(f"matrix: expected {{axis: [values]}}, got {content!r}")
        return {}
    axes: Axes = {}
    seen: set[str] = set()
    for axis, entries in content.items():
        found: list[str] = []
        values = _read_axis(axis, entries, found)
        names = set(values[0]) if values else {str(axis)}
        found += [f"{{{each}}} is a stage, the chain's folder or of another axis too: rename it"
                  for each in sorted(names & (set(stages) | seen | {"output_dir"}))]  # fmt: skip
        seen |= names
        problems += [f"matrix: {axis}: {each}" for each in found]
        if not found:
            axes[str(axis)] = values
    return axes


def _read_axis(axis: Any, entries: Any, found: list[str]) -> list[dict[str, str]]:
    if not isinstance(axis, str) or not re.fullmatch(r"[A-Za-z]\w*", axis):
        found.append("an axis has a name of letters, digits and _")
        return []
    if not isinstance(entries, list) or not entries:
        found.append(f"expected a list of values, got {entries!r}")
        return []
    values = [dict(each) if isinstance(each, dict) else {axis: each} for each in entries]
    for value in values:
        if set(value) != set(values[0]) or axis not in value:
            found.append(f"every value needs the same names and {axis} among them, got {value!r}")
        elif not all(_is_plain(each) for each in value.values()):
            found.append(f"a value is a whole number, a fraction or a text without spaces and slashes, got {value!r}")
    own = [str(value.get(axis)) for value in values]
    if len(set(own)) < len(own):
        found.append(f"a value stands twice in {', '.join(own)}")
    return [{axis: str(value.get(axis))} | {name: str(each) for name, each in value.items()} for value in values]


def _is_plain(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    return bool(re.fullmatch(r"[\w.+-]+", str(value)))


def axes_named(axes: Axes, names: Collection[str]) -> list[str]:
    """The axes of which a placeholder is among `names`, in the order of the matrix."""
    return [axis for axis, values in axes.items() if not set(values[0]).isdisjoint(names)]


def points(axes: Axes, over: Collection[str], fixed: Point | None = None) -> Iterator[dict[str, int]]:
    """Every combination of values of the axes `over`, those of `fixed` held; in the order of the matrix, the last axis
    first to change."""
    wanted = [axis for axis in axes if axis in over]
    choices = [[fixed[axis]] if fixed and axis in fixed else range(len(axes[axis])) for axis in wanted]
    for each in product(*choices):
        yield dict(zip(wanted, each, strict=True))


def placeholders(axes: Axes, point: Point) -> dict[str, str]:
    """What the placeholders of the fixed axes stand for."""
    return {name: value for axis, number in point.items() for name, value in axes[axis][number].items()}


def suffix(axes: Axes, point: Point) -> str:
    """What a folder's name ends in."""
    return "".join(f"-{axis}{axes[axis][point[axis]][axis]}" for axis in axes if axis in point)
