"""DGR, distribution-grounded refinement (arXiv 2602.02136): the target model rewrites a safety reasoning set."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config import ModelArguments, Parsed


@dataclass
class DgrArguments:
    """What is rewritten, and how."""

    method: str = field(default="dgr", metadata={"help": "Curation method: a name of pipeline/curation."})


CONFIGS = (ModelArguments, DgrArguments)


def run(parsed: Parsed) -> None:
    raise ValueError(f"--method dgr: not written yet for {parsed[ModelArguments].model_name_or_path}")
