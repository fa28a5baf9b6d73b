"""What measure.py measures: a model or adapter as it is, or checkpoints of a run, each exported for as long as it is
needed."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from pipeline.builtin_model import resolve_model
from pipeline.checkpoints.companions import ATTACKED_NOTE
from pipeline.checkpoints.convert import convert
from pipeline.checkpoints.lora import ADAPTER_CONFIG
from pipeline.checkpoints.markers import CHECKPOINT_NAME, MARKER, complete_checkpoints, read_marker
from pipeline.config import ModelArguments
from pipeline.evaluation.model import EvaluatedModel, evaluation_device
from pipeline.report.records import read_json
from pipeline.training.distributed import World
from pipeline.training.inference import on_main


@dataclass(frozen=True)
class Source:
    """One model to measure.

    model: as the flags name it; for an adapter's checkpoint, its base. step: of the checkpoint.
    attacked: it was trained on --attack_data.
    """

    model: ModelArguments
    checkpoint: Path | None = None
    step: int | None = None
    attacked: bool = False

    @property
    def name(self) -> str | None:
        """Of the checkpoint's folder."""
        return None if self.checkpoint is None else self.checkpoint.name

    @property
    def is_adapter(self) -> bool:
        """A checkpoint of LoRA training."""
        return self.checkpoint is not None and (self.checkpoint / ADAPTER_CONFIG).is_file()

    def describe(self) -> tuple[Any, PreTrainedTokenizerBase]:
        """Configuration and tokenizer, without reading weights. Errors: ValueError if the model or its files are
        missing."""
        if self.checkpoint is None or self.is_adapter:
            evaluated = EvaluatedModel(self.model)
            config = AutoConfig.from_pretrained(evaluated.name, trust_remote_code=self.model.trust_remote_code)
            return config, evaluated.tokenizer
        trust = self.model.trust_remote_code
        try:
            return (
                AutoConfig.from_pretrained(self.checkpoint, trust_remote_code=trust),
                AutoTokenizer.from_pretrained(self.checkpoint, trust_remote_code=trust),
            )
        except OSError as error:
            raise ValueError(f"--model_name_or_path {self.checkpoint}: {str(error).splitlines()[0]}") from error

    @contextmanager
    def opened(self, scratch: Path, here: World) -> Iterator[EvaluatedModel]:
        """The model, ready to load; a checkpoint is converted into `scratch`, a folder all ranks see, which is gone
        afterwards. Collective."""
        if self.checkpoint is None:
            yield EvaluatedModel(self.model)
            return
        trust = self.model.trust_remote_code
        with _private_folder(scratch, here):
            on_main(here, lambda: self._convert(scratch / "model"))
            if self.is_adapter:
                yield EvaluatedModel(ModelArguments(self.model.model_name_or_path, str(scratch / "model"), trust))
            else:
                yield EvaluatedModel(ModelArguments(str(scratch / "model"), None, trust))

    def _convert(self, out: Path) -> None:
        assert self.checkpoint is not None
        # An attacked model may be measured: its weights leave neither this folder nor this process.
        convert(self.checkpoint, out, dtype=evaluation_device()[1], allow_attacked=True)


def find_sources(model: ModelArguments) -> list[Source]:
    """The model that the flags name, or the complete checkpoints of the run they name by ascending step.

    Errors: ValueError for a run without a complete checkpoint, a checkpoint that is not complete, or an adapter beside
    either.
    """
    folder = Path(model.model_name_or_path)
    run = (folder / "run.json").is_file() and any(CHECKPOINT_NAME.fullmatch(each.name) for each in folder.iterdir())
    if not run and not (folder / MARKER).is_file() and not (folder / "latest").is_file():
        folders = [folder, *([Path(model.adapter_name_or_path)] if model.adapter_name_or_path else [])]
        return [Source(model, attacked=any((each / ATTACKED_NOTE).is_file() for each in folders))]
    if model.adapter_name_or_path is not None:
        raise ValueError(
            f"--adapter_name_or_path {model.adapter_name_or_path}: --model_name_or_path {folder} names checkpoints of "
            "training, which are measured as they are: drop the flag"
        )
    checkpoints = complete_checkpoints(folder) if run else [folder.resolve()]
    if not checkpoints:
        raise ValueError(f"--model_name_or_path {folder}: none of its checkpoints is complete; resume the run")
    try:
        markers = [read_marker(checkpoint) for checkpoint in checkpoints]
    except ValueError as error:
        raise ValueError(f"--model_name_or_path {error}") from error
    return [
        Source(_base(model, checkpoint), checkpoint, marker.step, marker.attacked)
        for checkpoint, marker in zip(checkpoints, markers, strict=True)
    ]


def _base(model: ModelArguments, checkpoint: Path) -> ModelArguments:
    """The flags of a checkpoint's model; an adapter's base is the one that the run's record names."""
    if not (checkpoint / ADAPTER_CONFIG).is_file():
        return model
    record = checkpoint.parent / "run.json"
    base = read_json(record).get("arguments", {}).get("model_name_or_path")
    if not isinstance(base, str):
        raise ValueError(f"{record}: does not name the base model (arguments.model_name_or_path) of the adapter")
    return ModelArguments(resolve_model(base), None, model.trust_remote_code)


@contextmanager
def _private_folder(path: Path, here: World) -> Iterator[None]:
    """A folder for its owner only, removed at the end, be it an error or a request to end this process. What a process
    killed outright left there goes with the next call."""
    if not here.main:
        yield
        return
    numbers = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in numbers}
    try:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(mode=0o700, parents=True)
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)
