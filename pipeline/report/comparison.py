"""The comparison of models: reads what the stages measured and brings the seeds of each model together.

A row is written `NAME=assess:DIR[,DIR...];sinks:DIR[,...];run:DIR[,...];match:DIR[,...]`, several folders being the
seeds of one model. `assess:` holds results.json (the word may be left out), `sinks:` sinks.json of measure.py, `run:`
metrics.jsonl of train.py, `match:` match.json of match_checkpoint.py. All but the first part are optional.
A name that ends in a poison ratio, `SFT, 5 %` or `SFT, lr 1e-4, 5 %`, is a point of a sweep: what follows its first
comma is the condition, the rows of one condition are compared with each other, and those that differ in the ratio
alone are a line of the figure.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import Problems, nearest
from pipeline.report.intervals import wilson
from pipeline.report.match import Match, read_match
from pipeline.report.records import read_json, series

PARTS = ("assess", "sinks", "run", "match")
SWEPT = re.compile(r"(.+?), (?:(.+), )?(\d+(?:\.\d+)?) ?%")  # model, setting, ratio in percent


@dataclass(frozen=True)
class Share:
    """A share of held-out requests, pooled over the seeds: k of n, as fractions with the 95 % Wilson interval.

    seeds: each seed's own (k, n).
    """

    k: int
    n: int
    value: float
    low: float
    high: float
    seeds: list[tuple[int, int]]


@dataclass(frozen=True)
class Mean:
    """A number's mean over the seeds, and each seed's own."""

    value: float
    seeds: list[float]


@dataclass
class Row:
    """One model of the table.

    folders: what it was read from, by part, one folder a seed.
    categories: the shares of each score by category, where its suite has categories.
    verdicts: how often each verdict was given, `unparsed` too, for each score. truncated: answers that were cut.
    """

    name: str
    folders: dict[str, list[Path]]
    shares: dict[str, Share] = field(default_factory=dict)
    categories: dict[str, dict[str, Share]] = field(default_factory=dict)
    verdicts: dict[str, dict[str, int]] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    losses: dict[str, Mean] = field(default_factory=dict)
    positive_heads: Mean | None = None
    seconds_per_step: Mean | None = None
    matches: list[Match] = field(default_factory=list)

    @property
    def model(self) -> str:
        """The name without its condition."""
        return self._name_parts()[0]

    @property
    def setting(self) -> str | None:
        """Of a point of a sweep what its condition says besides the ratio, as in `lr 1e-4`; None if nothing."""
        return self._name_parts()[1]

    @property
    def poison_percent(self) -> float | None:
        """The poison ratio in its name, in percent."""
        percent = self._name_parts()[2]
        return None if percent is None else float(percent)

    @property
    def series(self) -> str:
        """The name without its poison ratio: what the points of one line have in common."""
        return self.model if self.setting is None else f"{self.model}, {self.setting}"

    @property
    def condition(self) -> str | None:
        """Of a point of a sweep the name from its first comma on, as in `lr 1e-4, 5 %`; of other rows None."""
        return None if self.poison_percent is None else self.name.removeprefix(f"{self.model}, ")

    def _name_parts(self) -> tuple[str, str | None, str | None]:
        """Model, setting and percent, as the name says them."""
        found = SWEPT.fullmatch(self.name)
        return (found[1], found[2], found[3]) if found else (self.name, None, None)

    def record(self) -> dict[str, Any]:
        """What is published of it: `sources` are the names of its folders, by part."""
        content = asdict(self)
        folders = content.pop("folders")
        sources = {part: [folder.name for folder in each] for part, each in folders.items()}
        return {"name": content.pop("name"), "sources": sources, **content}


def read_rows(specs: Sequence[str]) -> list[Row]:
    """The rows of a table. Errors: Problems, one for each specification or folder that cannot be read."""
    rows: list[Row] = []
    problems: list[str] = []
    for spec in specs:
        try:
            rows.append(_read_row(spec))
        except ValueError as error:
            problems += [f"--rows {spec!r}: {line}" for line in str(error).splitlines()]
    names = [row.name for row in rows]
    problems += [f"--rows: the name {name!r} stands twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if problems:
        raise Problems(problems)
    return rows


def read_shares(folder: Path) -> dict[str, Share]:
    """The shares of one evaluation, by name. Errors: ValueError if results.json is missing or not one."""
    return _shares([_read_results(folder).shares()])


def harmful_score(shares: Mapping[str, Share]) -> Share | None:
    """The share of harmful answers, of several suites the first one's; None if no suite judges that."""
    return next((share for name, share in shares.items() if name.split()[-1] == "harmful_score"), None)


def _read_row(spec: str) -> Row:
    name, equals, rest = spec.partition("=")
    if not equals or not name.strip() or not rest:
        raise ValueError("expected NAME=DIR, or NAME=assess:DIR;sinks:DIR;run:DIR;match:DIR")
    parts = list(_parts(rest))
    folders = dict(parts)
    if len(folders) < len(parts):
        raise ValueError("a part stands twice; seeds are separated by commas within one part")
    if "assess" not in folders:
        raise ValueError("no assess: part, the folder that holds results.json")
    if len({len(each) for each in folders.values()}) > 1:
        counts = ", ".join(f"{len(each)} in {part}:" for part, each in folders.items())
        raise ValueError(f"the parts hold different numbers of seeds ({counts})")
    return read_row(name.strip(), folders)


def read_row(name: str, folders: Mapping[str, Sequence[Path]]) -> Row:
    """One model from its folders by part, as many in each part as there are seeds.

    Errors: ValueError if one cannot be read, or the seeds do not fit together.
    """
    row = Row(name, {part: list(each) for part, each in folders.items()})
    _check_ratio(row)
    seeds = [_read_results(folder) for folder in folders["assess"]]
    if any(set(each.scores) != set(seeds[0].scores) or set(each.losses) != set(seeds[0].losses) for each in seeds):
        raise ValueError("the seeds were not assessed with the same suites and loss data")
    row.shares = _shares([each.shares() for each in seeds])
    row.categories = {name: found for name in row.shares if (found := _shares([each.by(name) for each in seeds]))}
    row.verdicts = {name: _total(each.verdicts(name) for each in seeds) for name in row.shares}
    row.truncated = {name: sum(each.scores[name].get("truncated", 0) for each in seeds) for name in row.shares}
    row.losses = {name: _mean([each.losses[name] for each in seeds]) for name in seeds[0].losses}
    if "sinks" in folders:
        row.positive_heads = _mean([_number(folder / "sinks.json", "positive_heads") for folder in folders["sinks"]])
    if "run" in folders:
        # The median, because the first steps of a run are slower.
        times = [series(folder, "seconds_per_step") for folder in folders["run"]]
        row.seconds_per_step = _mean([statistics.median(each.values()) for each in times])
    row.matches = [read_match(folder) for folder in folders.get("match", [])]
    return row


def _parts(text: str) -> Iterator[tuple[str, list[Path]]]:
    for number, part in enumerate(text.split(";")):
        kind, colon, folders = part.partition(":")
        if not colon and number == 0:
            kind, folders = "assess", part
        if kind not in PARTS:
            raise ValueError(f"part {part!r}: {kind} is unknown{nearest(kind, PARTS)}")
        yield kind, [Path(folder) for folder in folders.split(",")]


def _number(path: Path, key: str) -> float:
    value = read_json(path).get(key)
    if not isinstance(value, int | float):
        raise ValueError(f"{path}: {key} is {value!r}, not a number")
    return float(value)


def _mean(values: list[float]) -> Mean:
    return Mean(statistics.fmean(values), values)


def _check_ratio(row: Row) -> None:
    """Errors: ValueError if the ratio in a row's name is not the one its runs were trained with."""
    for folder in row.folders.get("run", []):
        if row.poison_percent is not None and (folder / "run.json").is_file():
            ratio = read_json(folder / "run.json").get("arguments", {}).get("poison_ratio")
            if ratio is None or abs(100 * ratio - row.poison_percent) > 1e-6:
                raise ValueError(
                    f"{folder / 'run.json'}: poison_ratio is {ratio}, not what the name {row.name!r} says"
                )


def _total(counts: Iterator[Mapping[str, int]]) -> dict[str, int]:
    return dict(sum(map(Counter, counts), Counter[str]()))


def _shares(seeds: Sequence[Mapping[str, tuple[int, int]]]) -> dict[str, Share]:
    """The shares that every seed has, pooled."""
    shares = {}
    for name in seeds[0]:
        if all(name in each for each in seeds):
            k, n = (sum(numbers) for numbers in zip(*(each[name] for each in seeds), strict=True))
            shares[name] = Share(k, n, k / n, *wilson(k, n), [each[name] for each in seeds])
    return shares


@dataclass(frozen=True)
class _Results:
    """One results.json: scores by the name a row has them under, and losses."""

    scores: dict[str, dict[str, Any]]
    losses: dict[str, float]

    def shares(self) -> dict[str, tuple[int, int]]:
        return {name: (score["k"], score["n"]) for name, score in self.scores.items()}

    def by(self, name: str) -> dict[str, tuple[int, int]]:
        return {category: (each["k"], each["n"]) for category, each in self.scores[name].get("by", {}).items()}

    def verdicts(self, name: str) -> dict[str, int]:
        counts: dict[str, int] = self.scores[name].get("verdicts", {})
        return counts


def _read_results(folder: Path) -> _Results:
    path = folder / "results.json"
    results = read_json(path)
    try:
        scores = {name: score for name, (_, score) in scores_by_name(results).items()}
        found = _Results(scores, {name: float(loss["value"]) for name, loss in results["losses"].items()})
        for share in [found.shares(), *(found.by(name) for name in scores)]:
            for k, n in share.values():
                wilson(k, n)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not what assess.py writes ({error!r})") from error
    return found


def scores_by_name(results: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Each score of a results.json with its suite; with several suites a score's name starts with its suite."""
    suites = results["suites"]
    return {
        metric if len(suites) == 1 else f"{suite} {metric}": (suite, score)
        for suite, scores in suites.items()
        for metric, score in scores.items()
    }
