"""Texts of exact token counts, and a training run over them, resolved by the product's own preflight.

Every row is longer than its limit, so `--max_length` and `--reference_max_length` cut it to exactly that many tokens.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.builtin_model import resolve_model
from pipeline.config import DataArguments, LoraArguments, ModelArguments, TrainArguments, parse
from pipeline.data.chat import ChatEncoder
from pipeline.methods import load_method
from pipeline.training.distributed import World
from pipeline.training.preflight import prepare
from pipeline.training.prepared import Prepared

WORDS = ("bread", "kite", "warm", "cold", "tea", "room", "line", "wind", "salt", "soup", "stone", "river")
PROMPT_SHARE = 0.75  # of a user's row; the last quarter is the answer, which is trained


@dataclass(frozen=True)
class Layout:
    """One step's texts: `texts` user rows of `tokens` tokens, `references` reference texts of `reference_tokens`."""

    texts: int
    tokens: int
    references: int
    reference_tokens: int

    @classmethod
    def parse(cls, text: str) -> Layout:
        """From `8x512+2x512`. Errors: ValueError for another form, or an odd number of references."""
        found = re.fullmatch(r"(\d+)x(\d+)\+(\d+)x(\d+)", text)
        numbers = [int(each) for each in found.groups()] if found else [0]
        if not all(numbers) or numbers[2] % 2:
            raise ValueError(
                f"--layouts {text}: write user texts x tokens + reference texts x tokens, such as 8x512+2x512, "
                "with as many harmful as harmless references"
            )
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.texts}x{self.tokens}+{self.references}x{self.reference_tokens}"

    @property
    def user_tokens(self) -> int:
        """Tokens of the user's rows."""
        return self.texts * self.tokens


@dataclass(frozen=True)
class Setting:
    """What all layouts of a benchmark share. `model` is a folder; `folder` is where rows and token caches go."""

    model: str
    ds_config: str
    bf16: bool
    attention: str
    alpha: float
    folder: Path
    world: World


def resolve(setting: Setting, layout: Layout) -> dict[str, Prepared]:
    """A layout as a run of "surgery" and as a run of "sft" over the same user rows, nothing loaded yet.

    Errors: ValueError where the product refuses the settings, or a tokenizer makes other lengths.
    """
    folder = setting.folder / str(layout)
    folder.mkdir(parents=True, exist_ok=True)
    for pool, rows, tokens in (
        ("train", layout.texts * setting.world.size, layout.tokens),
        ("harmful", layout.references // 2, layout.reference_tokens),
        ("harmless", layout.references // 2, layout.reference_tokens),
    ):
        write_rows(folder / f"{pool}.jsonl", (pool, pool), rows, tokens, words_of(setting.model, tokens))
    # A learning rate of 0 costs what any other does, and leaves the same weights to every step.
    flags = {
        "method": "surgery", "model_name_or_path": setting.model, "ds_config": setting.ds_config, "bf16": setting.bf16,
        "attention": setting.attention, "alpha": setting.alpha, "max_steps": 1, "learning_rate": 0,
        "output_dir": folder / "run", "cache_dir": folder / "cache",
        "per_device_train_batch_size": layout.texts, "max_length": layout.tokens,
        "reference_max_length": layout.reference_tokens,
        **{f"{pool}_data": folder / f"{pool}.jsonl" for pool in ("train", "harmful", "harmless")},
    }  # fmt: skip
    if layout.references > 2:
        flags["references_per_step"] = layout.references // 2
    method = load_method("surgery")
    parsed = parse(
        [ModelArguments, DataArguments, LoraArguments, TrainArguments, method.Config],
        [word for name, value in flags.items() for word in (f"--{name}", str(value))],
        description="benchmark",
    )
    surgery = prepare(parsed, "surgery", method(parsed[method.Config]), setting.world)
    for name, tokens in (("train", layout.tokens), ("harmful", layout.reference_tokens)):
        lengths = set(surgery.streams[name].pool.lengths.tolist())
        if lengths != {tokens}:
            raise ValueError(f"--layouts {layout}: this tokenizer makes {name} rows of {sorted(lengths)} tokens")
    plain = load_method("sft")
    sft = replace(
        surgery, method_name="sft", method=plain(plain.Config()), streams={"train": surgery.streams["train"]}
    )
    return {"sft": sft, "surgery": surgery}


def trained_tokens(run: Prepared) -> int:
    """Trained tokens of one step, on all ranks."""
    return run.streams["train"].trained_tokens(0)


def words_of(model: str, tokens: int) -> tuple[int, int]:
    """Words of a prompt that fills its share of a row of `tokens`, and of an answer that is certainly too long."""
    from transformers import AutoTokenizer

    encoder = ChatEncoder(AutoTokenizer.from_pretrained(model), max_length=tokens)

    def length(words: int) -> int:
        return len(encoder.encode_prompt([{"role": "user", "content": _text(random.Random(0), words)}]))

    template, a_word = length(1), (length(257) - length(1)) / 256
    return max(1, int((PROMPT_SHARE * tokens - template) / a_word)), tokens


def write_rows(path: Path, seeds: tuple[str, str], rows: int, tokens: int, words: tuple[int, int]) -> None:
    """Rows of one turn each. `seeds`: of the prompts and of the answers; pools with one seed have the same texts.
    `words`: of a prompt and of an answer."""
    turns = [
        (role, random.Random(f"{role} {seed} {tokens}"), count)
        for role, seed, count in zip(("user", "assistant"), seeds, words, strict=True)
    ]
    lines = (
        json.dumps({"messages": [{"role": role, "content": _text(drawn, count)} for role, drawn, count in turns]})
        for _ in range(rows)
    )
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _text(generator: random.Random, words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(words))


def model_config(path: str) -> Any:
    """The transformers configuration. Errors: ValueError where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model_name_or_path {path}: {str(error).splitlines()[0]}") from error


def cut_model(name_or_path: str, layers: int | None, folder: Path) -> str:
    """The model's folder; of a model with more layers than `layers`, a copy below `folder` with only the first ones.
    None keeps all.

    Errors: ValueError where transformers cannot load the model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve_model(name_or_path)
    config = model_config(source)
    text = config.get_text_config()
    if layers is None or layers >= text.num_hidden_layers:
        return source
    target = folder / f"{layers}-layers"
    if not target.is_dir():
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        model: Any = AutoModelForCausalLM.from_pretrained(source, config=config)
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return str(target)
