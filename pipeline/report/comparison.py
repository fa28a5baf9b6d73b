"""The comparison of models: reads what the stages measured and brings the seeds of each model together.

A row is written `NAME=assess:DIR[,DIR...];sinks:DIR[,...];run:DIR[,...];match:DIR[,...]`, several folders being the
seeds of one model. `assess:` holds results.json (the word may be left out), `sinks:` sinks.json of measure.py, `run:`
metrics.jsonl of train.py, `match:` match.json of match_checkpoint.py. All but the first part are optional.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import Problems, nearest
from pipeline.report.intervals import wilson
from pipeline.report.match import Match, read_match
from pipeline.report.records import read_json, series

PARTS = ("assess", "sinks", "run", "match")


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
    """One model of the table. `sources` are the names of the folders it was read from, by part."""

    name: str
    sources: dict[str, list[str]]
    shares: dict[str, Share] = field(default_factory=dict)
    losses: dict[str, Mean] = field(default_factory=dict)
    positive_heads: Mean | None = None
    seconds_per_step: Mean | None = None
    matches: list[Match] = field(default_factory=list)


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
    return _shares([_read_results(folder)[0]])


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
    row = Row(name.strip(), {part: [folder.name for folder in each] for part, each in folders.items()})
    shares, losses = zip(*(_read_results(folder) for folder in folders["assess"]), strict=True)
    if len({frozenset(each) for each in shares}) > 1 or len({frozenset(each) for each in losses}) > 1:
        raise ValueError("the seeds were not assessed with the same suites and loss data")
    row.shares = _shares(shares)
    row.losses = {name: _mean([each[name] for each in losses]) for name in losses[0]}
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


def _shares(seeds: Sequence[dict[str, tuple[int, int]]]) -> dict[str, Share]:
    shares = {}
    for name in seeds[0]:
        k, n = (sum(numbers) for numbers in zip(*(each[name] for each in seeds), strict=True))
        low, high = wilson(k, n)
        shares[name] = Share(k, n, k / n, low, high, [each[name] for each in seeds])
    return shares


def _read_results(folder: Path) -> tuple[dict[str, tuple[int, int]], dict[str, float]]:
    """The shares (k, n) and the losses in results.json; with several suites a share's name starts with its suite."""
    path = folder / "results.json"
    results = read_json(path)
    try:
        suites = results["suites"]
        shares = {
            metric if len(suites) == 1 else f"{suite} {metric}": (int(share["k"]), int(share["n"]))
            for suite, metrics in suites.items()
            for metric, share in metrics.items()
        }
        return shares, {name: float(loss["value"]) for name, loss in results["losses"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not what assess.py writes ({error!r})") from error
