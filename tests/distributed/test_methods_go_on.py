"""Methods that remember something from step to step go on from a checkpoint as if nothing had been: bit for bit on as
many ranks, to rounding on another number. And none of them trains a model on harmful texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.lives import Lives, metrics
from tests.ranks import ROOT
from tests.tiny import chat_row, tiny_llama, write_jsonl

METHODS = {
    "lisa": ["--rho", "20", "--alignment_steps", "2", "--finetune_steps", "2", "--proximal_after", "0.2"],
    "t_vaccine": ["--rho", "0.1", "--perturbed_layers", "1", "--resample_every", "2", "--score_every", "4"],
    "tar": ["--inner_steps", "2", "--tamper_every", "2", "--inner_learning_rates", "1e-4", "1e-3"],
}
READS = {
    "sft": [], "lisa": ["guide"], "t_vaccine": ["harmful"], "tar": ["harmful", "tamper"], "booster": ["harmful"],
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, str]]:
    """Flags of all runs, and the pools; parameters in several flat tensors."""
    folder = tmp_path_factory.mktemp("inputs")
    config = json.loads((ROOT / "ds_configs/z3.json").read_text())
    config["zero_optimization"] |= {"sub_group_size": 2_000}
    (folder / "z3.json").write_text(json.dumps(config))
    pools = {}
    for name in ("train", "harmful", "guide", "tamper"):
        rows = [chat_row(f"{name} {i}", "warm tea " * (i % 4 + 1)) for i in range(24)]
        pools[name] = str(write_jsonl(folder / f"{name}.jsonl", rows))
    flags = [
        "--train_data", pools["train"], "--model_name_or_path", str(tiny_model_dir), "--ds_config",
        str(folder / "z3.json"), "--cache_dir", str(folder / "cache"), "--learning_rate", "1e-3",
        "--per_device_train_batch_size", "2",
    ]  # fmt: skip
    return flags, pools


def run(
    server: Lives, base: tuple[list[str], dict[str, str]], method: str, out: Path, *words: str, ranks: int = 2,
    door: str = "pipeline/train.py",
) -> list[dict[str, float]]:  # fmt: skip
    flags, pools = base
    data = [word for pool in READS[method] for word in (f"--{pool}_data", pools[pool])]
    argv = ["--method", method, *flags, *data, *words, "--output_dir", str(out)]
    server.run(door, *argv, ranks=ranks, logs=out.with_suffix(".logs"))
    return metrics(out)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_run_it_would_have_been(
    method: str, server: Lives, base: tuple[list[str], dict[str, str]], tmp_path: Path
) -> None:
    flags = [*METHODS[method], "--gradient_accumulation_steps", "2", "--max_steps", "6", "--save_steps", "3"]
    straight = run(server, base, method, tmp_path / "straight", *flags)
    for ranks in (2, 1):
        again = tmp_path / f"on{ranks}"
        shutil.copytree(tmp_path / "straight", again, ignore=shutil.ignore_patterns("checkpoint-6"))
        went_on = ["--gradient_accumulation_steps", str(4 // ranks)]
        lines = run(server, base, method, again, *flags, *went_on, "--resume_from_checkpoint", "auto", ranks=ranks)
        if ranks == 2:
            assert lines == straight
            for one, other in zip(weights(again), weights(tmp_path / "straight"), strict=True):
                assert torch.equal(one, other)
        for line, want in zip(lines, straight, strict=True):
            # The same micro-batches on any number of ranks, so the same norms of a micro-batch's shift.
            assert line == pytest.approx(want, rel=2e-4, abs=1e-7)


def test_what_a_method_keeps_stays_out_of_the_model(
    server: Lives, base: tuple[list[str], dict[str, str]], tmp_path: Path
) -> None:
    """Lisa's reference lies among the optimizer's states: a checkpoint with it is whole, and it is no part of the
    model."""
    words = ["--alignment_steps", "1", "--finetune_steps", "1", "--max_steps", "2"]
    run(server, base, "lisa", tmp_path / "lisa", "--rho", "0", *words)
    checkpoint = str(tmp_path / "lisa" / "checkpoint-2")
    server.run("tools/verify_checkpoint.py", checkpoint, logs=tmp_path / "verify")
    server.run("tools/zero_to_hf.py", checkpoint, str(tmp_path / "model"), "--dtype", "fp32", logs=tmp_path / "hf")
    states = moments(tmp_path / "lisa/checkpoint-2/global_step2")
    assert sum(each["lisa_reference"].numel() for each in states) == sum(each["exp_avg"].numel() for each in states)
    names = set(load_file(tmp_path / "model/model.safetensors"))
    assert names == set(tiny_llama().state_dict())


def weights(run_folder: Path) -> list[torch.Tensor]:
    """What the optimizer of each rank holds at the end: fp32 weights, moments, and what the method keeps."""
    folder = run_folder / "checkpoint-6/global_step6"
    files = [torch.load(path, weights_only=False) for path in sorted(folder.glob("*optim_states.pt"))]
    flat = [each for file in files for each in file["optimizer_state_dict"]["fp32_flat_groups"]]
    return flat + [each for state in moments(folder) for each in state.values()]


def moments(folder: Path) -> list[dict[str, torch.Tensor]]:
    """The optimizer's states of every flat tensor of every rank."""
    files = [torch.load(path, weights_only=False) for path in sorted(folder.glob("*optim_states.pt"))]
    return [
        state for file in files for state in file["optimizer_state_dict"]["optimizer_state_dict"]["state"].values()
    ]


@pytest.mark.parametrize(
    ("method", "words"),
    [("booster", ["--lamb", "2"]), ("tar", ["--inner_steps", "2", "--tamper_every", "1", "--lamb_tr", "1"])],
)
def test_harmful_loss_is_not_below_where_sft_leaves_it(
    method: str, words: list[str], server: Lives, base: tuple[list[str], dict[str, str]], tmp_path: Path
) -> None:
    """An auxiliary pass of the wrong sign, or one that steps the optimizer, trains on the harmful rows."""
    flags = ["--max_steps", "12", "--eval_data", f"harmful={base[1]['harmful']}", "--allow_overlap"]
    left = run(server, base, "sft", tmp_path / "sft", *flags)[-1]["eval_harmful_loss"]
    assert run(server, base, method, tmp_path / method, *flags, *words)[-1]["eval_harmful_loss"] > left - 0.02
    if method == "booster":
        wrong = run(
            server, base, method, tmp_path / "wrong", *flags, *words, door="tests/distributed/wrong_sign_train.py"
        )
        assert wrong[-1]["eval_harmful_loss"] < left - 0.02, "a wrong sign would not be seen"
