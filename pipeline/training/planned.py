"""A run as a job of the planner: from a command line, or from a run that is about to start."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipeline.builtin_model import resolve_model
from pipeline.config import DataArguments, LoraArguments, ModelArguments, Parsed, Problems, TrainArguments
from pipeline.planning.activations import Subject
from pipeline.planning.arguments import PlanArguments
from pipeline.planning.hardware import Cluster, Gpu
from pipeline.planning.plan import Job
from pipeline.planning.sizes import SIZES, size_config
from pipeline.planning.states import ZeroSettings
from pipeline.training.adapters import check_adapter
from pipeline.training.distributed import World
from pipeline.training.meta_step import subject
from pipeline.training.method import Method
from pipeline.training.preflight import Gather, model_config, placed, resolve_ds
from pipeline.training.prepared import Prepared
from pipeline.training.settings import settings_problems


def planned_job(parsed: Parsed, method: Method, asked: PlanArguments) -> Job:
    """The job of a command line, for the cluster that it names. Rows are taken to be as long as --max_length and
    --max_tokens_per_device allow, references as --reference_max_length. Errors: ValueError, as `preflight.prepare`."""
    model, data, lora = parsed[ModelArguments], parsed[DataArguments], parsed[LoraArguments]
    train, cluster = parsed[TrainArguments], asked.cluster()
    gather = Gather()
    gather.problems += settings_problems(parsed.given - {"output_dir"}, method, data, lora, train)
    with gather():
        check_passes(method, train)
    train = replace(train, bf16=train.bf16 is not False)
    config, zero = None, None
    with gather():
        name = model.model_name_or_path
        config = size_config(name) if name in SIZES else model_config(resolve_model(name), model)
    with gather():
        ds_config, train = resolve_ds(train, parsed.given, config, World(0, 0, cluster.ranks))
        if config is not None:
            gather.problems += placed(method.refuse(config.get_text_config(), ds_config), model, train)
            zero = read_zero(ds_config, cluster.ranks, train)
    if config is not None:
        with gather():
            check_adapter(config, lora, model)
    gather.stop()
    assert zero is not None
    references = (data.reference_max_length,) * (method.reference_texts() * len(method.pools))
    tokens, rows = data.max_length, train.per_device_train_batch_size
    if train.max_tokens_per_device is not None:
        tokens = min(tokens, (train.max_tokens_per_device - sum(references)) // rows)
        if tokens < 2:
            raise ValueError(
                f"--max_tokens_per_device {train.max_tokens_per_device}: {rows} rows and references of "
                f"{sum(references)} tokens do not fit: raise it, or lower --per_device_train_batch_size"
            )
    return Job(
        subject=by_checkpointing(config, model, lora, train, method, cuda=True),
        cluster=cluster,
        zero=zero,
        rows=rows,
        accumulation=train.gradient_accumulation_steps,
        tokens=tokens,
        references=references,
        trained_share=asked.trained_share,
        checkpointing=train.gradient_checkpointing,
    )


def sized_jobs(parsed: Parsed, method: Method, asked: PlanArguments) -> dict[str, Job]:
    """The job of a command line for each public size in place of its model."""
    if "model_name_or_path" in parsed.given:
        raise ValueError(f"--simulate plans {', '.join(SIZES)}: leave --model_name_or_path out")
    jobs = {}
    for name in SIZES:
        parsed[ModelArguments].model_name_or_path = name
        jobs[name] = planned_job(parsed, method, asked)
    return jobs


def prepared_job(run: Prepared, gpu: Gpu, gpus_per_node: int, *, cuda: bool) -> Job:
    """The job of a run that is about to start: its largest packed row, and its mean of trained tokens.

    gpu: what it runs on; cuda: whether that is a GPU. Errors: ValueError for settings that are not planned.
    """
    check_passes(run.method, run.train)
    layout, budget = run.streams["train"].layout, run.budget
    references = int(budget["reference_tokens_at_most"])
    texts = run.method.reference_texts() * len(run.method.pools)
    tokens = max(2, (int(budget["largest_packed_row"]) - references) // layout.rows)
    return Job(
        subject=by_checkpointing(run.model_config, run.model, run.lora, run.train, run.method, cuda=cuda),
        cluster=Cluster(gpu, math.ceil(run.world.size / gpus_per_node), min(gpus_per_node, run.world.size)),
        zero=read_zero(run.ds_config, run.world.size, run.train),
        rows=layout.rows,
        accumulation=layout.accumulation,
        tokens=tokens,
        references=(references // texts,) * texts if texts else (),
        trained_share=min(1.0, budget["trained_tokens_per_step"] / (layout.global_batch * tokens)),
        checkpointing=run.train.gradient_checkpointing,
    )


def check_passes(method: Method, train: TrainArguments) -> None:
    """Errors: ValueError if a step of the method is more than one forward and one backward pass of a packed row."""
    if method.touches_shards or method.differentiates_activations or (method.pools and not method.reference_texts()):
        raise ValueError(
            f"--method {train.method}: its step takes more than one forward and one backward pass, which is not "
            "planned: plan --method sft, and multiply by the passes that the README's table of methods names"
        )


def read_zero(ds_config: dict[str, Any], ranks: int, train: TrainArguments) -> ZeroSettings:
    """The ZeRO settings of a resolved ds_config. Errors: ValueError naming the file."""
    try:
        return ZeroSettings.read(ds_config, ranks)
    except ValueError as error:
        named = [line.removeprefix("ds_config ") for line in str(error).splitlines()]
        raise Problems([f"--ds_config {train.ds_config}: {line}" for line in named]) from error


def by_checkpointing(
    config: Any, model: ModelArguments, lora: LoraArguments, train: TrainArguments, method: Method, *, cuda: bool
) -> Callable[[bool], Subject]:
    """The subject with and without activation checkpointing, each made when it is first asked for."""

    @functools.cache
    def of(checkpointing: bool) -> Subject:
        return subject(config, model, lora, replace(train, gradient_checkpointing=checkpointing), method, cuda=cuda)

    return of
