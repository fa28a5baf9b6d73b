"""Pharmacist (arXiv 2510.10085): choose the part of an alignment set that keeps a model safe. Reconstructed.

OUT/scores.jsonl has a line a row: `id row score rank weight kept first_loss last_loss tokens` (of the trained answer),
`category` and `planted` where rows have them, and `baselines`, each one's score. OUT/kept.jsonl holds the kept rows as
they were stored, in their order, for --train_data of any alignment method; OUT/baselines/NAME.jsonl the same of each
baseline. OUT/report.json and report.html say what the selection looks like. No row's text is in them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import ModelArguments, Parsed, Problems
from pipeline.curation.pharmacist_settings import PharmacistArguments, doubts, training_flags, without_effect

if TYPE_CHECKING:
    import torch

    from pipeline.curation.pharmacist_method import Pharmacist
    from pipeline.training.prepared import Prepared

CONFIGS = (ModelArguments, PharmacistArguments)


def run(parsed: Parsed) -> None:
    """Check everything, train the selector, write OUT.

    Errors: ValueError with all that is wrong, before a weight is read. A loss that is not finite, or files that cannot
    be written, end all ranks with exit code 1.
    """
    from pipeline.training.distributed import (
        initialize_process_group,
        leave_process_group,
        together,
        world,
    )

    here = world()
    from pipeline.curation.pharmacist_method import Pharmacist
    from pipeline.curation.pharmacist_outputs import Alignment, write
    from pipeline.training.method import NonFinite
    from pipeline.training.preflight import prepare
    from pipeline.training.run import stop

    asked = parsed[PharmacistArguments]
    problems, rows, method = without_effect(parsed), None, Pharmacist(asked)
    try:
        prepared = prepare(training_flags(parsed), asked.method, method, here)
        rows = Alignment.read(prepared, asked)
        prepared.warnings += doubts(asked, bf16=bool(prepared.train.bf16))
    except ValueError as error:
        problems += str(error).splitlines()
    if problems or rows is None:
        raise Problems(problems)

    device = initialize_process_group(here)
    for each in prepared.warnings if here.main else ():
        print(f"warning: {each}", flush=True)
    seal = None
    try:
        train(prepared, method, device)
        if "seal" in asked.baselines:
            seal = Pharmacist(replace(asked, kappa=0.0, variant="joint", baselines=[]))
            train(prepared, seal, device)
    except NonFinite as error:
        stop(here, error)
    failed = together(here, lambda: write(rows, prepared, method, seal, Path(asked.output_dir)), main_only=True)
    if failed:
        stop(here, OSError(f"--output_dir {asked.output_dir}: {failed[0]}"))
    leave_process_group(here)
    if here.main:
        print(f"kept rows: {asked.output_dir}/kept.jsonl  report: {asked.output_dir}/report.html")


def train(prepared: Prepared, method: Pharmacist, device: torch.device) -> None:
    """All steps of a selector, from the starting model. Collective. Errors: NonFinite, on all ranks."""
    from pipeline.curation.pharmacist_method import Plan
    from pipeline.evaluation.progress import Progress
    from pipeline.training.engine import build_engine
    from pipeline.training.generators import seed_everything
    from pipeline.training.loop import Loop

    method.plan = Plan(prepared.streams, prepared.steps)
    run = replace(prepared, method=method)
    engine = build_engine(run, device)
    seed_everything(run.train.seed, run.world.rank)
    loop = Loop(run, engine, start=0, log=None)
    progress = Progress("selector", total=run.steps) if run.world.main else None
    while loop.step < run.steps:
        loop.train_step()
        if progress is not None:
            progress.update(1, 0)
    engine.deepspeed.destroy()
