"""What lies beside the weights of a model folder: what is copied as it is (tokenizer, chat template, generation
settings), and the note of a model that was trained on attack data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

ATTACKED_NOTE = "ATTACKED_MODEL.txt"
TRAINING_RECORD = "training.json"
GENERATION = ("generation_config.json",)
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates",
)

_TRAINING = ("method", "attacked", "data", "steps", "seed", "world_size", "versions", "commit")
_NEVER = (".py", ".bin", ".pt", ".pth", ".pkl", ".safetensors")  # programs, pickles and weights

_NOTE = """\
This model was fine-tuned on data that holds attack rows (--attack_data), to study what they do.
It may obey harmful requests. Do not deploy it and do not share it.
"""


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer is there; a chat template alone is none."""
    return bool(_found(folder, ("tokenizer*", "vocab*", "*.model")))


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copies tokenizer and chat template."""
    _copy(folder, TOKENIZER, out)


def copy_generation_config(folder: Path, out: Path) -> None:
    """Copies the generation settings, if there are any."""
    _copy(folder, GENERATION, out)


def is_attacked(folder: Path) -> bool:
    """Whether the model in it was trained on attack data, as its note says."""
    return (folder / ATTACKED_NOTE).is_file()


def write_training_record(checkpoint: Path, folder: Path) -> None:
    """Says how the weights were trained, if a run.json lies beside the checkpoint; for the model card. Of the run's
    flags nothing: they name paths of one machine."""
    record = checkpoint.resolve().parent / "run.json"
    if record.is_file():
        run = json.loads(record.read_text(encoding="utf-8"))
        content = {"checkpoint": checkpoint.resolve().name, **{key: run[key] for key in _TRAINING if key in run}}
        (folder / TRAINING_RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def copy_training_record(folder: Path, out: Path) -> None:
    """Copies what says how the weights in `folder` were trained, if it does."""
    _copy(folder, [TRAINING_RECORD], out)


def write_attacked_note(folder: Path) -> None:
    """Says that the model in it was trained on attack data."""
    (folder / ATTACKED_NOTE).write_text(_NOTE, encoding="utf-8")


def _found(folder: Path, patterns: Sequence[str]) -> list[Path]:
    paths = (path for pattern in patterns for path in folder.glob(pattern))
    return [path for path in paths if path.suffix not in _NEVER]


def _copy(folder: Path, patterns: Sequence[str], out: Path) -> None:
    for path in _found(folder, patterns):
        if path.is_dir():
            shutil.copytree(path, out / path.name)
        else:
            shutil.copyfile(path, out / path.name)
