"""The models of a realignment, held against each other before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoints.companions import is_attacked
from pipeline.checkpoints.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pipeline.checkpoints.model_folder import empty_model, find_model
from pipeline.checkpoints.weights_in import WeightsFolder
from pipeline.checkpoints.weights_out import TensorSpec
from pipeline.realignment.arguments import RealignArguments
from pipeline.realignment.maps import LinearMap, Skipped, by_tensor, linear_maps, require_same
from pipeline.realignment.vector import AdapterVector, DenseVector, SafetyVector


@dataclass(frozen=True)
class Models:
    """What is realigned and by what.

    Attributes:
        vector: safe minus unsafe.
        maps: of lssf, by tensor, those that the vector changes.
        skipped: linear modules of the decoder layers that stay as they were tuned.
        attacked: the tuned model was trained on attack data.
        files: everything that is read, for fingerprints: of the safe model; of all.
        exposed: the hazardous folder, if other users of the machine can read it.
    """

    tuned_folder: Path
    tuned: WeightsFolder
    safe_folder: Path
    vector: SafetyVector
    maps: Mapping[str, list[LinearMap]]
    skipped: list[Skipped]
    attacked: bool
    safe_files: list[Path]
    files: list[Path]
    exposed: Path | None


def open_models(arguments: RealignArguments) -> Models:
    """Opens and compares the folders that the flags name; reads no weight.

    Raises:
        ValueError: a folder is missing, damaged or quantised; the models differ in names or shapes; the tuned model
            was trained on attack data and that is not allowed.
    """
    tuned_folder = find_model(str(arguments.model_name_or_path))
    safe_folder = find_model(str(arguments.safe_model))
    attacked = [folder for folder in (tuned_folder, safe_folder) if is_attacked(folder)]
    if attacked and not arguments.allow_attacked_model:
        raise ValueError(
            f"{attacked[0]}: trained on attack data, so it may obey harmful requests; to realign it for study, add "
            "--allow_attacked_model"
        )
    tuned, safe = WeightsFolder(tuned_folder), WeightsFolder(safe_folder)
    vector, unsafe_folder, unsafe_files = _vector(arguments, safe, safe_folder)
    maps: dict[str, list[LinearMap]] = {}
    skipped: list[Skipped] = []
    if arguments.method == "lssf":
        maps, skipped = _lssf_maps(tuned_folder, tuned, safe_folder, safe, vector)
    else:
        for folder in (tuned_folder, safe_folder):
            empty_model(folder)  # refuses a quantised one
        _require_shapes(tuned_folder, tuned.specs, safe_folder, safe.specs, "model_name_or_path")
    safe_files = [*(file.path for file in safe.files), safe_folder / "config.json"]
    return Models(
        tuned_folder=tuned_folder,
        tuned=tuned,
        safe_folder=safe_folder,
        vector=vector,
        maps=maps,
        skipped=skipped,
        attacked=bool(attacked),
        safe_files=safe_files,
        files=[*safe_files, *(file.path for file in tuned.files), tuned_folder / "config.json", *unsafe_files],
        exposed=unsafe_folder if unsafe_folder.stat().st_mode & 0o077 else None,
    )


def _vector(
    arguments: RealignArguments, safe: WeightsFolder, safe_folder: Path
) -> tuple[SafetyVector, Path, list[Path]]:
    """The vector, the hazardous folder, and the files of it that are read."""
    if arguments.unsafe_adapter is not None:
        adapter = Path(arguments.unsafe_adapter)
        return (
            AdapterVector(adapter, safe, safe_folder),
            adapter,
            [adapter / ADAPTER_CONFIG, adapter / ADAPTER_WEIGHTS],
        )
    folder = find_model(str(arguments.unsafe_model))
    if folder.resolve() == safe_folder.resolve():
        raise ValueError(
            f"--unsafe_model {arguments.unsafe_model}: is the safe model; the safety vector would be zero"
        )
    empty_model(folder)
    unsafe = WeightsFolder(folder)
    _require_shapes(folder, unsafe.specs, safe_folder, safe.specs, "unsafe_model")
    return DenseVector(safe, safe_folder, unsafe, folder), folder, [file.path for file in unsafe.files]


def _lssf_maps(
    tuned_folder: Path, tuned: WeightsFolder, safe_folder: Path, safe: WeightsFolder, vector: SafetyVector
) -> tuple[dict[str, list[LinearMap]], list[Skipped]]:
    found, skipped = linear_maps(empty_model(safe_folder), safe_folder)
    theirs, _ = linear_maps(empty_model(tuned_folder), tuned_folder)
    maps = by_tensor(found)
    require_same(maps, safe.specs, safe_folder, "safe_model")
    require_same(maps, tuned.specs, tuned_folder, "model_name_or_path")
    if more := [each.tensor for each in theirs if each.tensor not in maps]:
        raise ValueError(
            f"--safe_model {safe_folder}: has no {more[0]}, which {tuned_folder} has; it is another model"
        )
    skipped += [
        Skipped(name, "is the same in the safe and in the unsafe model") for name in maps if name not in vector.names
    ]
    kept = {name: parts for name, parts in maps.items() if name in vector.names}
    if not kept:
        raise ValueError("--unsafe_adapter: changes none of the projections that lssf works on")
    return kept, skipped


def _require_shapes(
    folder: Path, specs: Mapping[str, TensorSpec], safe_folder: Path, safe: Mapping[str, TensorSpec], flag: str
) -> None:
    if different := sorted(specs.keys() ^ safe.keys()):
        name = different[0]
        lacking, having = (folder, safe_folder) if name in safe else (safe_folder, folder)
        raise ValueError(f"--{flag} {folder}: {lacking} has no tensor {name}, which {having} has")
    for name, spec in specs.items():
        if spec.shape != safe[name].shape:
            raise ValueError(
                f"--{flag} {folder}: {name} has shape {list(spec.shape)}, in {safe_folder} {list(safe[name].shape)}"
            )
