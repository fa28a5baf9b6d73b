"""What train.py does before it trains, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.config import DataArguments, LoraArguments, ModelArguments, TrainArguments, parse, peek
from pipeline.methods import flags_of_others, load_method
from pipeline.training.distributed import World
from pipeline.training.preflight import prepare
from pipeline.training.prepared import Prepared

ROWS = 24  # of each pool of the good command line
LINEAR_LAYERS = (
    "this model has down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj, or give all-linear alone"
)
Refused = Callable[..., list[str]]


def resolve(argv: Sequence[str], ranks: int = 1) -> Prepared:
    """The run that a command line asks for."""
    name = peek("method", argv) or TrainArguments.method
    method = load_method(name)
    configs = [ModelArguments, DataArguments, LoraArguments, TrainArguments, method.Config]
    parsed = parse(configs, argv, description="", elsewhere=flags_of_others(name))
    return prepare(parsed, name, method(parsed[method.Config]), World(0, 0, ranks))
