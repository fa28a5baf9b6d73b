"""DGR, distribution-grounded refinement (arXiv 2602.02136): the target model rewrites a safety reasoning set in its
own words, so that training on it shifts the model less.

Known of the paper: the target rewrites, obvious failures are filtered, and where that fails the original is kept
(Eq. 3). Its prompt and filters are not known here; ours are **reconstructed** (dgr_request.py, dgr_filters.py), with
R1's and Qwen3's way to mark thoughts (pipeline/data/thinking.py). The output folder holds

    refined.jsonl    the rows for --train_data; origin: refined or fallback
    original.jsonl   the same source in the target's markers: the arm to compare with
    decisions.jsonl  what became of every row, without its texts
    report.json, report.html, settings.json
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeline.config import ModelArguments, Parsed
from pipeline.curation.dgr_arguments import DgrArguments, check
from pipeline.curation.dgr_guard import Guard, find_guard, find_rule
from pipeline.curation.dgr_output import hold_settings, write_rows
from pipeline.curation.dgr_report import REPORT, numbers, summary, write_report
from pipeline.curation.dgr_request import MARKS, STRENGTHS, WORDING, Strength
from pipeline.curation.dgr_rounds import Rewriting
from pipeline.curation.dgr_sources import read_sources
from pipeline.curation.dgr_stages import Draws, Stages
from pipeline.curation.dgr_target import Target
from pipeline.evaluation.answers_phase import DTYPES
from pipeline.evaluation.record import digest
from pipeline.evaluation.suites import named
from pipeline.evaluation.workers import Crew, launched, start
from pipeline.report.records import read_json
from pipeline.training.distributed import world
from pipeline.training.manifest import versions

CONFIGS = (ModelArguments, DgrArguments)
WORK = "work"  # every candidate, also what the filters rejected


def run(parsed: Parsed) -> None:
    """Rewrites, or goes on with what a killed run left.

    Raises:
        ValueError: bad flags, data or model, or an output folder that holds another rewriting.
    """
    arguments = parsed[DgrArguments]
    check(arguments)
    crew = launched(world(), arguments.num_workers)
    _share(parsed[ModelArguments], arguments, crew)
    if crew.main:
        folder = Path(arguments.output_dir or "")
        if not arguments.keep_candidates:
            shutil.rmtree(folder / WORK, ignore_errors=True)
        print(summary(read_json(folder / REPORT), folder))


def _share(model: ModelArguments, arguments: DgrArguments, crew: Crew) -> None:
    """One worker's part; worker 0 starts the others, unless a launcher did."""
    folder = Path(arguments.output_dir or "")
    models, templates = named(arguments.judge_model, "judge_model"), named(arguments.judge_template, "judge_template")
    guard = find_guard(arguments.guard, models, templates)
    target = Target(
        model,
        engine=arguments.engine,
        dtype=DTYPES.get(arguments.dtype),
        max_length=arguments.max_length,
        workers=crew.size,
    )
    sources = read_sources(arguments.source_data or "", target.encoder, system_prompt=arguments.system_prompt)
    first: Strength | None = None if arguments.strength == "auto" else arguments.strength
    rewriting = Rewriting(
        sources,
        target,
        find_rule(arguments.refusal_rule),
        mode=arguments.mode,
        samples=arguments.samples,
        max_new_tokens=arguments.max_new_tokens,
        strengths=STRENGTHS if first is None else arguments.strengths(first),
    )
    draws = _draws(arguments, target)
    settings = _settings(arguments, target, guard, rewriting, draws)
    hold_settings(folder, settings, crew)
    work = folder / WORK
    has_read = [work / f"read{rank}" for rank in range(crew.size)]
    has_read[crew.rank].unlink(missing_ok=True)  # of a run that was killed at its end
    if (folder / REPORT).is_file():
        return
    if crew.main and arguments.num_workers > 1:
        crew = start(crew, _share, model, arguments)
    work.mkdir(mode=0o700, exist_ok=True)
    stages = Stages(target, guard, draws, work, crew)
    probe = rewriting.probe(stages, arguments.seed) if first is None else {}
    strengths = arguments.strengths(first or sorted(probe, key=lambda each: -probe[each])[0])
    own = rewriting.own(stages, rewriting.some(arguments.own_answers, arguments.seed))
    outcomes = rewriting.run(stages, strengths)
    has_read[crew.rank].touch()
    if not crew.main:
        return
    # Once all have read what they need, the work folder may go.
    crew.wait(lambda: all(each.exists() for each in has_read))
    write_rows(outcomes, target.encoder, arguments.fallback, folder)
    found = numbers(outcomes, fallback=arguments.fallback, rounds=strengths, probe=probe or None, own=own)
    write_report(found | {"settings": settings}, folder)
    crew.join()


def _draws(arguments: DgrArguments, target: Target) -> Draws:
    chosen = target.recommended()
    given = {name: getattr(arguments, name) for name in chosen}
    chosen |= {name: value for name, value in given.items() if value is not None}
    return Draws(
        **chosen, seed=arguments.seed, max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch_size
    )


def _settings(
    arguments: DgrArguments, target: Target, guard: Guard | None, rewriting: Rewriting, draws: Draws
) -> dict[str, Any]:
    """Everything the result depends on. Rows and wording stand as hashes."""
    model = target.model
    return {
        "method": "dgr",
        "model": model.name,
        "adapter": model.adapter,
        "weights_sha256": model.weights_fingerprint(),
        "source_data": arguments.source_data,
        "rows_sha256": digest([[each.input_ids, each.labels] for each in rewriting.originals]),
        "request_sha256": digest([WORDING, MARKS]),
        "encoder": target.encoder.fingerprint,
        "thoughts": target.encoder.thinks,
        "engine": target.engine_used,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "guard": None if guard is None else guard.identity(),
        **vars(draws),
        **{
            name: getattr(arguments, name)
            for name in ("mode", "strength", "rounds", "fallback", "samples", "max_length", "refusal_rule")
        },
        "own_answers": arguments.own_answers,
        "system_prompt": arguments.system_prompt,
        "versions": versions(),
    }
