"""Settings that contradict each other, do nothing or are out of range, in flags and in the ds_config."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.preflight import Refused, resolve

STAGE_3 = {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("ds_config", "words", "problem"),
    [
        (
            {**STAGE_3, "gradient_clippping": 1.0},
            [],
            "{tmp}/ds.json:5: gradient_clippping: DeepSpeed knows no such key; did you mean gradient_clipping?",
        ),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_sise": 5}},
            [],
            "{tmp}/ds.json:4: zero_optimization.reduce_bucket_sise: DeepSpeed knows no such key; "
            "did you mean reduce_bucket_size?",
        ),
        (
            {**STAGE_3, "gradient_clipping": 0.5},
            ["--max_grad_norm", "1"],
            "--ds_config {tmp}/ds.json: gradient_clipping 0.5 contradicts --max_grad_norm 1.0: drop the flag, or "
            'write "auto" into the file',
        ),
        (
            {**STAGE_3, "train_micro_batch_size_per_gpu": 2},
            [],
            "--ds_config {tmp}/ds.json: train_micro_batch_size_per_gpu 2 contradicts --per_device_train_batch_size 4: "
            'drop the flag, or write "auto" into the file',
        ),
        (
            {**STAGE_3, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
            ["--optim", "adamw_torch_fused"],
            "--optim adamw_torch_fused has no effect with the optimizer section of --ds_config {tmp}/ds.json: drop "
            "the flag or the section",
        ),
        (
            {"zero_optimization": {"stage": 2}},
            [],
            "--ds_config {tmp}/ds.json: zero_optimization.stage is 2, and training needs stage 3",
        ),
        (
            {**STAGE_3, "sequence_parallel_size": 2},
            [],
            "{tmp}/ds.json:5: sequence_parallel_size: sequence parallelism splits the keys that the sink column "
            "reads; remove the key",
        ),
        (
            {**STAGE_3, "compile": {"deepcompile": True}},
            [],
            "--ds_config {tmp}/ds.json: compile.deepcompile rewrites the graph that the sink penalty is injected "
            "into: turn it off",
        ),
    ],
)
def test_ds_config(
    refused: Refused, tmp_path: Path, ds_config: dict[str, Any], words: list[str], problem: str
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(ds_config, indent=1))
    assert refused("--ds_config", "{tmp}/ds.json", *words) == [problem]


def test_a_missing_ds_config(refused: Refused) -> None:
    assert refused("--ds_config", "{tmp}/none.json") == ["--ds_config {tmp}/none.json: no such file"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--lora_alpha", "3"], "--lora_alpha 3 has no effect without --lora_r: leave it out"),
        (
            ["--lora_target_modules", "q_proj", "v_proj"],
            "--lora_target_modules q_proj v_proj has no effect without --lora_r: leave it out",
        ),
        (["--poison_ratio", "0.1"], "--poison_ratio 0.1 has no effect without --attack_data: leave it out"),
        (["--eval_steps", "3"], "--eval_steps 3 has no effect without --eval_data: leave it out"),
        (
            ["--gradient_checkpointing_kwargs", "{}"],
            "--gradient_checkpointing_kwargs {} has no effect without --gradient_checkpointing: leave it out",
        ),
        (
            ["--max_steps", "3", "--num_train_epochs", "2"],
            "--num_train_epochs 2.0 has no effect with --max_steps, which replaces it: leave it out",
        ),
        (
            ["--warmup_steps", "3"],
            "--warmup_steps 3.0 has no effect with --lr_scheduler_type constant (constant_with_warmup has a warm-up): "
            "leave it out",
        ),
        (["--show_text"], "--show_text True has no effect without --dry_run: leave it out"),
        (
            ["--attack_data", "policy:attack"],
            "--attack_data policy:attack needs --poison_ratio, the share of the training rows taken from it",
        ),
        (
            ["--attack_data", "policy:attack", "--poison_ratio", "2"],
            "--poison_ratio 2.0: give a share between 0 and 1",
        ),
        (["--learning_rate", "-1"], "--learning_rate -1.0: give 0 or more"),
        (["--learning_rate", "nan"], "--learning_rate nan: give 0 or more"),
        (["--adam_beta2", "1"], "--adam_beta2 1.0: give 0 or more, below 1"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0.0: give more than 0, or --max_steps"),
        (["--max_steps", "0"], "--max_steps 0: give 1 or more, or leave it out for --num_train_epochs"),
        (["--logging_steps", "0"], "--logging_steps 0: give 1 or more"),
        (["--sample_num", "0"], "--sample_num 0: give 1 or more"),
        (["--seed", "-1"], "--seed -1: give 0 or more"),
        (["--lora_r", "-4"], "--lora_r -4: give 0 or more"),
        (["--lora_r", "4", "--lora_dropout", "1"], "--lora_dropout 1.0: give 0 or more, below 1"),
        (
            ["--gradient_checkpointing", "--gradient_checkpointing_kwargs", "{"],
            "--gradient_checkpointing_kwargs {: not valid JSON (Expecting property name enclosed in double quotes: "
            'line 1 column 2 (char 1)): write {"use_reentrant": false}',
        ),
        (
            ["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"reentrant": true}'],
            '--gradient_checkpointing_kwargs {"reentrant": true}: the only setting is {"use_reentrant": true|false}',
        ),
    ],
)
def test_settings_without_effect_or_out_of_range(refused: Refused, words: list[str], problem: str) -> None:
    assert refused(*words) == [problem]


def test_reference_pools_have_no_effect_on_sft(refused: Refused, pools: dict[str, Path]) -> None:
    assert refused("--method", "sft") == [
        f"--{name}_data {pools[name]} has no effect with this --method, which reads no such pool: leave it out"
        for name in ("harmful", "harmless")
    ]


def test_a_schedule_is_one_that_can_be_built(refused: Refused, good_flags: list[str]) -> None:
    from transformers import get_scheduler

    for name in ("nosuch", "reduce_lr_on_plateau", "cosine_with_min_lr"):
        (problem,) = refused("--lr_scheduler_type", name)
        assert problem.startswith(f"--lr_scheduler_type {name}: choose one of constant, ")
    for name in problem.split("choose one of ")[1].split(", "):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=9)
        resolve([*good_flags, "--lr_scheduler_type", name])


def test_a_tracker_whose_package_is_missing(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed, on a machine where it is
    assert refused("--report_to", "trackio") == [
        "--report_to trackio: the package trackio is not installed: pip install trackio"
    ]


def test_more_tokens_than_a_device_may_hold(refused: Refused, good_flags: list[str]) -> None:
    largest = int(resolve(good_flags).budget["largest_packed_row"])
    (problem,) = refused("--max_tokens_per_device", largest - 1)
    assert re.fullmatch(
        rf"--max_tokens_per_device {largest - 1}: step \d+ packs {largest} tokens on rank 0 "
        r"\((train\.jsonl:\d+, ){3}train\.jsonl:\d+\): lower --per_device_train_batch_size and raise "
        r"--gradient_accumulation_steps, or lower --max_length",
        problem,
    )
    resolve([*good_flags, "--max_tokens_per_device", str(largest)])
