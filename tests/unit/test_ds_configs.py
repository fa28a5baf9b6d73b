"""The DeepSpeed files of this repository, and what happens to a wrong one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.training.ds_config import load_ds_config, resolve_ds_config
from pipeline.training.ds_schema import deepspeed_problems

DS_CONFIGS = sorted(Path(__file__).parents[2].glob("ds_configs/*.json"))

FLAGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "max_grad_norm": 1.0,
    "bf16": False,
    "learning_rate": 5e-6,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "world_size": 2,
    "hidden_size": 64,
}


def write(tmp_path: Path, config: dict[str, Any] | str) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config, indent=2))
    return path


def resolve(
    config: dict[str, Any], given: set[str] | None = None, **flags: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    return resolve_ds_config(config, FLAGS | flags, given or set(flags))


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.name)
def test_every_file_resolves_and_deepspeed_accepts_it(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    resolved, decided = resolve(load_ds_config(path), world_size=1)
    engine = DeepSpeedConfig(resolved)
    assert decided == {}
    assert "auto" not in json.dumps(resolved)
    assert engine.zero_optimization_stage == 3
    assert engine.zero_config.gather_16bit_weights_on_model_save is False
    assert engine.zero_config.reduce_bucket_size == 64 * 64
    assert engine.zero_config.prefetch_bucket_size == 3686  # 0.9 x 64 x 64, rounded down
    assert engine.zero_config.param_persistence_threshold == 640
    assert engine.grad_accum_dtype == "fp32"
    assert (engine.train_batch_size, engine.gradient_clipping) == (8, 1.0)


def test_every_file_is_explained_in_the_readme() -> None:
    readme = (DS_CONFIGS[0].parent / "README.md").read_text()

    def keys(section: dict[str, Any]) -> set[str]:
        return set(section).union(*(keys(value) for value in section.values() if isinstance(value, dict)))

    for path in DS_CONFIGS:
        missing = [key for key in sorted({path.name} | keys(load_ds_config(path))) if f"`{key}`" not in readme]
        assert not missing, f"ds_configs/README.md does not explain {missing} of {path.name}"


def test_offload_optimizer_follows_the_flags() -> None:
    resolved, _ = resolve(
        load_ds_config(DS_CONFIGS[0].parent / "z3_offload.json"), learning_rate=1e-4, adam_beta2=0.95
    )
    assert resolved["optimizer"]["params"] == {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0}


@pytest.mark.parametrize(
    "key",
    [
        *("scheduler", "fp16", "bf16", "zero_optimization", "torch_autocast", "data_types", "gradient_clipping"),
        *("activation_checkpointing", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "comms_logger"),
        *("tensorboard", "wandb", "csv_monitor", "comet", "autotuning", "data_efficiency", "aio", "hybrid_engine"),
        *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print", "dump_state", "timers"),
        *("prescale_gradients", "gradient_predivide_factor", "communication_data_type", "checkpoint", "compile"),
        *("seq_parallel_communication_data_type", "tensor_parallel", "dataloader_drop_last", "pipeline"),
    ],
)
def test_a_key_that_the_installed_deepspeed_reads_is_known(key: str) -> None:
    value: Any = {} if key not in ("gradient_clipping", "steps_per_print") else 1
    unknown = [keys for keys, reason in deepspeed_problems({key: value}) if "knows no such key" in reason]
    assert unknown == []


UNKNOWN = "DeepSpeed knows no such key; did you mean"


@pytest.mark.parametrize(
    ("config", "line", "message"),
    [
        ({"gradient_clippping": 1.0}, 2, f"gradient_clippping: {UNKNOWN} gradient_clipping?"),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_sise": 5}},
            4,
            f"zero_optimization.reduce_bucket_sise: {UNKNOWN} reduce_bucket_size?",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}},
            5,
            f"zero_optimization.offload_param.devise: {UNKNOWN} device?",
        ),
        (
            {"zero_optimization": {"stage3_prefetch_bucket_size": -1}},
            3,
            "zero_optimization.stage3_prefetch_bucket_size: Input should be greater than or equal to 0, got -1",
        ),
        ({"bf16": {"enable": True}}, 3, f"bf16.enable: {UNKNOWN} enabled?"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, 3, f"data_types.grad_acum_dtype: {UNKNOWN} grad_accum_dtype?"),
        ({"checkpoint": {"tag_validation": "Maybe"}}, 2, "checkpoint: Checkpoint config contains invalid"),
        ({"optimizer": {"params": {}}}, 2, "optimizer: has no type"),
        ({"optimizer": {"type": "AdamW", "parms": {}}}, 4, f"optimizer.parms: {UNKNOWN} params?"),
        ({"optimizer": {"type": "AdamW", "params": {"epss": 1e-8}}}, 5, f"optimizer.params.epss: {UNKNOWN} eps?"),
        ({"scheduler": {"type": "WarmupLR"}}, 2, "scheduler: the schedule is set with --lr_scheduler_type"),
        (
            {"checkpoint": {"tag_validation": "Fail", "load_universal": True}},
            4,
            "checkpoint.load_universal: true is not supported: --resume_from_checkpoint goes on with any number of",
        ),
        (
            {"checkpoint": {"checkpoint_serialization": False}},
            3,
            "checkpoint.checkpoint_serialization: false is not supported: only torch's zip format",
        ),
        (
            {"checkpoint": {"writer": {"type": "TORCH"}}},
            3,
            'checkpoint.writer: {"type": "TORCH"} is not supported: checkpoints must be on the disk',
        ),
        ({"fp16": {"enabled": True}}, 3, "fp16.enabled: fp16 is not supported"),
        ({"amp": {"enabled": True}}, 2, "amp: NVIDIA Apex AMP integration has been removed"),
    ],
)
def test_mistakes_in_the_file_name_its_line(tmp_path: Path, config: dict[str, Any], line: int, message: str) -> None:
    path = write(tmp_path, config)
    with pytest.raises(ValueError, match=re.escape(f"{path}:{line}: {message}")):
        load_ds_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"gradient_clipping": 1.0,\n}', ":3: not valid JSON"),
        ("[]", ":1: expected a JSON object, got list"),
        ('{"bf16": {}, "bf16": {}}', ": duplicate key bf16"),
        ('{"gradient_clipping": NaN}', ": NaN is not a JSON number"),
    ],
)
def test_files_that_are_not_strict_json(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match="ds.json") as error:
        load_ds_config(path)
    assert f"{path}{message}" in str(error.value)


def test_a_missing_file_is_named_with_its_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--ds_config .*none.json: no such file"):
        load_ds_config(tmp_path / "none.json")


def test_all_mistakes_are_reported_together(tmp_path: Path) -> None:
    wrong = {"bf16": {"enable": True}, "zero_optimization": {"stagee": 3}, "gradient_clippping": 1.0, "scheduler": {}}
    with pytest.raises(ValueError, match="stagee") as error:
        load_ds_config(write(tmp_path, wrong))
    assert len(str(error.value).splitlines()) == 4


def test_a_value_in_the_file_decides_a_flag_that_was_not_given() -> None:
    resolved, decided = resolve({"gradient_clipping": 0.5, "bf16": {"enabled": True}})
    assert resolved["gradient_clipping"] == 0.5
    assert decided == {"max_grad_norm": 0.5, "bf16": True}


def test_a_value_in_the_file_that_contradicts_a_given_flag_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"ds_config gradient_clipping 0.5 contradicts --max_grad_norm 1.0"):
        resolve({"gradient_clipping": 0.5}, {"max_grad_norm"})
    with pytest.raises(
        ValueError, match=r"ds_config optimizer.params.betas \[0.9, 0.95\] contradicts --adam_beta2 0.999"
    ):
        resolve({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}, {"adam_beta2"})
    assert resolve({"gradient_clipping": 1}, {"max_grad_norm"})[1] == {}  # the same value twice is no contradiction


def test_absent_keys_follow_the_flags_instead_of_deepspeeds_defaults() -> None:
    resolved, _ = resolve({}, max_grad_norm=0.25, bf16=True)
    assert resolved["gradient_clipping"] == 0.25
    assert resolved["bf16"] == {"enabled": True}
    assert "optimizer" not in resolved


def test_the_total_batch_decides_the_factor_that_is_open() -> None:
    assert resolve({"train_batch_size": 64})[1] == {"gradient_accumulation_steps": 16}
    resolved, decided = resolve({"train_batch_size": 64}, {"gradient_accumulation_steps"})
    assert decided == {"per_device_train_batch_size": 8}
    assert resolved["train_micro_batch_size_per_gpu"] == 8
    with pytest.raises(ValueError, match=r"train_batch_size 64 is not .*batch_size 2 x .* 2 ranks = 16"):
        resolve({"train_batch_size": 64}, {"gradient_accumulation_steps", "per_device_train_batch_size"})
    with pytest.raises(ValueError, match="expected a whole number above 0"):
        resolve({"train_micro_batch_size_per_gpu": 0})


def test_fp16_stays_off() -> None:
    assert resolve({"fp16": {"enabled": "auto"}})[0]["fp16"] == {"enabled": False}


@pytest.mark.parametrize("config", [{"steps_per_print": "auto"}, {"gradient_clippping": "auto"}])
def test_an_auto_that_no_flag_fills_is_an_error(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf'ds_config {next(iter(config))} is "auto", which no flag fills'):
        resolve(config)


def test_the_wrong_type_is_an_error_and_not_a_flag_value() -> None:
    with pytest.raises(ValueError, match='ds_config gradient_clipping "1.0": expected a number'):
        resolve({"gradient_clipping": "1.0"})
