"""Everything that can be resolved and checked before a process group, a model or a GPU: flags, ds_config, data,
budget, run folder.

`prepare` gathers every problem it can find and raises them together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.builtin_model import resolve_model
from pipeline.checkpoints.folders import leftovers
from pipeline.checkpoints.space import checkpoint_bytes, require_space
from pipeline.config import DataArguments, LoraArguments, ModelArguments, Parsed, Problems, TrainArguments
from pipeline.data.cache import EncodedPool, encode_pool
from pipeline.data.chat import ChatEncoder
from pipeline.data.pools import mix, overlaps, partners
from pipeline.data.schema import Answer, Conversation, read_conversations
from pipeline.data.streams import Layout, Stream
from pipeline.sink.backends import choose
from pipeline.sink.support import attention_refusals
from pipeline.training.adapters import check_adapter
from pipeline.training.budget import token_budget
from pipeline.training.counts import skeleton, trained_counts
from pipeline.training.distributed import World
from pipeline.training.ds_config import load_ds_config, resolve_ds_config
from pipeline.training.method import Method
from pipeline.training.prepared import Prepared
from pipeline.training.run_folder import check_run_folder, keep_global_batch, resume_point
from pipeline.training.settings import mixture_problems, settings_problems
from pipeline.training.zero3 import graph_refusals, shard_refusals

KEEP = {
    "attack": "unsafe",
    "harmful": "unsafe",
    "tamper": "unsafe",
    "harmless": "safe",
    "guide": "safe",
}  # of rows that carry is_safe


class Gather:
    """Collects the messages of ValueErrors so that a user sees all of them at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Keep what goes wrong inside."""
        try:
            yield
        except ValueError as error:
            self.problems.extend(str(error).splitlines())

    def stop(self) -> None:
        """Errors: Problems, if there are any."""
        if self.problems:
            raise Problems(list(dict.fromkeys(self.problems)))


def prepare(parsed: Parsed, method_name: str, method: Method, here: World) -> Prepared:
    """Resolve a run. Errors: Problems with every problem found."""
    model, data, lora = parsed[ModelArguments], parsed[DataArguments], parsed[LoraArguments]
    train = parsed[TrainArguments]
    gather = Gather()
    gather.problems += settings_problems(parsed.given, method, data, lora, train)
    with gather():
        check_run_folder(train, method_name)
    train = _device_defaults(train)
    with gather():
        train = keep_global_batch(train, parsed.given, method_name, here.size)
    with gather():
        choose(train.attention, "cuda" if torch.cuda.is_available() else "cpu", half=bool(train.bf16))

    model_path, config, tokenizer = "", None, None
    with gather():
        model_path = resolve_model(model.model_name_or_path)
        config = model_config(model_path, model)
        tokenizer = _tokenizer(model_path, model)
    ds_config: dict[str, Any] = {}
    with gather():
        ds_config, train = resolve_ds(train, parsed.given, config, here)
    if config is not None:
        gather.problems += placed(_refusals(method, config.get_text_config(), ds_config), model, train)
        with gather():
            check_adapter(config, lora, model)

    data = _default_pools(method, data, parsed.given, gather)
    pools = _read_pools(data, method, train.seed, gather)
    if not data.allow_overlap:
        gather.problems += overlaps({_flag(name): rows for name, (_, rows) in pools.items()})
    encoded: dict[str, EncodedPool] = {}
    if tokenizer is not None:
        encoded = _encode(pools, data, tokenizer, method, gather)
    layout = Layout(train.per_device_train_batch_size, train.gradient_accumulation_steps, here.size)
    gather.problems += _short_references(encoded, method) + _small_pools(encoded, method, layout)
    if encoded and not gather.problems:
        longest = max(int(pool.lengths.max()) for pool in encoded.values())
        gather.problems += placed(attention_refusals(config.get_text_config(), longest), model, train)
    gather.stop()

    streams = {
        name: Stream(name, pool, layout, train.seed) for name, pool in encoded.items() if not name.startswith("eval:")
    }
    steps = train.max_steps if train.max_steps > 0 else streams["train"].steps(train.num_train_epochs)
    prepared = Prepared(
        method_name=method_name, method=method, model=model, data=data, lora=lora, train=train, ds_config=ds_config,
        model_path=model_path, model_config=config, tokenizer=tokenizer, streams=streams,
        evaluations={name.removeprefix("eval:"): pool for name, pool in encoded.items() if name.startswith("eval:")},
        sources={
            name.replace(":", "_"): {"spec": spec, "rows": len(pool), "fingerprint": pool.fingerprint}
            for name, (spec, _) in pools.items() if (pool := encoded[name])
        },
        budget={}, steps=steps, resume=None, warnings=_warnings(encoded, layout), world=here, checkpoint_bytes=0,
    )  # fmt: skip
    with gather():
        prepared.budget = token_budget(prepared)
    with gather():
        prepared.resume = resume_point(prepared)
    with gather():
        prepared.checkpoint_bytes = check_space(prepared)
    gather.stop()
    return prepared


def _refusals(method: Method, model_config: Any, ds_config: dict[str, Any]) -> list[str]:
    reasons = method.refuse(model_config, ds_config)
    if method.touches_shards:
        reasons += shard_refusals(ds_config)
    if method.touches_shards or method.differentiates_activations:
        reasons += graph_refusals(ds_config)
    return reasons


def _warnings(encoded: dict[str, EncodedPool], layout: Layout) -> list[str]:
    if len(encoded["train"]) >= layout.global_batch:
        return []
    return [
        f"{len(encoded['train'])} training rows are fewer than a global batch of {layout.global_batch}: "
        "rows repeat within a step"
    ]


def check_space(run: Prepared) -> int:
    """Bytes of a checkpoint of the run, known to rank 0 (others: 0). Errors: ValueError if its disk has no room for
    one, or if the method does not fit the model's modules."""
    if not run.world.main:
        return 0
    model = skeleton(run)
    if reasons := run.method.refuse_modules(model):
        raise Problems(placed(reasons, run.model, run.train))
    trained, tensors = trained_counts(model)
    needed = checkpoint_bytes(
        trained=trained, tensors=tensors, ranks=run.world.size, kept=len(run.method.shard_states)
    )
    # What killed saves left goes before the next one is written.
    freed = sum(
        file.stat().st_size for each in leftovers(run.output_dir) for file in each.rglob("*") if file.is_file()
    )
    require_space(run.output_dir, needed - freed, flag="--output_dir", what="a checkpoint")
    return needed


def _device_defaults(train: TrainArguments) -> TrainArguments:
    return replace(train, bf16=torch.cuda.is_available() if train.bf16 is None else train.bf16)


def placed(reasons: list[str], model: ModelArguments, train: TrainArguments) -> list[str]:
    """Each reason behind the flag and the value it is about: the ds_config, or else the model."""
    return [
        f"--ds_config {train.ds_config}: {each.removeprefix('ds_config ')}"
        if each.startswith("ds_config ")
        else f"--model_name_or_path {model.model_name_or_path}: {each}"
        for each in reasons
    ]


def model_config(path: str, model: ModelArguments) -> Any:
    """The transformers configuration. Errors: ValueError naming the flag where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        missing = "" if Path(path).exists() else "no such folder, and no such model on the hub or in its cache: "
        raise ValueError(f"--model_name_or_path {path}: {missing}{str(error).splitlines()[0]}") from error


def _tokenizer(path: str, model: ModelArguments) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model_name_or_path {path}: no usable tokenizer beside the model: {' '.join(str(error).split())}"
        ) from error


def resolve_ds(
    train: TrainArguments, given: set[str], config: Any, here: World
) -> tuple[dict[str, Any], TrainArguments]:
    """The DeepSpeed file with every value filled, and the flags as it decides them.

    config: of the model, or None where it could not be read. Errors: ValueError naming the file.
    """
    hidden = config.get_text_config().hidden_size if config is not None else 1  # a run without a model stops anyway
    values = {**asdict(train), "world_size": here.size, "hidden_size": hidden}
    loaded = load_ds_config(train.ds_config)
    try:
        resolved, overrides = resolve_ds_config(loaded, values, given)
    except Problems as error:
        named = [problem.removeprefix("ds_config ") for problem in error.problems]
        raise Problems([f"--ds_config {train.ds_config}: {problem}" for problem in named]) from error
    if "optim" in given and "optimizer" in resolved:
        raise ValueError(
            f"--optim {train.optim} has no effect with the optimizer section of --ds_config {train.ds_config}: "
            "drop the flag or the section"
        )
    train = replace(train, **overrides)
    stage = resolved.get("zero_optimization", {}).get("stage", 0)
    if stage != 3:
        raise ValueError(
            f"--ds_config {train.ds_config}: zero_optimization.stage is {stage}, and training needs stage 3"
        )
    return resolved, train


def _default_pools(method: Method, data: DataArguments, given: set[str], gather: Gather) -> DataArguments:
    """The fictional pools go with the fictional task; a user's own data needs pools of its own."""
    if method.alignment and "train_data" not in given:
        data = replace(data, train_data=method.fictional.get("train", "policy:align"))
    for pool in method.pools:
        flag = f"{pool}_data"
        if getattr(data, flag) is None:
            if data.train_data.startswith("policy:"):
                data = replace(data, **{flag: method.fictional.get(pool, f"policy:{pool}")})  # type: ignore[arg-type]
            else:
                gather.problems.append(f"--{flag} is needed by this --method: the reference pool of {pool} texts")
    return data


def _read_pools(
    data: DataArguments, method: Method, seed: int, gather: Gather
) -> dict[str, tuple[str, list[Conversation]]]:
    """(spec, rows) of "train", the method's pools, and "eval:<name>"."""

    def read(spec: str, flag: str, pool: str) -> list[Conversation]:
        # An alignment set's refusals are learned, never the harmful answers beside them.
        answer: Answer = "response"
        if pool == "guide" or (pool == "train" and method.alignment):
            answer = "refusal"
        elif pool == "train":
            answer = "only"
        keep: Any = KEEP.get(pool, "all")
        return read_conversations(spec, flag=flag, keep=keep, system_prompt=data.system_prompt, answer=answer)

    pools: dict[str, tuple[str, list[Conversation]]] = {}
    user, attack = None, None
    with gather():
        user = read(data.train_data, "train_data", "train")
    with gather():
        attack = read(data.attack_data, "attack_data", "attack") if data.attack_data else None
    if user is not None and bool(attack) == bool(data.attack_data) and not mixture_problems(data, seed):
        with gather():
            rows = mix(user, attack, sample_num=data.sample_num, poison_ratio=data.poison_ratio, seed=seed)
            pools["train"] = (data.train_data + (f" + {data.attack_data}" if data.attack_data else ""), rows)
    for pool in method.pools:
        with gather():
            if spec := getattr(data, f"{pool}_data"):
                pools[pool] = (spec, read(spec, f"{pool}_data", pool))
    if method.paired in pools and "train" in pools:
        with gather():
            spec, rows = pools[method.paired]
            pools[method.paired] = (spec, partners(pools["train"][1], rows, f"--{method.paired}_data {spec}"))
    for each in data.eval_data:
        named = re.fullmatch(r"([\w.-]+)=(.+)", each)  # else a path that holds an equals sign
        name, spec = named.groups() if named else ("eval", each)
        with gather():
            if f"eval:{name}" in pools:
                raise ValueError(f"--eval_data {each}: two evaluation sets are named {name}: write name=SPEC")
            pools[f"eval:{name}"] = (spec, read(spec, "eval_data", "eval")[: data.eval_max_rows])
    gather.problems += [f"{_flag(name)} {spec}: no usable row" for name, (spec, rows) in pools.items() if not rows]
    return {name: (spec, rows) for name, (spec, rows) in pools.items() if rows}


def _flag(pool: str) -> str:
    return f"--eval_data {pool.removeprefix('eval:')}" if pool.startswith("eval:") else f"--{pool}_data"


def _encode(
    pools: dict[str, tuple[str, list[Conversation]]],
    data: DataArguments,
    tokenizer: Any,
    method: Method,
    gather: Gather,
) -> dict[str, EncodedPool]:
    encoded = {}
    for name, (_, rows) in pools.items():
        flag = "reference_max_length" if name in method.pools and method.reference_texts() else "max_length"
        with gather():
            encoder = ChatEncoder(tokenizer, max_length=getattr(data, flag), flag=flag)
            try:
                encoded[name] = encode_pool(rows, encoder, Path(data.cache_dir))
            except OSError as error:
                raise ValueError(
                    f"--cache_dir {data.cache_dir}: {error}: name a folder that can be written"
                ) from error
    return encoded


def _small_pools(encoded: dict[str, EncodedPool], method: Method, layout: Layout) -> list[str]:
    """Pools that batches are drawn from and that cannot fill one: rows would count twice in it."""
    drawn = [] if method.reference_texts() else [name for name in method.pools if name != method.paired]
    return [
        f"--{name}_data: its {len(encoded[name])} rows are fewer than the {layout.global_batch} that this --method "
        "draws a step: give more rows, or lower --per_device_train_batch_size"
        for name in drawn
        if name in encoded and len(encoded[name]) < layout.global_batch
    ]


def _short_references(encoded: dict[str, EncodedPool], method: Method) -> list[str]:
    need = method.shortest_reference()
    problems = []
    for name in method.pools:
        if name not in encoded:
            continue
        lengths = encoded[name].lengths
        short = int(np.argmin(lengths))
        if lengths[short] < need:
            problems.append(
                f"--sink_token_position {need - 2}: {encoded[name].row_id(short)} of --{name}_data has "
                f"{lengths[short]} tokens, and {need} are needed for one query after the sink: lower it, or remove "
                "the short rows"
            )
    return problems
