"""A run that goes on with another number of ranks is the run it would have been: the same rows and references in every
step, the loss to 1e-5 in fp32; full-parameter and LoRA, two optimizer groups in several flat tensors, a schedule."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints.reshard import Resharded
from pipeline.training.generators import seed_everything
from tests.distributed.lives import Lives, metrics

LORA = ["--lora_r", "4", "--lora_dropout", "0.0"]
STEPS = ["--max_steps", "4", "--save_steps", "2"]


@pytest.fixture(scope="module", params=["full", "lora"])
def kind(request: pytest.FixtureRequest) -> list[str]:
    return LORA if request.param == "lora" else []


@pytest.fixture(scope="module")
def straight(kind: list[str], server: Lives, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Undisturbed: 8 rows a step on two ranks, saved at steps 2 and 4."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    argv = [*flags, *kind, *STEPS, "--gradient_accumulation_steps", "2", "--output_dir", str(out)]
    server.run("pipeline/train.py", *argv, ranks=2, logs=out.with_suffix(".logs"))
    return out


def go_on(server: Lives, flags: list[str], before: Path, out: Path, ranks: int) -> str:
    """The run of `before` from its checkpoint of step 2, in a folder of its own."""
    shutil.copytree(before, out, ignore=shutil.ignore_patterns("checkpoint-4"))
    argv = [*flags, *STEPS, "--output_dir", str(out), "--resume_from_checkpoint", "auto"]
    return server.run("pipeline/train.py", *argv, ranks=ranks, logs=out.with_suffix(".logs"))


def assert_same_run(found: Path, wanted: Path) -> None:
    lines, expected = metrics(found), metrics(wanted)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line, want in zip(lines, expected, strict=True):
        assert line == pytest.approx(want, rel=1e-5, abs=1e-7)
    assert len({line["loss"] for line in lines}) == 4, "every step has rows of its own"
    assert any(line["sink_penalty"] > 1e-4 for line in lines[2:]), "the references count"


def test_two_ranks_to_one_and_back(
    server: Lives, flags: list[str], kind: list[str], straight: Path, tmp_path: Path
) -> None:
    one = tmp_path / "one"
    output = go_on(server, [*flags, *kind], straight, one, ranks=1)
    assert output.count("checkpoint-2 was written by 2 ranks: its shards are cut anew for 1") == 1
    assert "4 accumulation x 1 ranks" in output
    assert_same_run(one, straight)
    # Saved by one rank at step 4; two ranks take it further, as they take their own.
    for run in (one, shutil.copytree(straight, tmp_path / "two")):
        argv = [*flags, *kind, "--max_steps", "5", "--output_dir", str(run), "--resume_from_checkpoint", "auto"]
        server.run("pipeline/train.py", *argv, ranks=2, logs=tmp_path / "logs")
    for line, want in zip(metrics(one), metrics(tmp_path / "two"), strict=True):
        assert line == pytest.approx(want, rel=1e-5, abs=1e-7)


def test_two_ranks_to_four(server: Lives, flags: list[str], kind: list[str], straight: Path, tmp_path: Path) -> None:
    output = go_on(server, [*flags, *kind], straight, tmp_path / "four", ranks=4)
    assert "1 accumulation x 4 ranks" in output
    assert_same_run(tmp_path / "four", straight)


def test_shards_cut_anew_hold_every_bit(straight: Path) -> None:
    """For as many ranks, what DeepSpeed wrote; for any other, the same whole tensors."""
    folder = straight / "checkpoint-4" / "global_step4"
    files = [torch.load(folder / f"zero_pp_rank_{r}_mp_rank_00_optim_states.pt", weights_only=False) for r in (0, 1)]
    old = Resharded(folder, written_by=2)
    groups = torch.load(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)["param_shapes"]
    settings = files[0]["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"]
    group_of = [number for number, group in enumerate(settings) for _ in group["params"]]
    assert len(groups) > len(settings), "several flat tensors in a group"
    for rank in (0, 1):
        want = files[rank]["optimizer_state_dict"]
        found = old.optimizer_states(groups, group_of, rank, 2)
        assert all(map(torch.equal, found["fp32_flat_groups"], want["fp32_flat_groups"]))
        torch.testing.assert_close(found["optimizer_state_dict"], want["optimizer_state_dict"], rtol=0, atol=0)
    # Other ranks, and the parameters in other flat tensors.
    merged = [{name: shape for group, number in zip(groups, group_of, strict=True) if number == each
               for name, shape in group.items()} for each in sorted(set(group_of))]  # fmt: skip
    whole = [tensors(old, merged, rank, 1) for rank in range(1)]
    for ranks in (3, 5):
        parts = [tensors(old, merged, rank, ranks) for rank in range(ranks)]
        for name, want in whole[0].items():
            shape = next(group[name[1]] for group in merged if name[1] in group)
            joined = torch.cat([part[name] for part in parts])
            assert torch.equal(joined[: shape.numel()], want)
            assert not joined[shape.numel() :].any()


def test_dropout_is_drawn_anew_for_every_rank_and_step() -> None:
    with torch.random.fork_rng(devices=[]):
        draws = []
        for seed, rank, step in ((1, 0, 3), (1, 1, 3), (1, 0, 4), (2, 0, 3), (1, 0, 3)):
            seed_everything(seed, rank, step)
            draws.append(torch.rand(()).item())
    assert draws[0] == draws[-1]
    assert len(set(draws)) == 4


def tensors(
    old: Resharded, groups: list[dict[str, torch.Size]], rank: int, ranks: int
) -> dict[tuple[str, str], torch.Tensor]:
    """A rank's piece of each parameter and of its moments."""
    states = old.optimizer_states(groups, list(range(len(groups))), rank, ranks)
    found = {}
    for number, group in enumerate(groups):
        moments = states["optimizer_state_dict"]["state"][number]
        flat = {"weight": states["fp32_flat_groups"][number], "m": moments["exp_avg"], "v": moments["exp_avg_sq"]}
        place = 0
        for name, shape in group.items():
            length = math.ceil(shape.numel() / ranks)
            found |= {(kind, name): each[place : place + length] for kind, each in flat.items()}
            place += length
        assert {each.numel() for each in flat.values()} == {place}
    return found
