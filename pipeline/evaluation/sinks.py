"""The sink divergence of every head of a model over two pools of texts (the statistic of arXiv 2602.05228, without
training), from flags to files."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.builtin_model import resolve_model
from pipeline.config import ModelArguments, Problems, nearest
from pipeline.data.chat import ChatEncoder
from pipeline.evaluation.model import evaluation_device
from pipeline.evaluation.sink_pass import text_means
from pipeline.evaluation.sink_sources import Source, find_sources
from pipeline.evaluation.sink_statistics import head_statistics
from pipeline.evaluation.sink_texts import KEEP, Texts
from pipeline.report.comparison import Share, harmful_score, read_shares
from pipeline.report.files import write_npz
from pipeline.report.sink_page import write_pictures
from pipeline.sink import attention, backends
from pipeline.sink.support import attention_refusals
from pipeline.training.distributed import World, initialize_process_group, leave_process_group
from pipeline.training.inference import inference_config, sharded
from pipeline.training.manifest import versions, write_json

SCRATCH = ".scratch"  # folder in --output_dir that holds a converted checkpoint while it is measured


@dataclass
class MeasureArguments:
    """Flags of measure.py."""

    harmful_data: str = field(default="policy:harmful", metadata={"help": "Harmful texts."})
    harmless_data: str = field(default="policy:harmless", metadata={"help": "Harmless texts."})
    output_dir: str = field(default="runs/sinks", metadata={"help": "Folder of sinks.json, pictures and sinks.html."})
    max_texts: int | None = field(
        default=None, metadata={"help": "Use the first N texts of each pool, at least 2. [default: all]"}
    )
    max_length: int = field(default=512, metadata={"help": "Tokens a text is cut to."})
    system_prompt: str | None = field(default=None, metadata={"help": "System turn for texts that have none."})
    sink_token_position: int = field(
        default=0, metadata={"help": "Position of the sink key in each text, counted from 0."}
    )
    ds_config: str | None = field(
        default=None,
        metadata={
            "help": "DeepSpeed file with ZeRO stage 3: shards the weights over the ranks of the launcher, which share "
            "the texts. Its optimizer, precision and batch sizes are left out. [default: one process, whole weights]"
        },
    )
    assessed: list[str] = field(
        default_factory=list,
        metadata={
            "help": "For a run's checkpoints: their evaluations by assess.py, checkpoint-N=DIR checkpoint-M=DIR ...; "
            "draws positive heads against harmful score."
        },
    )


class _Measurement:
    """Everything resolved and checked before a weight is read. Errors: Problems with all that is wrong."""

    def __init__(self, model: ModelArguments, arguments: MeasureArguments, here: World) -> None:
        self.model, self.arguments, self.here = model, arguments, here
        self.out = Path(arguments.output_dir)
        self.device, self.dtype = evaluation_device()
        self.bf16 = self.dtype == torch.bfloat16
        self.kernel, self.kernel_reason = backends.choose("auto", self.device.type, half=self.bf16)
        self.texts: Texts | None = None
        self.sources: list[Source] = []
        self.config: Any = None
        self.ds_config: dict[str, Any] | None = None
        self.assessed: dict[str, Share] = {}
        problems: list[str] = []
        for step in (
            self._check_flags, self._read_texts, self._find_model, self._read_ds_config, self._encode,
            self._read_assessed,
        ):  # fmt: skip
            try:
                step()
            except ValueError as error:
                problems += str(error).splitlines()
        if problems:
            raise Problems(problems)

    def _check_flags(self) -> None:
        arguments, problems = self.arguments, []
        if arguments.max_texts is not None and arguments.max_texts < 2:
            problems.append(f"--max_texts {arguments.max_texts}: a standard error needs at least 2 texts of each pool")
        if arguments.sink_token_position < 0:
            problems.append(f"--sink_token_position {arguments.sink_token_position}: positions are counted from 0")
        there = next(each for each in (self.out.absolute(), *self.out.absolute().parents) if each.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            problems.append(f"--output_dir {self.out}: {there} is no folder that can be written: name another one")
        if arguments.ds_config is None and self.here.size > 1:
            problems.append(
                f"--ds_config: {self.here.size} ranks were started, and without a DeepSpeed file one process does "
                "all: give one, such as ds_configs/z3.json, or start with plain python"
            )
        if problems:
            raise Problems(problems)

    def _read_texts(self) -> None:
        specs = {flag: getattr(self.arguments, flag) for flag in KEEP}
        self.texts = Texts(specs, max_texts=self.arguments.max_texts, system_prompt=self.arguments.system_prompt)

    def _find_model(self) -> None:
        self.sources = find_sources(self.model)
        config, tokenizer = self.sources[-1].describe()
        self.config = config.get_text_config()
        self.encoder = ChatEncoder(tokenizer, max_length=self.arguments.max_length)

    def _read_ds_config(self) -> None:
        if self.arguments.ds_config is not None:
            hidden = self.config.hidden_size if self.config else 1  # without a model nothing is measured anyway
            self.ds_config = inference_config(
                self.arguments.ds_config, hidden_size=hidden, bf16=self.bf16, here=self.here
            )

    def _encode(self) -> None:
        if self.texts is None or self.config is None:  # a problem already
            return
        self.texts.encode_with(self.encoder, position=self.arguments.sink_token_position)
        name = self.model.model_name_or_path
        reasons = attention_refusals(self.config, max(self.texts.lengths))
        if reasons:
            raise Problems([f"--model_name_or_path {name}: {each}" for each in reasons])

    def _read_assessed(self) -> None:
        names = [source.name for source in self.sources if source.name]
        problems = []
        for each in self.arguments.assessed:
            label, equals, folder = each.partition("=")
            if not equals or not folder:
                problems.append(f"--assessed {each}: expected checkpoint-N=DIR")
            elif label in self.assessed:
                problems.append(f"--assessed {each}: {label} is given twice")
            elif self.sources and label not in names:
                problems.append(f"--assessed {each}: {label} is not measured{nearest(label, names)}")
            else:
                try:
                    score = harmful_score(read_shares(Path(folder)))
                except ValueError as error:
                    problems.append(f"--assessed {each}: {error}")
                    continue
                if score is None:
                    problems.append(f"--assessed {each}: no suite there has a harmful_score")
                else:
                    self.assessed[label] = score
        if problems:
            raise Problems(problems)

    def measure(self, source: Source) -> dict[str, Any]:
        """One model's statistics, as sinks.json holds them; its single texts go into a file of their own."""
        texts = self.texts
        assert texts is not None
        with source.opened(self.out / SCRATCH, self.here) as evaluated:
            load = partial(evaluated.load, attention.register(self.kernel))
            loaded = load() if self.ds_config is None else sharded(load, self.ds_config)
            values = text_means(
                loaded,
                self.config,
                texts,
                position=self.arguments.sink_token_position,
                device=self.device,
                here=self.here,
                label=f"{source.name}: texts" if source.name else "texts",
            )
            if self.ds_config is not None:
                loaded.destroy()
        bad = ~np.isfinite(values).all(axis=(1, 2))
        if bad.any():
            row = texts.rows[int(bad.argmax())].id
            raise ValueError(
                f"--model_name_or_path {self.model.model_name_or_path}: the sink attention of {bad.sum()} texts is "
                f"not finite ({row} first): the weights are damaged, or overflow in {self.dtype}"
            )
        harmful, harmless = np.split(values, [texts.harmful])
        if self.here.main:
            harmful_ids, harmless_ids = np.split(np.array([row.id for row in texts.rows]), [texts.harmful])
            write_npz(
                self.out / f"sinks_per_text{f'-{source.name}' if source.name else ''}.npz",
                {"harmful": harmful, "harmless": harmless, "harmful_ids": harmful_ids, "harmless_ids": harmless_ids},
            )
        entry = {"checkpoint": source.name, "step": source.step, "attacked": source.attacked}
        score = {"harmful_score": asdict(self.assessed[source.name])} if source.name in self.assessed else {}
        return entry | head_statistics(harmful, harmless).record() | score

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on."""
        assert self.texts is not None
        arguments = self.arguments
        return {
            "model": resolve_model(self.model.model_name_or_path),
            "adapter": self.model.adapter_name_or_path,
            "attention": f"{self.kernel} ({self.kernel_reason})",
            "dtype": str(self.dtype).removeprefix("torch."),
            "texts": self.texts.counts,
            "data": {flag: getattr(arguments, flag) for flag in KEEP},
            "max_length": arguments.max_length,
            "system_prompt": arguments.system_prompt,
            "sink_token_position": arguments.sink_token_position,
            "versions": versions(),
        }


def measure(model: ModelArguments, arguments: MeasureArguments, here: World) -> dict[str, Any]:
    """Measure, write the files that measure.py describes, and return what sinks.json holds. Collective.

    Errors: Problems for data, flags or a model that cannot be measured, naming flag or row.
    """
    measurement = _Measurement(model, arguments, here)
    if measurement.ds_config is not None:
        initialize_process_group(here)
    if here.main:
        measurement.out.mkdir(parents=True, exist_ok=True)
    entries = [measurement.measure(source) for source in measurement.sources]
    if measurement.ds_config is not None:
        leave_process_group(here)
    found = measurement.settings() | entries[-1] | {"checkpoints": [each for each in entries if each["checkpoint"]]}
    if here.main:
        write_pictures(found, measurement.out)
        write_json(measurement.out / "sinks.json", found)
    return found
