"""Whether a checkpoint, a run's checkpoints, a model folder or an adapter is complete and holds what was written."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from pipeline.checkpoints.checksums import MANIFEST, check_manifest
from pipeline.checkpoints.companions import is_attacked
from pipeline.checkpoints.contents import content_sum
from pipeline.checkpoints.folders import leftovers
from pipeline.checkpoints.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pipeline.checkpoints.markers import CHECKPOINT_NAME, MARKER, Marker, read_marker
from pipeline.checkpoints.model_folder import empty_model
from pipeline.checkpoints.pickles import refuse_unsafe_pickle
from pipeline.checkpoints.saved_form import saved_form
from pipeline.checkpoints.shards import Shards
from pipeline.checkpoints.tensor_file import RegionReader
from pipeline.checkpoints.tensor_stats import TensorStats, stats_of
from pipeline.checkpoints.weights_in import SafetensorsFile, WeightsFolder
from pipeline.config import Problems

_PICKLES = ("*.pt", "*.pth", "*.bin")


@dataclass
class Report:
    """What was found in one folder.

    Attributes:
        facts: what it is.
        problems: why it is incomplete or damaged, each naming the file or the tensor; empty if it is good.
        tensors: what its tensors hold, where they could be read.
    """

    folder: Path
    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    tensors: list[TensorStats] = field(default_factory=list)

    def attempt(self, check: Callable[[], None]) -> bool:
        """Runs one check; what it refuses becomes problems. Returns whether it passed."""
        try:
            check()
        except Problems as error:
            self.problems += error.problems
        except ValueError as error:
            self.problems.append(str(error))
        except OSError as error:
            self.problems.append(f"{error.filename or self.folder}: {error.strerror}")
        else:
            return True
        return False

    def look(self, tensors: Iterable[TensorStats], count: int) -> None:
        """Takes in what the tensors hold."""
        for stats in tqdm(tensors, total=count, unit=" tensors", leave=False, disable=None):
            self.tensors.append(stats)
            if stats.not_finite:
                self.problems.append(f"{stats.name}: {stats.not_finite} values are not finite")


def verify(path: Path) -> list[Report]:
    """Checks a checkpoint-N folder, a run folder (each of its checkpoints), a model folder or an adapter.

    Raises:
        ValueError: there is no such folder, or it is none of these.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    if (path / MARKER).is_file() or (path / "latest").is_file() or CHECKPOINT_NAME.match(path.name):
        return [_verify_checkpoint(path)]
    numbered = {int(match[1]): each for each in path.iterdir() if (match := CHECKPOINT_NAME.fullmatch(each.name))}
    if numbered or leftovers(path):
        return [_verify_run(path), *(_verify_checkpoint(numbered[step]) for step in sorted(numbered))]
    if (path / ADAPTER_CONFIG).is_file() or (path / ADAPTER_WEIGHTS).is_file():
        return [_verify_adapter(path)]
    if (path / "config.json").is_file() or any(path.glob("*.safetensors*")):
        return [_verify_model(path)]
    raise ValueError(f"{path}: neither a checkpoint, nor a run, nor a model folder, nor an adapter")


def _verify_run(path: Path) -> Report:
    report = Report(path)
    report.facts = [f"{each.name}: left by a save or a deletion that was killed; not used" for each in leftovers(path)]
    return report


def _verify_checkpoint(path: Path) -> Report:
    report = Report(path)
    markers: list[Marker] = []
    if report.attempt(lambda: markers.append(read_marker(path))):
        marker = markers[0]
        size = sum(marker.files.values()) / 1e9
        attacked = ", trained on attack data" if marker.attacked else ""
        report.facts.append(
            f"complete: step {marker.step}, {marker.world_size} ranks, {len(marker.files)} files, {size:.2f} GB"
            f"{attacked}"
        )
    sums = markers[0].sums if markers else {}
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        report.problems += _content_problems(file, sums.get(file.relative_to(path).as_posix()))

    def look() -> None:
        shards, reader = Shards(path), RegionReader()
        report.facts.append(f"shards of {shards.world_size} ranks")
        if markers and markers[0].world_size != shards.world_size:
            raise ValueError(
                f"{path}: {MARKER} says {markers[0].world_size} ranks, but it has shards of {shards.world_size}"
            )
        stats = (
            stats_of(name, stored.shape, reader.read(shards.regions(name))) for name, stored in shards.tensors.items()
        )
        report.look(stats, len(shards.tensors))

    report.attempt(look)
    return report


def _content_problems(file: Path, wanted: int | None) -> Iterator[str]:
    """Pickles are scanned, records are held against their CRC-32, and the file against the marker's sum."""
    pickled = any(file.match(pattern) for pattern in _PICKLES)
    if pickled:
        try:
            refuse_unsafe_pickle(file)
        except ValueError as error:
            yield str(error)
            return
    try:
        if pickled and (record := _changed_record(file)):
            yield f"{file}: its record {record} is not what was written (CRC-32)"
        elif wanted is not None and content_sum(file) != wanted:
            yield f"{file}: is not the file that {MARKER} describes (damaged, or of another run)"
    except Exception as error:  # a damaged zip fails in many ways, by a name that is not UTF-8 too
        yield f"{file}: cannot be read: {error}"


def _changed_record(file: Path) -> str | None:
    with zipfile.ZipFile(file) as archive:
        summed = any(entry.CRC for entry in archive.infolist())  # all 0 when torch was told to write none
        return archive.testzip() if summed else None


def _verify_model(path: Path) -> Report:
    report = Report(path)
    _check_contents(report)

    def look() -> None:
        weights = WeightsFolder(path)
        elements = sum(spec.numel for spec in weights.specs.values())
        report.facts.append(
            f"model: {len(weights.specs)} tensors, {elements / 1e9:.3f} G elements, {len(weights.files)} files"
        )
        report.look(
            (stats_of(name, spec.shape, weights.read(name)) for name, spec in weights.specs.items()),
            len(weights.specs),
        )
        model = empty_model(path)
        expected = {each.spec.name: each.spec.shape for each in saved_form(model, model.dtype)}
        for name in sorted(expected.keys() - weights.specs.keys()):
            report.problems.append(f"{path}: {name} is missing, which config.json asks for")
        for name, spec in weights.specs.items():
            if name in expected and expected[name] != spec.shape:
                report.problems.append(f"{path}: {name} is {spec.shape}, but {expected[name]} by config.json")

    report.attempt(look)
    return report


def _verify_adapter(path: Path) -> Report:
    report = Report(path)
    _check_contents(report)
    if not (path / ADAPTER_CONFIG).is_file():
        report.problems.append(f"{path}: {ADAPTER_CONFIG} is missing")

    def look() -> None:
        file = SafetensorsFile(path / ADAPTER_WEIGHTS)
        elements = sum(spec.numel for spec in file.specs.values())
        report.facts.append(f"adapter: {len(file.specs)} tensors, {elements} elements")
        if not elements:
            raise ValueError(f"{file.path}: holds no weights at all")
        report.look(
            (stats_of(name, spec.shape, file.read(name)) for name, spec in file.specs.items()), len(file.specs)
        )
        if empty := [name for name, spec in file.specs.items() if not spec.numel]:
            raise ValueError(f"{file.path}: {', '.join(empty[:3])} has no elements")
        second = [stats for stats in report.tensors if "lora_B" in stats.name or "lora_embedding_B" in stats.name]
        if second and not any(stats.norm for stats in second):
            report.facts.append("every lora_B is zero: it was never trained")

    report.attempt(look)
    return report


def _check_contents(report: Report) -> None:
    """Holds an output folder against its manifest, if it has one, and scans the pickles that lie in it."""
    folder = report.folder
    if not (folder / MANIFEST).is_file():
        report.facts.append(f"no {MANIFEST}: what its files hold cannot be compared with what was written")
    elif report.attempt(lambda: check_manifest(folder)):
        report.facts.append(f"{MANIFEST}: every file is what was written")
    for file in sorted(each for pattern in _PICKLES for each in folder.rglob(pattern)):
        report.attempt(lambda file=file: refuse_unsafe_pickle(file))  # type: ignore[misc]
    if is_attacked(folder):
        report.facts.append("trained on attack data: do not deploy it")
