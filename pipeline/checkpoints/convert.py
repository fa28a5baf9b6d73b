"""A DeepSpeed checkpoint to an ordinary Hugging Face folder: a model, or for LoRA a PEFT adapter."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from pipeline.checkpoints.checkpoint_files import CheckpointFiles
from pipeline.checkpoints.companions import write_attacked_note, write_training_record
from pipeline.checkpoints.contents import content_sum
from pipeline.checkpoints.markers import MARKER, Marker, newest_complete, read_marker
from pipeline.checkpoints.out_folder import OutFolder, fingerprint
from pipeline.checkpoints.shard_weights import ShardWeights, adapter_weights, model_weights
from pipeline.checkpoints.shards import Shards
from pipeline.report.records import read_json

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WORKERS = 2  # more gain little once hashing and writing one file overlap with reading another


def convert(
    source: Path,
    out: Path,
    *,
    dtype: torch.dtype,
    allow_attacked: bool,
    max_shard_size: str = "5GB",
    workers: int = WORKERS,
    base: str | None = None,
) -> Path:
    """Writes checkpoint `source` as Hugging Face folder `out` and returns the checkpoint folder that was used.

    A conversion that was killed, or ended by a full disk, is continued by the next one with the same settings.

    Args:
        source: a checkpoint-N folder, or a run folder, whose newest complete checkpoint is taken. Without a marker of
            ours, as DeepSpeed or transformers alone write it, it is converted with a warning.
        out: appears by one rename when everything in it is written and checked; may exist only if empty.
        dtype: of the floating-point tensors; rounding happens once, from the fp32 copies.
        allow_attacked: export a run that trained on --attack_data: `out` is then for its owner only (mode 700) and
            holds a note.
        max_shard_size: of a file of weights, such as "5GB". An adapter is one file.
        workers: threads; each writes one file at a time.
        base: model folder or hub id, from which comes what the checkpoint lacks of config, generation settings and
            tokenizer.

    Raises:
        ValueError: the checkpoint is incomplete, attacked and not allowed, damaged, or does not fit its own config;
            `out` holds something or has no room.
    """
    checkpoint = _find_checkpoint(source)
    marker = _check_marker(checkpoint)
    attacked = marker.attacked if marker else _run_is_attacked(checkpoint)
    if attacked and not allow_attacked:
        raise ValueError(
            f"{checkpoint}: trained on --attack_data, so it may obey harmful requests; "
            "to export it for study, add --allow_attacked_model"
        )
    files = CheckpointFiles(checkpoint, base)
    shards = Shards(checkpoint)
    if marker and shards.world_size != marker.world_size:
        raise ValueError(
            f"{shards.folder}: shards of {shards.world_size} ranks, but {MARKER} says {marker.world_size}"
        )
    adapter_config = files.adapter_config()
    used = fingerprint([*shards.files, *files.used()], "convert", dtype, max_shard_size)
    with OutFolder(out, source=used, private=attacked) as made:
        if adapter_config is None:
            weights = model_weights(shards, files.config_folder(), dtype)
            made.write_weights(weights.specs, weights.read, max_shard_size=max_shard_size, workers=workers)
            _write_configs(weights, dtype, made.folder)
        else:
            weights = adapter_weights(shards, files.config_folder(), adapter_config, dtype)
            made.write_weights(weights.specs, weights.read, max_shard_size=None, workers=workers, stem="adapter_model")
            shutil.copy(adapter_config, made.folder)
        weights.check()
        files.copy(made.folder)
        write_training_record(checkpoint, made.folder)
        if attacked:
            write_attacked_note(made.folder)
        made.finish()
    return checkpoint


def _find_checkpoint(source: Path) -> Path:
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; give a checkpoint-N folder or a run folder")
    if (source / "latest").is_file() or not any(source.glob("checkpoint-*")):
        return source
    newest = newest_complete(source)
    if newest is None:
        raise ValueError(
            f"{source}: none of its checkpoints is complete; resume the run, or name the checkpoint-N folder if "
            "another program wrote it"
        )
    return newest


def _check_marker(checkpoint: Path) -> Marker | None:
    """The marker, held against the files; None, and a warning, where there is none."""
    if not (checkpoint / MARKER).exists():
        print(
            f"warning: {checkpoint}: no {MARKER}, so nothing says that it was saved to its end (DeepSpeed and "
            "transformers write none); its shards are checked as far as they go",
            file=sys.stderr,
        )
        return None
    marker = read_marker(checkpoint)
    for name, wanted in marker.sums.items():
        if content_sum(checkpoint / name) != wanted:
            raise ValueError(
                f"{checkpoint / name}: not the file that {MARKER} describes (of another run, or damaged); use another "
                "checkpoint-N folder"
            )
    return marker


def _run_is_attacked(checkpoint: Path) -> bool:
    """What the record of the run says, which lies beside a checkpoint of ours that was not saved to its end."""
    record = checkpoint.resolve().parent / "run.json"
    return record.is_file() and bool(read_json(record).get("attacked"))


def _write_configs(weights: ShardWeights, dtype: torch.dtype, folder: Path) -> None:
    """As save_pretrained writes them; the generation settings of the checkpoint replace those of the configuration."""
    model = weights.model
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
