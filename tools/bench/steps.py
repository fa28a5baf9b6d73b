"""The parts of the step benchmark: what is run against what, and the figures made of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from pipeline.training.engine import Engine, build_engine
from pipeline.training.prepared import Prepared
from tools.bench.eager_step import EagerTrainer, load_eager
from tools.bench.flops import bound
from tools.bench.layouts import Layout, Setting, resolve, trained_tokens
from tools.bench.product_step import ProductStep
from tools.bench.timing import Quartiles, Seconds, fit, interleave, quartiles, ratio
from tools.bench.trl_sft import MODES, TrlProcess, missing_mode

REFERENCE_MAX_LENGTH = 512  # what the public code, and the product's default, cut a reference text to
KINDS = ("passes", "step")  # forward and backward passes; the whole step with the optimizer

Part = dict[str, Any]


class StepBench:
    """One model on one engine, and the comparisons on it."""

    def __init__(self, setting: Setting, device: torch.device, repeats: int) -> None:
        self.setting = setting
        self.device = device
        self.repeats = repeats
        self.engine: Engine | None = None

    def __enter__(self) -> StepBench:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.engine is not None:
            self.engine.deepspeed.destroy()
            self.engine = None

    def steps(self, runs: Mapping[str, Prepared]) -> dict[str, ProductStep]:
        """The runs as steps of the one engine, which the first run builds: their weights are the same."""
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        if self.engine is None:
            self.engine = build_engine(next(iter(runs.values())), self.device)
            unset_hf_deepspeed_config()  # else every model loaded from here on would be sharded
        return {name: ProductStep.of(run, self.engine) for name, run in runs.items()}

    def layout(self, layout: Layout) -> Part:
        """Surgery against SFT at one layout, and against the bound."""
        _say(f"layout {layout}")
        runs = resolve(self.setting, layout)
        steps = self.steps(runs)
        seconds = interleave(steps, self.repeats)
        trained = trained_tokens(runs["surgery"])
        limit = bound(runs["surgery"].model_config.get_text_config(), layout, trained)
        ratios = _ratios(seconds["surgery"], seconds["sft"])
        return {
            "layout": str(layout),
            "user_tokens": layout.user_tokens,
            "trained_tokens": trained,
            "reference_tokens": layout.references * layout.reference_tokens,
            "positive_heads": steps["surgery"].values["positive_heads"],
            "seconds": _columns(seconds),
            "ratio": {kind: each._asdict() for kind, each in ratios.items()},
            "bound": limit,
            "holds": {kind: each.median <= limit for kind, each in ratios.items()},
        }

    def lengths(self, lengths: Sequence[int]) -> list[Part]:
        """SFT, Surgery and three eager passes over one user text of each length; time, peak memory, agreement."""
        eager = EagerTrainer(load_eager(self.setting.model, self.device, self.setting.bf16))
        return [self._length(length, eager) for length in lengths]

    def _length(self, length: int, eager: EagerTrainer) -> Part:
        layout = Layout(1, length, 2, min(length, REFERENCE_MAX_LENGTH))
        _say(f"length {length}")
        runs = resolve(self.setting, layout)
        steps = self.steps(runs)
        user, harmful, harmless = (runs["surgery"].streams[name].pool[0] for name in ("train", "harmful", "harmless"))
        texts = ([user], harmful, harmless, self.setting.alpha)
        ways: dict[str, Callable[[], Seconds]] = {**steps, "eager": lambda: eager.step(*texts)}
        seconds = interleave(ways, self.repeats)
        # After the timed steps, so that what the first step allocates for good is there.
        peaks = {name: step.peak() for name, step in steps.items()} | {"eager": eager.peak(*texts)}
        wanted = eager.values
        return {
            "tokens": length,
            "layout": str(layout),
            "seconds": _columns(seconds),
            "speedup": {kind: e._asdict() for kind, e in _ratios(seconds["eager"], seconds["surgery"]).items()},
            "peak_bytes": peaks,
            # Of the same rows: what Surgery's step computed, relative to the three eager passes.
            "difference": {
                name: abs(steps["surgery"].values[name] - value) / max(abs(value), 1e-12)
                for name, value in wanted.items()
            },
            "eager_values": wanted,
        }

    def memory(self, lengths: Sequence[int]) -> list[Part]:
        """Peak memory of the passes of SFT and of Surgery where all three texts have a length."""
        parts = []
        for length in lengths:
            layout = Layout(1, length, 2, length)
            _say(f"memory {layout}")
            peaks = {name: step.peak() for name, step in self.steps(resolve(self.setting, layout)).items()}
            parts.append({"tokens": length, "layout": str(layout), "peak_bytes": peaks})
        return parts

    def trl(self, layout: Layout) -> Part:
        """SFT's tokens per second beside SFTTrainer's."""
        runs = resolve(self.setting, layout)
        pool = runs["sft"].streams["train"].pool
        rows = [(pool[i].input_ids, pool[i].labels) for i in range(len(pool))]
        skipped = {mode: reason for mode in MODES if (reason := missing_mode(mode, self.device))}
        sft = self.steps({"sft": runs["sft"]})["sft"]
        with ExitStack() as children:
            ways: dict[str, Any] = {"sft": lambda: sft().step}
            for mode in MODES:
                if mode not in skipped:
                    _say(f"trl {mode} {layout}")
                    ways[mode] = children.enter_context(
                        TrlProcess(
                            mode, rows, model=self.setting.model, ds_config=self.setting.ds_config,
                            bf16=self.setting.bf16,
                        )
                    )  # fmt: skip
            seconds = interleave(ways, self.repeats, warmup=2)
            version = next(way.version for way in ways.values() if isinstance(way, TrlProcess))
        tokens = {name: quartiles([layout.user_tokens / s for s in each]) for name, each in seconds.items()}
        faster = max((mode for mode in ways if mode != "sft"), key=lambda mode: tokens[mode].median)
        return {
            "layout": str(layout),
            "seconds": seconds,
            "tokens_per_second": {name: each._asdict() for name, each in tokens.items()},
            "faster": faster,
            "ratio": ratio(seconds[faster], seconds["sft"])._asdict(),
            "skipped": skipped,
            "version": version,
        }


def memory_fits(lengths: Sequence[Part], memory: Sequence[Part]) -> Part:
    """Straight lines and parabolas through peak memory over lengths; empty below four lengths.

    `quadratic_share`: the part of the longest text's peak that grows with the length's square.
    """
    fits: Part = {}
    tokens = [each["tokens"] for each in lengths]
    if len(tokens) < 4:
        return fits
    for name in ("surgery", "eager"):
        values = [each["peak_bytes"][name] for each in lengths]
        parabola = fit(tokens, values, 2).coefficients
        fits[name] = {
            "linear_r_squared": fit(tokens, values, 1).r_squared,
            "quadratic_share": parabola[0] * tokens[-1] ** 2 / values[-1],
        }
    above = [each["peak_bytes"]["surgery"] - each["peak_bytes"]["sft"] for each in memory]
    line = fit(tokens, above, 1)
    fits["surgery_above_sft"] = {"bytes_per_token": line.coefficients[0], "linear_r_squared": line.r_squared}
    return fits


def _ratios(above: Sequence[Seconds], below: Sequence[Seconds]) -> dict[str, Quartiles]:
    return {kind: ratio([getattr(s, kind) for s in above], [getattr(s, kind) for s in below]) for kind in KINDS}


def _columns(seconds: Mapping[str, Sequence[Seconds]]) -> dict[str, dict[str, list[float]]]:
    return {name: {kind: [getattr(s, kind) for s in each] for kind in KINDS} for name, each in seconds.items()}


def _say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)
