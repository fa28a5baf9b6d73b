"""The generate phase: everything that needs the model under evaluation. Answers, cross-entropies, other tasks."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config import ModelArguments
from pipeline.data.chat import ChatEncoder, Example
from pipeline.data.schema import read_conversations
from pipeline.evaluation import lm_eval_tasks
from pipeline.evaluation.engines import choose_engine, open_engine
from pipeline.evaluation.generate import Engine, ask, generate
from pipeline.evaluation.jsonl import append_lines, resume_lines
from pipeline.evaluation.losses import cross_entropy
from pipeline.evaluation.model import EvaluatedModel, pad_token
from pipeline.evaluation.protocol import Asked, Renderer
from pipeline.evaluation.record import digest, prompts_sha256
from pipeline.evaluation.suite import Prompt, Prompts, Protocol
from pipeline.evaluation.suites import SUITES, named, own_source
from pipeline.evaluation.templates import sha256
from pipeline.evaluation.workers import Crew
from pipeline.training.manifest import versions

if TYPE_CHECKING:
    from pipeline.evaluation.run import AssessArguments

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class AnswersPhase:
    """Everything is read and checked here; weights are loaded by `run` alone, and only if something is missing.

    Raises:
        ValueError: bad arguments, data or model.
    """

    def __init__(
        self,
        model: ModelArguments,
        arguments: AssessArguments,
        prompts: Mapping[str, Prompts],
        protocol: Protocol,
        workers: int,
    ) -> None:
        self.arguments, self.prompts, self.protocol = arguments, prompts, protocol
        self.folder = Path(arguments.output_dir or "")
        self.engine_used = choose_engine(arguments.engine, workers)
        self.model = EvaluatedModel(model, self._dtype())
        self.encoder = ChatEncoder(self.model.tokenizer, max_length=arguments.max_length)
        self.renderers = {
            name: Renderer(SUITES[name], protocol, self.encoder, arguments.system_prompt) for name in prompts
        }
        self.max_new_tokens = {
            name: arguments.max_new_tokens or SUITES[name].max_new_tokens[protocol] for name in prompts
        }
        self.asked: dict[str, list[Asked]] = {
            name: ask(
                each.prompts,
                self.renderers[name],
                max_new_tokens=self.max_new_tokens[name],
                max_length=min(arguments.max_length, self.model.positions),
            )
            for name, each in prompts.items()
        }
        self.losses = {name: self._examples(spec) for name, spec in named(arguments.loss_data, "loss_data").items()}
        if arguments.lm_eval_tasks:
            lm_eval_tasks.check_installed()

    def run(self, crew: Crew) -> None:
        """Makes what is missing of answers-SUITE.jsonl; worker 0 also of losses.jsonl and lm_eval.json."""
        for name, each in self.prompts.items():
            generate(
                lambda: self._engine,
                self._decoder(name),
                each.prompts,
                self.asked[name],
                self.folder / f"answers-{name}.jsonl",
                crew,
                batch_size=self.arguments.batch_size,
                max_new_tokens=self.max_new_tokens[name],
                show=_show if self.arguments.show_text else None,
            )
        if crew.main:
            self._cross_entropies()
            if self.arguments.lm_eval_tasks:
                lm_eval_tasks.run(self.arguments, lambda: self._loaded, self.model, self.protocol)
        # The judges need the memory.
        for name in ("_loaded", "_engine"):
            self.__dict__.pop(name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def settings(self) -> dict[str, Any]:
        """Everything the answers depend on. Prompts stand as hashes: a suite may hold text nobody should meet here."""
        arguments = self.arguments
        system = arguments.system_prompt
        probe = [{"role": "user", "content": "PROMPT"}]
        if system is not None:
            probe.insert(0, {"role": "system", "content": system})
        rendered = self.encoder.encode_prompt(probe)
        fp32 = self.model.dtype == torch.float32
        return {
            "model": self.model.name,
            "adapter": self.model.adapter,
            "weights_sha256": self.model.weights_fingerprint(),
            "protocol": self.protocol,
            "engine": self.engine_used["name"],
            "engine_version": self.engine_used["version"],
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "attention": "sdpa",
            "decoding": "greedy (no seed)",
            "padding_side": "left",
            "batch_size": arguments.batch_size,
            "answers_depend_on_batch": not (fp32 and self.engine_used["name"] == "transformers"),
            "max_new_tokens": arguments.max_new_tokens,  # null: each suite's own
            "max_length": arguments.max_length,
            "system_prompt": system,
            "encoder": self.encoder.fingerprint,
            "rendered_prompt": self.model.tokenizer.decode(rendered),
            "bos_tokens": self._bos(rendered),
            "suites": {name: self._suite_settings(name) for name in self.prompts},
            "loss_data": {
                name: {"spec": spec, "sha256": digest([[each.input_ids, each.labels] for each in self.losses[name]])}
                for name, spec in named(arguments.loss_data, "loss_data").items()
            },
            "versions": versions(),
        }

    def _suite_settings(self, name: str) -> dict[str, Any]:
        prompts, asked = self.prompts[name], self.asked[name]
        given = named(self.arguments.suite_data, "suite_data").get(name)
        found = {
            "source": given or own_source(name),
            "licence": SUITES[name].licence,
            "protocol": self.renderers[name].protocol,
            "n": len(prompts.prompts),
            "left_out": dict(prompts.left_out),
            "prompts_sha256": prompts_sha256(prompts),
            "rendered_prompt_sha256": sha256(str(self.model.tokenizer.decode(asked[0].ids))),
            "bos_tokens": self._bos(asked[0].ids),
            "cut_prompts": sum(each.cut for each in asked),
            "max_new_tokens": self.max_new_tokens[name],
        }
        return found | {key: value for key, value in (("suite_data", given), ("note", SUITES[name].note)) if value}

    def _bos(self, ids: list[int]) -> int:
        return ids[:2].count(self.model.tokenizer.bos_token_id)

    def _dtype(self) -> torch.dtype | None:
        wanted = self.arguments.dtype
        if wanted == "auto" and self.protocol == "paper" and torch.cuda.is_available():
            wanted = "fp16"  # as the public Surgery code loads a model it judges
        return None if wanted == "auto" else DTYPES[wanted]

    @cached_property
    def _loaded(self) -> Any:
        print(f"Loading {self.model.name} ({self.model.dtype}, {self.model.device}) ...", flush=True)
        return self.model.load()

    @cached_property
    def _engine(self) -> Engine:
        name = self.engine_used["name"]
        return open_engine(name, self.model, lambda: self._loaded, max_length=self.arguments.max_length)

    def _decoder(self, name: str) -> Any:
        tokenizer, renderer = self.model.tokenizer, self.renderers[name]
        return lambda ids: renderer.answer(str(tokenizer.decode(ids, skip_special_tokens=True)))

    def _examples(self, spec: str) -> list[Example]:
        conversations = read_conversations(spec, flag="loss_data", system_prompt=self.arguments.system_prompt)
        return [self.encoder.encode(conversation) for conversation in conversations]

    def _cross_entropies(self) -> None:
        path = self.folder / "losses.jsonl"
        done = {line["name"] for line in resume_lines(path)}
        for name, examples in self.losses.items():
            if name in done:
                continue
            loss = cross_entropy(
                self._loaded, examples, pad_token=pad_token(self.model.tokenizer), label=f"cross-entropy {name}"
            )
            line = {
                "name": name,
                "value": loss.value,
                "tokens": loss.tokens,
                "rows": len(examples),
                "truncated_rows": sum(example.truncated for example in examples),
            }
            append_lines(path, [line])


def _show(prompt: Prompt, answer: str) -> None:
    """--show_text: on the terminal alone, never in a file that a tracker or a scheduler keeps."""
    if sys.stdout.isatty():
        print(f"--- {prompt.id}\n{prompt.text}\n{prompt.input}\n>>> {answer}", flush=True)
