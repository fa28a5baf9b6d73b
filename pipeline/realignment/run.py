"""One realignment, from flags to the finished folder.

LSSF is faithful to the equations of arXiv 2602.00038 as they are known (its PDF could not be read). Inferred: outputs
are standardised per neuron over tokens, the answers' tokens count, and the seven projections of each layer have a
subspace.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from pipeline.checkpoints.convert import DTYPES
from pipeline.checkpoints.model_folder import empty_model
from pipeline.checkpoints.out_folder import OutFolder, fingerprint
from pipeline.checkpoints.space import require_space
from pipeline.realignment import subspace
from pipeline.realignment.anchors import Anchors, read_anchors
from pipeline.realignment.arguments import RealignArguments
from pipeline.realignment.bases import Bases
from pipeline.realignment.collect import collect
from pipeline.realignment.layers import LayerByLayer
from pipeline.realignment.maps import decoder_layers
from pipeline.realignment.models import Models, open_models
from pipeline.realignment.plan import make_plan
from pipeline.realignment.report import describe, warnings, write_report
from pipeline.realignment.update import Lssf, Resta
from pipeline.realignment.write import Changes, write_adapter, write_model


@dataclass(frozen=True)
class Realigned:
    """What was done. tensors: written or, of an adapter, changed by it. warnings: to be read before it is used."""

    tensors: int
    updated: int
    warnings: list[str]


def realign(arguments: RealignArguments) -> Realigned | None:
    """Checks, plans, computes what the work folder lacks, and writes the output folder; None of a dry run.

    Raises:
        ValueError: what the flags name is missing, damaged, does not fit or has no room; nothing half-written is left.
    """
    out, models = Path(str(arguments.output_dir)), open_models(arguments)
    if models.exposed:
        _say(f"warning: {models.exposed} is hazardous, and other users can read it: chmod 700 {models.exposed}")
    anchors = _anchors(arguments, models) if arguments.method == "lssf" else None
    work = Path(arguments.work_dir) if arguments.work_dir else _beside(out, "work")
    if anchors:
        layers = decoder_layers(empty_model(models.safe_folder), models.safe_folder)[1]
        plan = make_plan(layers, models.maps, anchors, workers=arguments.workers)
        _say(plan.line())
        require_space(work, plan.scratch, flag="--work_dir", what="scratch beside the subspaces")
    if arguments.dry_run:
        return None
    source = fingerprint(models.files, "realign", *_decisive(arguments), anchors.digest if anchors else None)
    # An adapter's product is along the unsafe adapter's directions: it stays with its owner.
    private = models.attacked or arguments.output_form == "adapter"
    with OutFolder(out, source=source, private=private) as made:
        lssf = _subspaces(arguments, models, anchors, work) if anchors else None
        changes = Changes(_beside(out, "changes.jsonl"), source)
        tensors = _write(arguments, models, made, changes, lssf[1] if lssf else None)
        done = changes.by_name()
        found = describe(arguments, models, done, (anchors, *lssf) if anchors and lssf else None)
        write_report(found, made.folder)
        made.finish()
    changes.remove()
    if anchors and arguments.work_dir is None:
        shutil.rmtree(work)
    return Realigned(tensors, len(done), warnings(found))


def _anchors(arguments: RealignArguments, models: Models) -> Anchors:
    return read_anchors(
        str(arguments.anchors),
        models.safe_folder,
        answers=arguments.anchor_answers,
        max_length=arguments.max_length,
        token_scope=arguments.token_scope,
    )


def _subspaces(arguments: RealignArguments, models: Models, anchors: Anchors, work: Path) -> tuple[Bases, Lssf]:
    """Stage A, as far as the work folder lacks it."""
    settings = subspace.FIRST, subspace.OVERSAMPLE, subspace.POWER
    source = fingerprint(models.safe_files, "subspaces", anchors.digest, arguments.norm, *settings)
    bases = Bases(work, source, named=arguments.work_dir is not None)
    maps = [each for parts in models.maps.values() for each in parts]
    if arguments.alpha and not all(bases.decided(each, arguments.eta) for each in maps):
        vocabulary = sorted({token for each in anchors.used for token in each.ids})
        model = LayerByLayer(models.safe_folder, vocabulary)
        try:
            collect(model, anchors, maps, bases, eta=arguments.eta, norm=arguments.norm)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"--work_dir {work}: {error}; what was computed is kept there: make room and start it again"
            ) from error
    updates = Lssf(
        models.vector, models.maps, bases, eta=arguments.eta, alpha=arguments.alpha, alpha_1=arguments.alpha_1
    )
    return bases, updates


def _write(arguments: RealignArguments, models: Models, made: OutFolder, changes: Changes, lssf: Lssf | None) -> int:
    """Stage B. Returns the number of tensors."""
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    if lssf and arguments.output_form == "adapter":
        base = str(arguments.model_name_or_path)
        return write_adapter(
            models, lssf, made, changes, base=base, dtype=dtype or torch.float32, workers=arguments.workers
        )
    return write_model(
        models,
        lssf or Resta(models.vector, arguments.alpha),
        made,
        changes,
        alpha=arguments.alpha,
        dtype=dtype,
        max_shard_size=arguments.max_shard_size,
        workers=arguments.workers,
    )


def _decisive(arguments: RealignArguments) -> tuple[object, ...]:
    """The flags on which the written bytes depend, beside the files."""
    lssf = (arguments.eta, arguments.alpha_1, arguments.norm) if arguments.method == "lssf" else ()
    return (
        arguments.method, arguments.alpha, *lssf, arguments.output_form, arguments.dtype, arguments.max_shard_size,
    )  # fmt: skip


def _beside(out: Path, what: str) -> Path:
    return out.resolve().with_name(f".{out.resolve().name}.{what}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
