"""A command line of train.py, resolved as the door resolves it."""

from __future__ import annotations

from pipeline.config import DataArguments, LoraArguments, ModelArguments, TrainArguments, parse, peek
from pipeline.methods import load_method
from pipeline.training.distributed import World
from pipeline.training.preflight import prepare
from pipeline.training.prepared import Prepared


def prepared(argv: list[str], here: World) -> Prepared:
    """The run that these words ask for."""
    name = peek("method", argv) or TrainArguments.method
    method = load_method(name)
    parsed = parse(
        [ModelArguments, DataArguments, LoraArguments, TrainArguments, method.Config], argv, description="test"
    )
    return prepare(parsed, name, method(parsed[method.Config]), here)
