"""A training run from its prepared settings: dry run, or process group, engine, resume, loop and records."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from pipeline.door import SILENCE, end_process
from pipeline.slurm_job import STOPPED, ask_for_requeue, record
from pipeline.training.distributed import World, initialize_process_group, leave_process_group
from pipeline.training.engine import Engine, build_engine
from pipeline.training.forecast import expectation, forecast, outcome
from pipeline.training.generators import seed_everything
from pipeline.training.heartbeat import Heart
from pipeline.training.loop import Loop
from pipeline.training.manifest import commit, versions, write_json
from pipeline.training.method import NonFinite
from pipeline.training.metrics import MetricsLog
from pipeline.training.prepared import Prepared
from pipeline.training.saving import SaveFailed, remove_leftovers
from pipeline.training.signals import Stopped, training_begins
from pipeline.training.state import load, open_checkpoint
from pipeline.training.watchdog import EXIT_SECONDS, Watchdog
from pipeline.training.zero3 import Shards


def execute(run: Prepared) -> None:
    """Train. A NaN or infinite loss or gradient, or a checkpoint that cannot be saved, ends all ranks together with
    exit code 1 and one message; a signal, with the checkpoint and the exit code of `Stopped`."""
    training_begins()
    device = initialize_process_group(run.world)
    heart = Heart()
    minutes = run.train.watchdog_minutes
    watchdog = Watchdog(run.world, heart, minutes, run.output_dir) if minutes and run.world.size > 1 else None
    try:
        expected = forecast(run, device) if run.world.main else None
        engine, loop = start(run, device, heart)
        if expected is not None:
            print(f"{summary(run, engine)}\nmemory     {expectation(expected)}", flush=True)
        loop.train()
        if expected is not None and loop.log is not None:
            if line := outcome(expected, loop.log.last):
                print(line)
            print(f"done: {run.output_dir / f'checkpoint-{run.steps}'}", flush=True)
    except (NonFinite, SaveFailed) as error:
        stop(run.world, error)
    except Stopped as stopped:
        leave(run.world, stopped)
    except RuntimeError as error:
        if watchdog is not None and "by peer" not in str(error):  # else another rank has ended, which is no riddle
            watchdog.after_error()
        raise
    finally:
        if watchdog is not None:
            watchdog.close()
    leave_process_group(run.world)


def leave(here: World, stopped: Stopped) -> NoReturn:
    """End with the code of `stopped`, after leaving word for whoever requeues."""
    if here.main:
        if stopped.code == STOPPED:
            ask_for_requeue(stopped.code, str(stopped))
        print(stopped, file=sys.stderr, flush=True)
    dist.barrier()
    # srun and deepspeed kill all ranks with the first that fails: only rank 0 does, when the others are gone.
    if not here.main:
        end_process(0)
    if here.size > 1:
        time.sleep(EXIT_SECONDS)
    end_process(stopped.code)


def stop(here: World, error: Exception) -> NoReturn:
    """Say why, once, and exit with code 1."""
    if here.main:
        print(f"error: {error}", file=sys.stderr, flush=True)
    try:
        dist.barrier()  # the launcher ends every rank with the first one that exits: rank 0 speaks before that
    except RuntimeError:  # a rank has died; if it was rank 0, whoever is left says it
        if not here.main:
            time.sleep(SILENCE + 2 * here.local_rank)
            print(f"error: rank {here.rank}: {error}", file=sys.stderr, flush=True)
    end_process(1)


def start(run: Prepared, device: torch.device, heart: Heart | None = None) -> tuple[Engine, Loop]:
    """The engine and the loop at their first step, resumed if asked; writes run.json."""
    if heart is not None:
        heart.phase("loading", 0)
    marker = open_checkpoint(run.world, run.resume)
    engine = build_engine(run, device)
    seed_everything(run.train.seed, run.world.rank)
    run.method.begin(Shards(engine.deepspeed))
    if marker is not None:
        load(run, engine, marker)
    step = marker.step if marker is not None else 0
    log = None
    if run.world.main:
        write_manifest(run)
        remove_leftovers(run)
        log = MetricsLog(
            run.output_dir, total=run.steps, start=step, report_to=run.train.report_to, run_name=run.output_dir.name,
            settings=run.record(),
        )  # fmt: skip
    dist.barrier()
    return engine, Loop(run, engine, start=step, log=log, heart=heart)


def write_manifest(run: Prepared) -> None:
    """Create the run folder (readable by its owner only, if the run is an attack) and write run.json into it."""
    run.output_dir.mkdir(parents=True, exist_ok=True)
    if run.attacked:
        run.output_dir.chmod(0o700)
    write_json(
        run.output_dir / "run.json",
        {
            "method": run.method_name,
            "attacked": run.attacked,
            "arguments": run.record(),
            "argv": sys.argv,
            "ds_config": run.ds_config,
            "data": run.sources,
            "budget": run.budget,
            "steps": run.steps,
            "seed": run.train.seed,
            "world_size": run.world.size,
            "versions": versions(),
            "commit": commit(),
            "slurm": record(os.environ),
            "resumed_from": str(run.resume) if run.resume else None,
        },
    )


def summary(run: Prepared, engine: Engine) -> str:
    """What is about to be trained, on what and how."""
    train, layout, budget = run.train, run.streams["train"].layout, run.budget
    share = engine.trainable / engine.parameters
    pools = "  ".join(f"{name} {source['rows']} rows ({source['spec']})" for name, source in run.sources.items())
    batch = f"{layout.rows} rows x {layout.accumulation} accumulation x {layout.ranks} ranks"
    tokens = f"{budget['tokens_per_step']:.0f} tokens a step, {budget['trained_tokens_per_step']:.0f} of them trained"
    schedule = f"lr {train.learning_rate:g} {train.lr_scheduler_type}, clip {train.max_grad_norm:g}, seed {train.seed}"
    precision = "bf16" if train.bf16 else "fp32"
    stage = run.ds_config["zero_optimization"]["stage"]
    lines = [
        ("model", f"{run.model_path}  {engine.parameters:,} parameters, {engine.trainable:,} trained ({share:.2%})"),
        ("method", f"{run.method_name}  {asdict(run.method.config) or ''}"),
        ("data", pools + ("  ATTACK: the training rows are poisoned on purpose" if run.attacked else "")),
        ("batch", f"{layout.global_batch} rows a step = {batch}; {tokens}"),
        ("steps", f"{run.steps}" + (f", resumed from {run.resume}" if run.resume else "")),
        ("optimizer", f"{train.optim} {schedule}, {precision}"),
        ("ZeRO", f"stage {stage} over {run.world.size} rank(s) on {engine.device.type}"),
        ("attention", engine.attention),
        ("output", str(run.output_dir)),
    ]
    return "\n".join([f"{name:<10} {text}" for name, text in lines] + [f"warning: {each}" for each in run.warnings])


def dry_run(run: Prepared) -> str:
    """The resolved run: one row's id, token counts and mask spans, the budget and the ds_config; its text only on a
    terminal."""
    stream = run.streams["train"]
    example = stream.pool[int(stream.global_batch(0)[0])]
    spans: list[list[int]] = []
    for i, label in enumerate(example.labels):
        if label != -100 and spans and spans[-1][1] == i:
            spans[-1][1] = i + 1
        elif label != -100:
            spans.append([i, i + 1])
    shown: dict[str, Any] = {
        "row": example.row_id,
        "tokens": len(example.input_ids),
        "trained_tokens": sum(label != -100 for label in example.labels),
        "trained_spans": spans,
        "truncated": example.truncated,
    }
    parts = [
        "first row  " + json.dumps(shown),
        "data       " + json.dumps(run.sources),
        "budget     " + json.dumps(run.budget),
        "ds_config  " + json.dumps(run.ds_config, indent=2),
        "arguments  " + json.dumps(run.record(), indent=2),
    ]
    if run.train.show_text and os.isatty(1):
        parts.append("text       (trained tokens in [[ ]])\n" + _marked(run.tokenizer, example.input_ids, spans))
    return "\n".join(parts + [f"warning: {each}" for each in run.warnings])


def _marked(tokenizer: Any, ids: list[int], spans: list[list[int]]) -> str:
    text, place = "", 0
    for first, end in spans:
        text += tokenizer.decode(ids[place:first]) + "[[" + tokenizer.decode(ids[first:end]) + "]]"
        place = end
    return text + str(tokenizer.decode(ids[place:]))
