"""The flags of every stage, held against its door before the first stage runs: hours later is too late."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.chain.stages import Stage
from pipeline.config import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    Problems,
    TrainArguments,
    nearest,
    parse,
    peek,
)

# Doors with a parser of their own, which has few flags.
FLAGS = {
    "convert": ("dtype", "max_shard_size", "workers", "model_name_or_path", "allow_attacked_model"),
    "match": ("like", "metric"),
    "compare": ("rows",),
}


def check_flags(stages: Sequence[Stage]) -> None:
    """Errors: Problems for every flag that a stage's door does not have, and every value of the wrong type."""
    found: dict[str, list[str]] = {}  # one mistake may stand in many stages
    for stage in stages:
        try:
            if stage.run in FLAGS:
                _check_names(stage)
            else:
                configs, elsewhere = _configs(stage)
                parse(configs, stage.arguments(), description=stage.door.file, elsewhere=elsewhere)
        except ValueError as error:
            for line in str(error).splitlines():
                found.setdefault(line, []).append(stage.name)
    if found:
        raise Problems([f"stage {_first_of(names)}: {line}" for line, names in found.items()])


def _first_of(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def _check_names(stage: Stage) -> None:
    known = {*FLAGS[stage.run], *stage.door.positional}
    problems = [f"--{key} is unknown{nearest(key, known)}" for key in stage.settings if key not in known]
    problems += [f"--{key} false: leave it out" for key, value in stage.settings.items() if value is False]
    if problems:
        raise Problems(problems)


def _configs(stage: Stage) -> tuple[list[type], dict[str, str]]:
    """The dataclasses whose fields are the door's flags, and the flags it has with other methods; imported here,
    because they bring torch with them."""
    if stage.run == "train":
        from pipeline.methods import flags_of_others, load_method

        name = peek("method", stage.arguments()) or TrainArguments.method
        configs = [ModelArguments, DataArguments, LoraArguments, TrainArguments, load_method(name).Config]
        return configs, flags_of_others(name)
    if stage.run == "curate":
        from pipeline import curation

        method = peek("method", stage.arguments())
        return list(curation.load_module(method).CONFIGS), curation.flags_of_others(method)
    if stage.run == "realign":
        from pipeline.realignment.arguments import RealignArguments

        return [RealignArguments], {}
    if stage.run == "assess":
        from pipeline.evaluation.run import AssessArguments

        return [ModelArguments, AssessArguments], {}
    from pipeline.evaluation.sinks import MeasureArguments

    return [ModelArguments, MeasureArguments], {}
